"""Follows quantized weights through every operation of a run, on any device, to see which are made into whole copies.

Each storage has a colour: made of the codes of quantized layers alone (CODED), or of an input of the model (ACTIVE), or
of neither (constants: scales, codebooks, tables). An operation on coded and constant tensors gives a coded one; one
that reads a coded and an active tensor is where a layer uses its weight. What is read there, the codes or a copy, is
what `verdict.judge` judges by.

Operations of libraries (`torch.ops.lowbit.linear`) are run a second level down, so that a copy made inside of
one is seen too. Kernels that are launched without PyTorch's dispatcher (Triton, CUDA, C) are not: they read codes.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit.kernels.problem import UnsupportedError
from lowbit.kernels.select import select, select_gradient
from lowbit.ops import problem_of
from lowbit.tools.profile.layers import CODES, Found, find_layers, nbytes, state_tensors
from lowbit.tools.profile.stacks import Stack, current_stack

#: Namespaces whose operations are PyTorch's own and have no inside to look at.
_ATOMS = {"aten", "prims", "prim", "profiler", "c10d", "_c10d_functional", "inductor"}
_BACKENDS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
#: Operations that multiply matrices, without their namespace.
PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "einsum", "mv", "addmv", "convolution", "conv1d",
    "conv2d", "conv3d", "_scaled_mm", "_int_mm", "_grouped_mm", "_scaled_grouped_mm",
}  # fmt: skip
#: Operations that write their first argument without reading it.
_OVERWRITE = {"aten::copy_", "aten::fill_", "aten::zero_"}
#: Operations that take a tensor for its shape alone.
_SHAPED_LIKE = re.compile(r"aten::(new_\w+|(empty|zeros|ones|full|rand|randn|randint)_like)")


class Colour(Enum):
    CODED = "coded"
    ACTIVE = "active"


@dataclass(frozen=True)
class Copy:
    """A tensor that was computed from nothing but a quantized weight, in a wider type than it is stored in.

    Attributes:
        op: the operation that wrote it, and `stack` the lines that called it.
        inside: the library's operation inside of which that happened, or "".
        kernel: the kernel, where that operation is one of lowbit's.
    """

    op: str
    elements: int
    bytes: int
    floating: bool
    stack: Stack
    inside: str = ""
    kernel: str = ""


@dataclass(frozen=True)
class Read:
    """A layer's weight met an activation in `op`: the codes themselves (`copy` is None) or a copy of them.

    Attributes:
        elements: how many elements the operand has, of which a buffer filled piece by piece has more than its copies.
    """

    layer: str
    op: str
    copy: Copy | None
    elements: int
    bytes: int
    stack: Stack
    inside: str = ""
    kernel: str = ""


@dataclass
class _Info:
    colour: Colour
    layers: frozenset[str] = frozenset()
    copy: Copy | None = None
    source: bool = False


class DequantTracer(TorchDispatchMode):
    """Records every read of a quantized weight while it is active, every wide copy in `written`, which modules `ran`,
    and whose codes are no weight but a cache that the run writes into.

    Compiled parts of the model run uncompiled meanwhile.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, found: Found | None = None) -> None:
        super().__init__()
        self.model = model
        self.found = found or find_layers(model)
        self.reads: list[Read] = []
        self.written: list[tuple[str, Copy]] = []
        self.ran: set[str] = set()
        self.caches: set[str] = set()
        self._info: dict[int, _Info] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._state = {_key(t) for t in state_tensors(model)}
        self._inside: list[tuple[str, str]] = []
        self._exits = contextlib.ExitStack()
        for name, codes in self.found.codes.items():
            for tensor in codes:
                self._colour(tensor, _Info(Colour.CODED, frozenset((name,)), source=True))

    def __enter__(self) -> DequantTracer:
        # A mode is entered again for the inside of each library operation.
        if not self._inside:
            if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled
                self._exits.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in self.model.named_modules():
                mark = partial(self._mark_inputs, name)
                handle = module.register_forward_pre_hook(mark, prepend=True, with_kwargs=True)
                self._exits.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self._inside:
            self._exits.close()

    def _mark_inputs(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.ran.add(name)
        for tensor in plain_tensors((args, kwargs)):
            if _key(tensor) not in self._state and self._of(tensor) is None:
                self._colour(tensor, _Info(Colour.ACTIVE))

    # The dispatcher's calls ----------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_subclass(t) for t in types):
            return NotImplemented  # the subclass says what it is made of, and its parts come here
        op = _name(func)
        overwritten = _overwritten(func, op, args, kwargs)
        inputs = [t for t in plain_tensors((args, kwargs)) if not any(t is o for o in overwritten)]
        infos = [(t, i) for t in inputs if (i := self._of(t)) is not None]
        if _SHAPED_LIKE.fullmatch(op):
            return func(*args, **kwargs)
        coded = [(t, i) for t, i in infos if i.colour is Colour.CODED]
        active = any(i.colour is Colour.ACTIVE for _, i in infos)
        opaque = isinstance(func, torch._ops.OpOverload) and func.namespace not in _ATOMS
        kernel = kernel_of(op, args) if opaque else ""
        active = active or (not infos and self._is_gradient(inputs)) or (bool(coded) and self._meets_input(op, inputs))
        if active and coded:
            self._read(op, kernel, coded)
        result = self._run(func, op, kernel, args, kwargs, inputs) if opaque and coded else func(*args, **kwargs)
        self._colour_results(func, op, opaque, args, kwargs, result, coded, active)
        return result

    def _is_gradient(self, inputs: list[Tensor]) -> bool:
        """Whether these are tensors that autograd made, which no module was given."""
        backward = torch._C._current_graph_task_id() != -1 and not self._inside
        return backward and bool(inputs) and not any(_key(t) in self._state for t in inputs)

    def _meets_input(self, op: str, inputs: list[Tensor]) -> bool:
        """Whether a product multiplies something that is neither the model's nor made of it: an input that no module
        was given, because the model runs as functions on its weights."""
        product = op == "lowbit::linear" or op.partition("::")[2].rstrip("_") in PRODUCTS
        return product and any(t.dim() > 1 and self._of(t) is None and _key(t) not in self._state for t in inputs)

    def _run(self, func: Any, op: str, kernel: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """The kernel of a library's operation, under this mode."""
        backend = _BACKENDS.get(inputs[0].device.type)
        if backend is None:
            return func(*args, **kwargs)
        self._inside.append((op, kernel))
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(backend), *args, **kwargs)
        finally:
            self._inside.pop()

    def _read(self, op: str, kernel: str, coded: list[tuple[Tensor, _Info]]) -> None:
        """One read of each layer that is among the operands: a floating copy before codes, the largest of several."""
        inside, outer_kernel = self._where()
        operands: dict[str, tuple[Tensor, _Info]] = {}
        for tensor, info in sorted(coded, key=_weight_of_operand):
            operands |= dict.fromkeys(info.layers, (tensor, info))
        stack = current_stack()
        for layer, (t, info) in operands.items():
            self.reads.append(Read(layer, op, info.copy, t.numel(), nbytes(t), stack, inside, kernel or outer_kernel))

    def _where(self) -> tuple[str, str]:
        """The library's operation that runs, and its kernel."""
        return self._inside[-1] if self._inside else ("", "")

    def _colour_results(
        self, func: Any, op: str, opaque: bool, args: Any, kwargs: Any, result: Any,
        coded: list[tuple[Tensor, _Info]], active: bool,
    ) -> None:  # fmt: skip
        if not coded and not active:
            # A constant written over a workspace: what was in it is gone.
            for tensor in _overwritten(func, op, args, kwargs):
                self._info.pop(_key(tensor), None)
            return
        before = {_key(t) for t, _ in coded}
        written = _written(func, args, kwargs)
        for tensor in {id(t): t for t in (*plain_tensors(result), *written)}.values():
            old = self._of(tensor)
            if old is not None and old.source:
                if active and any(t is tensor for t in written):
                    self.caches |= old.layers
                continue
            if active:
                self._colour(tensor, _Info(Colour.ACTIVE))
                continue
            layers = frozenset[str]().union(*(i.layers for _, i in coded))
            copies = [i.copy for _, i in coded if i.copy is not None]
            if opaque and old is not None and old.copy is not None:
                copies.append(old.copy)  # found inside of the operation
            elif _key(tensor) not in before or any(t is tensor for t in written):
                copy = self._copy(op, tensor)
                if copy is not None:
                    self.written += [(layer, copy) for layer in layers]
                    copies.append(copy)
            # Of equally large ones the first: the line to change, not what is done with the copy afterwards.
            best = max(copies, key=lambda c: (c.floating, c.elements), default=None)
            self._colour(tensor, _Info(Colour.CODED, layers, best))

    def _copy(self, op: str, tensor: Tensor) -> Copy | None:
        wide = tensor.is_floating_point() and tensor.element_size() > 1
        if not wide and tensor.dtype not in CODES | {torch.int64}:
            return None
        return Copy(op, tensor.numel(), nbytes(tensor), wide, current_stack(), *self._where())

    # Colours of storages -------------------------------------------------------------------------

    def _of(self, tensor: Tensor) -> _Info | None:
        return self._info.get(_key(tensor))

    def _colour(self, tensor: Tensor, info: _Info) -> None:
        key = _key(tensor)
        self._info[key] = info
        # Holds the storage's address, not its memory: no later storage can be taken for this one.
        self._alive.setdefault(key, StorageWeakRef(tensor.untyped_storage()))


def _weight_of_operand(operand: tuple[Tensor, _Info]) -> tuple[bool, bool, int]:
    tensor, info = operand
    return info.copy is not None, info.copy is not None and info.copy.floating, tensor.numel()


def kernel_of(op: str, args: Any) -> str:
    """The kernel that lowbit runs for a call of one of its operations, or ""."""
    if op in ("lowbit::conv2d", "lowbit::conv2d_dgrad"):
        return "convolution"
    if op not in ("lowbit::linear", "lowbit::linear_dgrad") or not args[0].numel():
        return ""
    n, k = args[-2:]
    x, gradient = args[0], op == "lowbit::linear_dgrad"
    spec, act = (args[2], "") if gradient else args[4:6]
    try:
        problem = problem_of(x, x.numel() // x.shape[-1], n, k, spec, act)
        return select_gradient(problem).name if gradient else select(problem).kernel.name
    except UnsupportedError:
        return ""  # the call itself says what is wrong


def _name(func: Any) -> str:
    return func._schema.name if isinstance(func, torch._ops.OpOverload) else str(func)


def is_subclass(kind: type) -> bool:
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl and kind is not Tensor  # type: ignore[attr-defined]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def plain_tensors(values: Any) -> list[Tensor]:
    """The tensors among nested values that have a storage: no subclasses, no sparse ones."""
    found = (t for t in tree_leaves(values) if isinstance(t, Tensor) and not is_subclass(type(t)))
    return [t for t in found if t.layout is torch.strided]


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """(schema, value) of the arguments given."""
    if not isinstance(func, torch._ops.OpOverload):
        return
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    written = (v for a, v in _arguments(func, args, kwargs) if a.alias_info is not None and a.alias_info.is_write)
    return [t for value in written for t in plain_tensors(value)]


def _overwritten(func: Any, op: str, args: Any, kwargs: Any) -> list[Tensor]:
    if op in _OVERWRITE:
        return _written(func, args, kwargs)
    return [t for a, value in _arguments(func, args, kwargs) if a.is_out for t in plain_tensors(value)]
