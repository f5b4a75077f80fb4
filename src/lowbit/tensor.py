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
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from lowbit import ops
from lowbit.errors import see
from lowbit.formats.activation import Activation
from lowbit.formats.base import Format, Plane, Planes

aten = torch.ops.aten
_ATEN: dict[Any, Callable[..., Any]] = {}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


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
    ) -> QuantizedTensor:
        """Quantize a float tensor of two or more dimensions; everything after the first counts as K.

        Raises:
            ValueError: `w` has fewer than two dimensions, or holds NaN or Inf.
        """
        if w.dim() < 2:
            raise ValueError(f"{format.spec}: a weight has at least 2 dimensions, got shape {tuple(w.shape)}")
        planes = format.quantize(w.detach().reshape(w.shape[0], math.prod(w.shape[1:])), params)
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
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ATEN:
            # In inference mode, a view of a tensor from outside is no inference tensor either: torch asserts that.
            outside = func.is_view and not args[0].is_inference() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if outside else contextlib.nullcontext():
                return _ATEN[func](func, *args, **kwargs)
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


def _implements(*funcs: Any) -> Callable[[Function], Function]:
    def add(f: Function) -> Function:
        table = _ATEN if isinstance(funcs[0], torch._ops.OpOverload) else _FUNCTIONS
        for func in funcs:
            table[func] = f
        return f

    return add


def _linear(x: Tensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
    n, k = w.out_features, w.in_features
    return ops.linear(x, list(w.planes.values()), bias, w.act_scale, w.format.spec, w.act_spec, n, k)


def _refuse(w: Any, name: str, expected: str) -> None:
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"{name}: {expected}, got {type(w).__name__} in its place" + see("wrong-operand"))


def _refuse_transposed(w: QuantizedTensor, name: str) -> None:
    if w.transposed:
        raise ValueError(
            f"{name}: got the transposed view {w!r}; give the weight itself, or write the other product as x @ w"
            + see("wrong-operand")
        )


# torch functions: what modules call --------------------------------------------------------------


@_implements(F.linear)
def _f_linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    _refuse(weight, "linear", "the weight is the quantized operand")
    _refuse_transposed(weight, "linear")
    return _linear(input, weight, bias)


@_implements(F.embedding)
def _f_embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    _refuse(weight, "embedding", "the table is the quantized operand")
    if max_norm is not None:
        raise NotImplementedError("embedding: max_norm would rewrite a quantized table" + see("op-not-defined"))
    return _embedding(weight, input)


