"""What torch functions and aten ops do with a `QuantizedTensor`: the table behind tensor.py.

Modules call torch functions (linear, embedding, conv2d), which become lowbit's own ops. DTensor, FSDP, autograd, copies
and moves arrive as aten ops. What is not here is an error.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import return_and_correct_aliasing

from lowbit import ops
from lowbit.errors import see
from lowbit.formats.base import Plane
from lowbit.tensor import QuantizedTensor, implements

aten = torch.ops.aten


_KEYS = torch._C.DispatchKey
#: Dispatch keys of plain tensors, and of threads in which nothing but autograd stands between a call and its kernel.
_PLAIN = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(key).raw_repr()
        for key in (_KEYS.CPU, _KEYS.CUDA, _KEYS.AutogradCPU, _KEYS.AutogradCUDA, _KEYS.AutocastCPU, _KEYS.AutocastCUDA,
                    _KEYS.ADInplaceOrView, _KEYS.BackendSelect)
    ),
)  # fmt: skip


def _is_watched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether anything but the kernel must see a call of an op: autograd, a tracer, a mode, a profiler, a subclass.

    Where nothing must, its way through the dispatcher takes longer than the launch of its kernel.
    """
    if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor:
        return True
    keys = torch._C._dispatch_keys(x).raw_repr() | torch._C._dispatch_tls_local_include_set().raw_repr()
    gradient = x.requires_grad
    if bias is not None:
        if type(bias) not in (Tensor, Parameter):
            return True
        keys |= torch._C._dispatch_keys(bias).raw_repr()
        gradient = gradient or bias.requires_grad
    return (
        bool(keys & ~_PLAIN)
        or (gradient and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
    )


def linear(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, act_scale: Tensor | None, spec: str, act: str, n: int, k: int
) -> Tensor:
    """`ops.linear`, or its kernel itself where nothing else must see the call."""
    run = ops.linear if _is_watched(x, bias) else ops.linear_unwatched
    return run(x, planes, bias, act_scale, spec, act, n, k)


def _linear(x: Tensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
    fmt = w.format
    planes = [getattr(w, name) for name in fmt.plane_names]
    return linear(x, planes, bias, w.act_scale, fmt.spec, w.act_spec, w.out_features, w.in_features)


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


@implements(F.linear)
def _f_linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    _refuse(weight, "linear", "the weight is the quantized operand")
    _refuse_transposed(weight, "linear")
    return _linear(input, weight, bias)


@implements(F.embedding)
def _f_embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    _refuse(weight, "embedding", "the table is the quantized operand")
    if max_norm is not None:
        raise NotImplementedError("embedding: max_norm would rewrite a quantized table" + see("op-not-defined"))
    return _embedding(weight, input)


@implements(F.conv2d)
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


@implements(Tensor.share_memory_)
def _f_share_memory_(w: QuantizedTensor) -> QuantizedTensor:
    """Without this, torch would share the storage of the wrapper, which has none."""
    for t in w.planes.values():
        t.share_memory_()
    return w


@implements(Tensor.is_shared)
def _f_is_shared(w: QuantizedTensor) -> bool:
    return all(t.is_shared() for t in w.planes.values())


# aten ops: what DTensor, FSDP, copies and moves arrive as ----------------------------------------


@implements(aten.linear.default)
def _a_linear(func: Any, x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor:
    _refuse(w, "linear", "the weight is the quantized operand")
    _refuse_transposed(w, "linear")
    return _linear(x, w, bias)


@implements(aten.mm.default)
def _a_mm(func: Any, a: Any, b: Any) -> Tensor:
    """`x @ W.t()` is a linear; `grad @ W` is its gradient."""
    _refuse(b, "mm", "only the second operand may be quantized")
    if b.transposed:
        return _linear(a, b, None)
    return ops.linear_dgrad(a, list(b.planes.values()), b.format.spec, b.out_features, b.in_features)


@implements(aten.addmm.default)
def _a_addmm(func: Any, bias: Tensor, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _refuse(b, "addmm", "only the second operand may be quantized")
    if beta == 1 and alpha == 1 and b.transposed and bias.dim() == 1:
        return _linear(a, b, bias)
    return bias * beta + _a_mm(func, a, b) * alpha


@implements(aten.embedding.default)
def _a_embedding(
    func: Any, w: Any, ids: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    return _embedding(w, ids)


@implements(aten.t.default)
def _a_t(func: Any, w: QuantizedTensor) -> QuantizedTensor:
    shape = (w.shape[1], w.shape[0]) if w.transposed else w.shape
    return w.with_planes(w.planes, shape, transposed=not w.transposed)


@implements(aten.transpose.int)
def _a_transpose(func: Any, w: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    if w.dim() != 2:
        raise NotImplementedError(f"transpose of {w!r}: only 2-D weights have one" + see("op-not-defined"))
    return w if dim0 % 2 == dim1 % 2 else _a_t(func, w)


@implements(aten.permute.default)
def _a_permute(func: Any, w: QuantizedTensor, dims: list[int]) -> QuantizedTensor:
    order = [d % w.dim() for d in dims]
    if order == list(range(w.dim())):
        return w.with_planes(w.planes)
    return _a_transpose(func, w, 0, 1)


@implements(aten.detach.default, aten.alias.default)
def _a_detach(func: Any, w: QuantizedTensor) -> Any:
    return return_and_correct_aliasing(func, (w,), {}, w.map_planes(func))


@implements(aten.clone.default)
def _a_clone(func: Any, w: QuantizedTensor, **kwargs: Any) -> Any:
    return return_and_correct_aliasing(func, (w,), kwargs, w.map_planes(torch.clone))


@implements(aten.contiguous.default)
def _a_contiguous(func: Any, w: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    return w.map_planes(lambda t: t.contiguous())


@implements(aten._to_copy.default)
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


@implements(aten.copy_.default)
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


@implements(aten.slice.Tensor)
def _a_slice(
    func: Any, w: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    dim %= w.dim()
    if step != 1:
        raise ValueError(f"cannot slice {w!r} with step {step}, only 1" + see("cut-inside-tile"))
    start, stop, _ = slice(start, end).indices(w.shape[dim])
    return return_and_correct_aliasing(func, (w, dim, start, stop), {}, _cut(w, dim, start, max(start, stop)))


@implements(aten.split.Tensor)
def _a_split(func: Any, w: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    total = w.shape[dim % w.dim()]
    return [_cut(w, dim % w.dim(), i, min(i + size, total)) for i in range(0, total, size)]


@implements(aten.split_with_sizes.default)
def _a_split_with_sizes(func: Any, w: QuantizedTensor, sizes: list[int], dim: int = 0) -> list[QuantizedTensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_cut(w, dim % w.dim(), end - size, end) for size, end in zip(sizes, ends, strict=True)]


@implements(aten.new_zeros.default, aten.new_empty.default, aten.empty_like.default, aten.zeros_like.default)
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


@implements(aten.view.default, aten._unsafe_view.default, aten.as_strided.default)
def _a_view(func: Any, w: QuantizedTensor, size: Any, *args: Any) -> QuantizedTensor:
    """The identity view only, and FSDP2's flattening of a shard, which it never reads (it gathers planes)."""
    if tuple(size) in (tuple(w.shape), (-1,)):
        return w.with_planes(w.planes)
    raise ValueError(
        f"cannot view {w!r} as {tuple(size)}: packed weights have one shape" + see("view-of-packed-weight")
    )


@implements(aten.is_pinned.default)
def _a_is_pinned(func: Any, w: QuantizedTensor, device: Any = None) -> bool:
    return all(t.is_pinned() for t in w.planes.values())


@implements(aten._pin_memory.default)
def _a_pin_memory(func: Any, w: QuantizedTensor, device: Any = None) -> QuantizedTensor:
    return w.map_planes(lambda t: t.pin_memory())


@implements(aten.record_stream.default)
def _a_record_stream(func: Any, w: QuantizedTensor, stream: Any) -> None:
    for t in w.planes.values():
        t.record_stream(stream)


@implements(aten.equal.default)
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
