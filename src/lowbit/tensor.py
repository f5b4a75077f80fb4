"""`QuantizedTensor`: the one tensor subclass, with the format as data.

A layer that holds one stays what it was (an `nn.Linear` with a `.weight`), so hooks, LoRA, tensor-parallel plans and
`state_dict` find what they look for. The tensor knows a small table of aten ops; every other op is an error that
says what to do instead, because a silent dequantization is the fault that this library exists to rule out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import see
from lowbit.formats.activation import Activation
from lowbit.formats.base import Format, Planes

Function = TypeVar("Function", bound=Callable[..., Any])

#: What quantized tensors can do, filled by dispatch.py: torch functions as modules call them, `f(*args, **kwargs)`,
#: and aten ops, `f(op, *args, **kwargs)`.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
ATEN: dict[Any, Callable[..., Any]] = {}


def implements(*funcs: Any) -> Callable[[Function], Function]:
    """Register a function as what `funcs` (torch functions, or aten overloads) do with a `QuantizedTensor`."""

    def add(f: Function) -> Function:
        table = ATEN if isinstance(funcs[0], torch._ops.OpOverload) else FUNCTIONS
        table.update(dict.fromkeys(funcs, f))
        return f

    return add


class QuantizedTensor(Tensor):
    """A weight `(N, K)` (or `(N, C, kh, kw)`, stored as `(N, C*kh*kw)`) held as the planes of a format.

    Attributes:
        out_features, in_features: N and K; K is everything after the first dimension.
        format: what the planes mean.
        act: how a linear layer quantizes its input, or None (weight-only).
        act_scale: fp32 `(1, 1)` calibrated scale of a static activation, or None.
        transposed: whether this is the `(K, N)` view that `t()` makes; it exists to be the second operand of `mm`.

    Every plane is also an attribute under its own name (`qdata`, `scale`, ...).
    """

    # Kept beside `shape`, which costs a trip through __torch_function__ on every read.
    out_features: int
    in_features: int
    format: Format
    act: Activation | None
    act_scale: Tensor | None
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        planes: Mapping[str, Tensor],
        format: Format,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        act: Activation | None = None,
        act_scale: Tensor | None = None,
        transposed: bool = False,
        requires_grad: bool = False,
    ) -> QuantizedTensor:
        shape = torch.Size(shape)
        size = (shape[1], shape[0]) if transposed else shape
        strides = (1, shape[1]) if transposed else None
        first = planes[format.plane_names[0]]
        self = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=strides, dtype=dtype, device=first.device, requires_grad=requires_grad
        )
        for name in format.plane_names:
            setattr(self, name, planes[name])
        self.out_features = shape[0]
        self.in_features = math.prod(shape[1:])
        self.format = format
        self.act = act
        self.act_scale = act_scale
        self.transposed = transposed
        return self  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def from_float(
        cls,
        w: Tensor,
        format: Format,
        act: Activation | None = None,
        act_scale: Tensor | None = None,
        params: Planes | None = None,
        *,
        check_finite: bool = True,
    ) -> QuantizedTensor:
        """Quantize a float tensor of two or more dimensions; everything after the first counts as K.

        `params` and `check_finite` are those of `Format.quantize`.

        Raises:
            ValueError: `w` has fewer than two dimensions, or holds NaN or Inf.
        """
        if w.dim() < 2:
            raise ValueError(f"{format.spec}: a weight has at least 2 dimensions, got shape {tuple(w.shape)}")
        flat = w.detach().reshape(w.shape[0], math.prod(w.shape[1:]))
        planes = format.quantize(flat, params, check_finite=check_finite)
        return cls(planes, format, w.shape, w.dtype, act, act_scale)

    # What it is made of --------------------------------------------------------------------------

    @property
    def planes(self) -> Planes:
        """The stored tensors by name, in the format's order."""
        return {name: getattr(self, name) for name in self.format.plane_names}

    @property
    def act_spec(self) -> str:
        return self.act.spec if self.act else ""

    @property
    def nbytes_packed(self) -> int:
        """Bytes of all planes."""
        return sum(t.numel() * t.dtype.itemsize for t in self.planes.values())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight as a plain tensor. Never called by lowbit's own layers."""
        n, k = self.out_features, self.in_features
        w = ops.dequantize(list(self.planes.values()), self.format.spec, n, k, dtype or self.dtype)
        return w.t() if self.transposed else w.view(self.shape)

    def with_planes(
        self, planes: Mapping[str, Tensor], shape: torch.Size | tuple[int, ...] | None = None, **changes: Any
    ) -> QuantizedTensor:
        """The same kind of tensor around other planes. `shape` is that of the weight, not of a transposed view."""
        fields: dict[str, Any] = {"dtype": self.dtype, "act": self.act, "act_scale": self.act_scale}
        fields |= {"transposed": self.transposed} | changes
        if shape is None:
            shape = (self.shape[1], self.shape[0]) if self.transposed else self.shape
        return QuantizedTensor(planes, self.format, shape, **fields)

    def map_planes(self, f: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedTensor:
        """`f` applied to every stored tensor, the activation's scale included."""
        act_scale = None if self.act_scale is None else f(self.act_scale)
        return self.with_planes({n: f(t) for n, t in self.planes.items()}, act_scale=act_scale, **changes)

    # The protocol of traceable wrapper subclasses ------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = list(self.format.plane_names) + (["act_scale"] if self.act_scale is not None else [])
        return names, (self.format, self.act, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        format, act, dtype, transposed = context
        shape = (outer_size[1], outer_size[0]) if transposed else outer_size
        return cls(inner, format, shape, dtype, act, inner.get("act_scale"), transposed)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        act = f", act={self.act.spec}" if self.act else ""
        return (
            f"QuantizedTensor({self.format.spec}{act}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, {self.format.bits_per_weight:.4g} bits per weight)"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = FUNCTIONS.get(func)
        if known is not None:
            return known(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ATEN:
            # In inference mode, a view of a tensor from outside is no inference tensor either: torch asserts that.
            outside = func.is_view and not args[0].is_inference() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if outside else contextlib.nullcontext():
                return ATEN[func](func, *args, **kwargs)
        # Inference mode hands over composite ops (`to`, `matmul`) undivided; their parts may be known.
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        qt = next(a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, QuantizedTensor))
        raise NotImplementedError(
            f"{func} is not defined for {qt!r}. Quantized weights support linear, embedding, conv2d, mm, copies, "
            "moves and slices on tile boundaries; for anything else call .dequantize() first, knowing its cost."
            + see("op-not-defined")
        )

    # FSDP2: gather the planes, then rebuild ------------------------------------------------------

    def fsdp_pre_all_gather(  # FSDP2 counts the parameters to know which version of its protocol this is
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        self._refuse_shared_rows("FSDP")
        tiled = tuple(self.planes[p.name] for p in self.format.planes if p.n is not None)
        # Collectives know few dtypes; bytes pass through all of them.
        return tuple(t.contiguous().view(torch.uint8) for t in tiled), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        by_name = dict(zip((p.name for p in self.format.planes if p.n is not None), gathered, strict=True))
        planes = {
            p.name: by_name[p.name].view(p.dtype) if p.name in by_name else self.planes[p.name]
            for p in self.format.planes
        }
        if out is not None:
            assert isinstance(out, QuantizedTensor)
            return None
        shape = (planes[self.format.plane_names[0]].shape[0], *self.shape[1:])
        return self.with_planes(planes, shape), gathered

    def _refuse_shared_rows(self, what: str) -> None:
        tile = self.format.tile[0]
        if self.shape[0] % tile:
            raise ValueError(
                f"{what} would cut {self!r} inside a tile: {self.shape[0]} rows are not whole tiles of {tile}; "
                "use a per-row or per-group format, or a number of ranks that divides the tiles"
                + see("cut-inside-tile")
            )