@_implements(F.conv2d)
def _f_conv2d(
    input: Tensor, weight: Any, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    _refuse(weight, "conv2d", "the weight is the quantized operand")
    if weight.act is not None:
        raise NotImplementedError(f"conv2d: only weight-only, no activation {weight.act.spec}" + see("wrong-operand"))

    def two(v: Any) -> list[int]:
        return [v, v] if isinstance(v, int) else list(v)

    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"conv2d: padding {padding!r} is not 'same', 'valid' or numbers" + see("input-mismatch"))
        total = [d * (s - 1) for d, s in zip(two(dilation), weight.shape[2:], strict=True)]
        if padding == "same" and any(t % 2 for t in total):
            input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
        padding = [t // 2 for t in total] if padding == "same" else [0, 0]
    if weight.dim() != 4 or input.dim() not in (3, 4):
        raise ValueError(
            f"conv2d: takes a 4-D weight, 3-D or 4-D input; got {weight!r}, {tuple(input.shape)}"
            + see("input-mismatch")
        )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    planes, spec = list(weight.planes.values()), weight.format.spec
    y = ops.conv2d(batched, planes, bias, spec, weight.shape, two(stride), two(padding), two(dilation), groups)
    return y if input.dim() == 4 else y.squeeze(0)


def _embedding(weight: QuantizedTensor, ids: Tensor) -> Tensor:
    _refuse_transposed(weight, "embedding")
    planes, spec = list(weight.planes.values()), weight.format.spec
    return ops.embedding(ids, planes, spec, weight.out_features, weight.in_features, weight.dtype)


@_implements(Tensor.share_memory_)
def _f_share_memory_(w: QuantizedTensor) -> QuantizedTensor:
    """Without this, torch would share the storage of the wrapper, which has none."""
    for t in w.planes.values():
        t.share_memory_()
    return w


@_implements(Tensor.is_shared)
def _f_is_shared(w: QuantizedTensor) -> bool:
    return all(t.is_shared() for t in w.planes.values())


# aten ops: what DTensor, FSDP, copies and moves arrive as ----------------------------------------


@_implements(aten.linear.default)
def _a_linear(func: Any, x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor:
    _refuse(w, "linear", "the weight is the quantized operand")
    _refuse_transposed(w, "linear")
    return _linear(x, w, bias)


@_implements(aten.mm.default)
def _a_mm(func: Any, a: Any, b: Any) -> Tensor:
    """`x @ W.t()` is a linear; `grad @ W` is its gradient."""
    _refuse(b, "mm", "only the second operand may be quantized")
    if b.transposed:
        return _linear(a, b, None)
    return ops.linear_dgrad(a, list(b.planes.values()), b.format.spec, b.out_features, b.in_features)


@_implements(aten.addmm.default)
def _a_addmm(func: Any, bias: Tensor, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _refuse(b, "addmm", "only the second operand may be quantized")
    if beta == 1 and alpha == 1 and b.transposed and bias.dim() == 1:
        return _linear(a, b, bias)
    return bias * beta + _a_mm(func, a, b) * alpha


@_implements(aten.embedding.default)
def _a_embedding(
    func: Any, w: Any, ids: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    return _embedding(w, ids)


@_implements(aten.t.default)
def _a_t(func: Any, w: QuantizedTensor) -> QuantizedTensor:
    shape = (w.shape[1], w.shape[0]) if w.transposed else w.shape
    return w.with_planes(w.planes, shape, transposed=not w.transposed)


@_implements(aten.transpose.int)
def _a_transpose(func: Any, w: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    if w.dim() != 2:
        raise NotImplementedError(f"transpose of {w!r}: only 2-D weights have one" + see("op-not-defined"))
    return w if dim0 % 2 == dim1 % 2 else _a_t(func, w)


@_implements(aten.permute.default)
def _a_permute(func: Any, w: QuantizedTensor, dims: list[int]) -> QuantizedTensor:
    order = [d % w.dim() for d in dims]
    if order == list(range(w.dim())):
        return w.with_planes(w.planes)
    return _a_transpose(func, w, 0, 1)


@_implements(aten.detach.default, aten.alias.default)
def _a_detach(func: Any, w: QuantizedTensor) -> Any:
    return return_and_correct_aliasing(func, (w,), {}, w.map_planes(func))


@_implements(aten.clone.default)
def _a_clone(func: Any, w: QuantizedTensor, **kwargs: Any) -> Any:
    return return_and_correct_aliasing(func, (w,), kwargs, w.map_planes(torch.clone))


@_implements(aten.contiguous.default)
def _a_contiguous(func: Any, w: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    return w.map_planes(lambda t: t.contiguous())


@_implements(aten._to_copy.default)
def _a_to_copy(
    func: Any, w: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False,
    **_: Any,
) -> Any:  # fmt: skip
    """Moves the planes; `dtype` changes what the layer computes in, never the stored bits."""
    if dtype is not None and dtype not in ops.FLOAT_DTYPES:
        raise TypeError(
            f"{w!r} can be bf16, fp16 or fp32, not {dtype}; its storage has its own dtypes" + see("unsupported-dtype")
        )
    moved = w.map_planes(
        lambda t: t.to(device=device or t.device, non_blocking=non_blocking, copy=True), dtype=dtype or w.dtype
    )
    return return_and_correct_aliasing(func, (w,), {"dtype": dtype, "device": device}, moved)


@_implements(aten.copy_.default)
def _a_copy_(func: Any, dst: Any, src: Any, non_blocking: bool = False) -> Any:
    if not isinstance(dst, QuantizedTensor):
        raise TypeError(
            f"copy_ of {src!r} into a plain tensor would dequantize it; use .dequantize()"
            + see("copy-would-dequantize")
        )
    if not isinstance(src, QuantizedTensor):
        src = QuantizedTensor.from_float(src.to(dst.device).expand(dst.shape), dst.format)
    if src.format != dst.format or src.shape != dst.shape or src.transposed != dst.transposed:
        raise ValueError(f"copy_ needs equal formats and shapes, got {src!r} into {dst!r}" + see("format-mismatch"))
    for name, plane in dst.planes.items():
        plane.copy_(src.planes[name], non_blocking)
    return dst


def _cut(w: QuantizedTensor, dim: int, start: int, stop: int) -> QuantizedTensor:
    """Rows or columns `start..stop` as views; both ends on tile boundaries or at the tensor's end."""
    if w.dim() > 2 and dim != 0:
        raise ValueError(f"{w!r} can only be cut along dim 0, got dim {dim}" + see("cut-inside-tile"))
    axis = 1 - dim if w.transposed else dim
    tile, size = w.format.tile[axis], w.shape[dim]
    for edge in (start, stop):
        if edge % tile and edge != size:
            raise ValueError(
                f"cannot cut {w!r} at {edge} along {'NK'[axis]}: {w.format.spec} stores tiles of {tile} weights "
                f"there; cut at a multiple of {tile}, or use a finer format" + see("cut-inside-tile")
            )
    shape = list((w.shape[1], w.shape[0]) if w.transposed else w.shape)
    shape[axis] = stop - start
    return w.with_planes(w.format.slice_planes(w.planes, axis, start, stop), tuple(shape))


@_implements(aten.slice.Tensor)
def _a_slice(
    func: Any, w: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    dim %= w.dim()
    if step != 1:
        raise ValueError(f"cannot slice {w!r} with step {step}, only 1" + see("cut-inside-tile"))
    start, stop, _ = slice(start, end).indices(w.shape[dim])
    return return_and_correct_aliasing(func, (w, dim, start, stop), {}, _cut(w, dim, start, max(start, stop)))


@_implements(aten.split.Tensor)
def _a_split(func: Any, w: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    total = w.shape[dim % w.dim()]
    return [_cut(w, dim % w.dim(), i, min(i + size, total)) for i in range(0, total, size)]


@_implements(aten.split_with_sizes.default)
def _a_split_with_sizes(func: Any, w: QuantizedTensor, sizes: list[int], dim: int = 0) -> list[QuantizedTensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_cut(w, dim % w.dim(), end - size, end) for size, end in zip(sizes, ends, strict=True)]


@_implements(aten.new_zeros.default, aten.new_empty.default, aten.empty_like.default, aten.zeros_like.default)
def _a_new(func: Any, w: QuantizedTensor, size: Any = None, **kwargs: Any) -> QuantizedTensor:
    """A tensor of zeros of the same kind, with planes of its own: zero scales make every code zero."""
    shape = tuple(w.shape if size is None else size)
    if len(shape) != w.dim() or w.transposed:
        raise ValueError(
            f"a new tensor like {w!r} has {w.dim()} dimensions, got size {shape}" + see("view-of-packed-weight")
        )
    n, k = shape[0], math.prod(shape[1:])
    device = torch.device(kwargs.get("device") or w.device)

    def plane(p: Plane) -> Tensor:
        if p.shape is not None and (w.device.type != "meta" or device.type == "meta"):
            return w.planes[p.name].to(device, copy=True)
        return torch.zeros(p.shape_for(n, k), dtype=p.dtype, device=device)

    return w.with_planes({p.name: plane(p) for p in w.format.planes}, shape, dtype=kwargs.get("dtype") or w.dtype)


@_implements(aten.view.default, aten._unsafe_view.default, aten.as_strided.default)
def _a_view(func: Any, w: QuantizedTensor, size: Any, *args: Any) -> QuantizedTensor:
    """The identity view only, and FSDP2's flattening of a shard, which it never reads (it gathers planes)."""
    if tuple(size) in (tuple(w.shape), (-1,)):
        return w.with_planes(w.planes)
    raise ValueError(
        f"cannot view {w!r} as {tuple(size)}: packed weights have one shape" + see("view-of-packed-weight")
    )


@_implements(aten.is_pinned.default)
def _a_is_pinned(func: Any, w: QuantizedTensor, device: Any = None) -> bool:
    return all(t.is_pinned() for t in w.planes.values())


@_implements(aten._pin_memory.default)
def _a_pin_memory(func: Any, w: QuantizedTensor, device: Any = None) -> QuantizedTensor:
    return w.map_planes(lambda t: t.pin_memory())


@_implements(aten.record_stream.default)
def _a_record_stream(func: Any, w: QuantizedTensor, stream: Any) -> None:
    for t in w.planes.values():
        t.record_stream(stream)


@_implements(aten.equal.default)
def _a_equal(func: Any, a: Any, b: Any) -> bool:
    """Equal formats, shapes and bits."""
    if not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)):
        return False
    return (
        a.format == b.format
        and a.act == b.act
        and a.shape == b.shape
        and all(torch.equal(x.view(torch.uint8), b.planes[n].view(torch.uint8)) for n, x in a.planes.items())
    )
