"""The torch.library ops: the one place where a format meets a kernel.

Each op takes plain tensors (the planes of a weight, in the format's order) and the format's spec, flattens the
leading dimensions, lets `select` choose the kernel for this M and runs it. The choice is made inside the op, so
`torch.compile` sees one opaque node and never recompiles for M. `Library.define` and `impl` are used because they
cost a tenth of `torch.library.custom_op` per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.activation import parse_activation
from lowbit.formats.base import Planes, parse_format
from lowbit.kernels import convolution
from lowbit.kernels.convolution import Convolution
from lowbit.kernels.problem import Operand, Problem, arch_of
from lowbit.kernels.select import planned, select, select_gradient

_LIB = torch.library.Library("lowbit", "DEF")
_LIB.define(
    "linear(Tensor x, Tensor[] planes, Tensor? bias, Tensor? act_scale, str format, str act, SymInt n, SymInt k)"
    " -> Tensor"
)
_LIB.define(
    "linear_silu_mul(Tensor x, Tensor[] planes, Tensor? bias, Tensor? act_scale, str format, str act, SymInt n,"
    " SymInt k) -> Tensor"
)
_LIB.define(
    "linear_of_operand(Tensor operand, Tensor row_scale, Tensor[] planes, Tensor? bias, str format, str act, SymInt n,"
    " SymInt k, ScalarType dtype, bool gated) -> Tensor"
)
_LIB.define("linear_dgrad(Tensor grad, Tensor[] planes, str format, SymInt n, SymInt k) -> Tensor")
_LIB.define("embedding(Tensor ids, Tensor[] planes, str format, SymInt n, SymInt k, ScalarType dtype) -> Tensor")
_LIB.define(
    "conv2d(Tensor x, Tensor[] planes, Tensor? bias, str format, SymInt[] weight_shape, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor"
)
_LIB.define(
    "conv2d_dgrad(Tensor grad, Tensor[] planes, SymInt[] input_shape, str format, SymInt[] weight_shape,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor"
)
_LIB.define("quantize_act(Tensor x, Tensor? act_scale, str act) -> Tensor[]")
_LIB.define("dequantize(Tensor[] planes, str format, SymInt n, SymInt k, ScalarType dtype) -> Tensor")

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem_of(x: Tensor, m: int, n: int, k: int, spec: str, act: str) -> Problem:
    """The `Problem` that a call of `linear` poses."""
    return Problem(m, n, k, spec, act, x.dtype, x.device.type, arch_of(x.device))


def _check_input(x: Tensor, planes: Sequence[Tensor], bias: Tensor | None, spec: str, n: int, k: int) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"lowbit.linear ({spec}): the input must be bf16, fp16 or fp32, got {x.dtype}" + see("input-mismatch")
        )
    _check_sizes(x, planes, bias, spec, n, k)


def _check_sizes(x: Tensor, planes: Sequence[Tensor], bias: Tensor | None, spec: str, n: int, k: int) -> None:
    shape, device = x.shape, x.device
    if not shape or shape[-1] != k:
        raise ValueError(
            f"lowbit.linear ({spec}): the input's last size must be K = {k}, got {tuple(shape)}" + see("input-mismatch")
        )
    if device != planes[0].device:
        raise ValueError(
            f"lowbit.linear ({spec}): input on {device}, weight on {planes[0].device}" + see("input-mismatch")
        )
    if bias is not None and (bias.shape != (n,) or bias.device != device):
        got = f"{tuple(bias.shape)} on {bias.device}"
        raise ValueError(
            f"lowbit.linear ({spec}): the bias must be ({n},) on {device}, got {got}" + see("input-mismatch")
        )


def _linear(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, act_scale: Tensor | None, spec: str, act: str, n: int, k: int
) -> Tensor:
    return _run_linear(x, planes, bias, act_scale, spec, act, n, k, gated=False)


def _linear_silu_mul(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, act_scale: Tensor | None, spec: str, act: str, n: int, k: int
) -> Tensor:
    """`silu(gate) * up`, `(..., N / 2)`: a linear layer whose first N / 2 outputs are the gate of the others."""
    return _run_linear(x, planes, bias, act_scale, spec, act, n, k, gated=True)


def _run_linear(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, act_scale: Tensor | None, spec: str, act: str, n: int, k: int,
    gated: bool,
) -> Tensor:  # fmt: skip
    _check_input(x, planes, bias, spec, n, k)
    width = _width(n, gated)
    lead = x.shape[:-1]
    m = math.prod(lead)
    if m == 0 or n == 0:
        return x.new_empty(*lead, width)
    if x.is_cuda and not gated and x.is_contiguous():
        # Most calls, and little beside what differs between them.
        launch = planned(m, n, k, spec, act, x.dtype, x.device)
        if launch is not None:
            y = torch.empty(*lead, n, dtype=x.dtype, device=x.device)
            launch(x, y, planes, bias, act_scale if act else None)
            return y
    problem = problem_of(x, m, n, k, spec, act)
    x2d = x.reshape(m, k)
    if x2d.stride() != (k, 1):
        x2d = x2d.contiguous()
    named = dict(zip(parse_format(spec).plane_names, planes, strict=True))
    return _multiplied(x2d, named, bias, problem, act_scale, gated).view(*lead, width)


def _multiplied(
    x: Tensor | Operand, named: Planes, bias: Tensor | None, problem: Problem, act_scale: Tensor | None, gated: bool
) -> Tensor:
    """`(M, N)`, or `(M, N / 2)`, by the kernel that is chosen for the problem."""
    kernel = select(problem).kernel
    fused = kernel.silu_mul_function if gated else None
    y = (fused or kernel.function)(x, named, bias, problem, act_scale)
    if gated and fused is None:
        gate, up = (y if y.dtype == torch.float64 else y.float()).chunk(2, dim=-1)
        y = (F.silu(gate) * up).to(y.dtype)
    return y


def _width(n: int, gated: bool) -> int:
    if gated and n % 2:
        raise ValueError(f"lowbit.linear_silu_mul: {n} outputs are no gate and as many others" + see("input-mismatch"))
    return n // 2 if gated else n


def fuses_silu_mul(problem: Problem) -> bool:
    """Whether `linear_silu_mul` is one kernel for a problem, rather than a linear layer and what follows."""
    return problem.m > 0 and select(problem).kernel.silu_mul is not None


def operand_dtype(problem: Problem) -> torch.dtype | None:
    """What `linear_of_operand` wants for a problem: bf16 for levels, or the dtype of the activation's codes.

    None where a layer takes `x` alone: activations that are not quantized, that need a scale of the whole input first,
    or have scales along K that a kernel of levels would multiply into them.
    """
    act = problem.activation
    if act is None or problem.m == 0 or problem.n == 0:
        return None
    if not act.static and any(p.n is None for p in act.format.scale_planes):
        return None
    operand = select(problem).kernel.operand
    if operand == "codes":
        return act.format.planes[0].dtype
    return torch.bfloat16 if operand == "levels" and not act.grouped else None


def _linear_of_operand(
    operand: Tensor, row_scale: Tensor, planes: list[Tensor], bias: Tensor | None, spec: str, act: str, n: int, k: int,
    dtype: torch.dtype, gated: bool,
) -> Tensor:  # fmt: skip
    """A linear layer `(..., N)` in `dtype` of an activation that is quantized already, or its `silu(gate) * up`.

    Args:
        operand: `(..., K)` in what `operand_dtype` says.
        row_scale: fp32 `(M or 1, 1)`, or `(M, ceil(K / group))`; the activation is `operand * row_scale`.
    """
    fmt, lead = parse_format(spec), operand.shape[:-1]
    _check_sizes(operand, planes, bias, spec, n, k)
    m, width = math.prod(lead), _width(n, gated)
    if m == 0 or n == 0:
        return operand.new_empty(*lead, width, dtype=dtype)
    problem = Problem(m, n, k, spec, act, dtype, operand.device.type, arch_of(operand.device))
    wanted, activation = operand_dtype(problem), problem.activation
    shapes = [(m, 1), (1, 1)] if activation is None else activation.row_scale_shapes(m, k)
    if operand.dtype != wanted or row_scale.shape not in shapes:
        takes = f"{wanted or 'no quantized activation'} and row scales {' or '.join(map(str, shapes))}"
        raise ValueError(
            f"lowbit.linear_of_operand ({spec}, activation {act or 'none'}): {select(problem).kernel.name} takes "
            f"{takes}, got {operand.dtype} and {tuple(row_scale.shape)}; ask operand_dtype, or call linear"
            + see("input-mismatch")
        )
    x = Operand(operand.reshape(m, k).contiguous(), row_scale)
    named = dict(zip(fmt.plane_names, planes, strict=True))
    return _multiplied(x, named, bias, problem, None, gated).view(*lead, width)


def _linear_of_operand_fake(
    operand: Tensor, row_scale: Tensor, planes: list[Tensor], bias: Tensor | None, spec: str, act: str, n: int, k: int,
    dtype: torch.dtype, gated: bool,
) -> Tensor:  # fmt: skip
    _check_sizes(operand, planes, bias, spec, n, k)
    return operand.new_empty(*operand.shape[:-1], _width(n, gated), dtype=dtype)


def _linear_fake(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, act_scale: Tensor | None, spec: str, act: str, n: int, k: int
) -> Tensor:
    _check_input(x, planes, bias, spec, n, k)
    return x.new_empty(*x.shape[:-1], n)


def _linear_silu_mul_fake(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, act_scale: Tensor | None, spec: str, act: str, n: int, k: int
) -> Tensor:
    _check_input(x, planes, bias, spec, n, k)
    return x.new_empty(*x.shape[:-1], _width(n, gated=True))


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, planes, bias, _, spec, _, n, k = inputs
    ctx.save_for_backward(*planes)
    ctx.lowbit = (spec, n, k, bias is not None)


def _linear_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """Gradient of the input as if activations were not rounded (straight-through); packed weights have none."""
    spec, n, k, has_bias = ctx.lowbit
    needs = ctx.needs_input_grad
    dx = torch.ops.lowbit.linear_dgrad(grad, list(ctx.saved_tensors), spec, n, k) if needs[0] else None
    dbias = grad.reshape(-1, n).sum(0) if has_bias and needs[2] else None
    return dx, [None] * len(ctx.saved_tensors), dbias, None, None, None, None, None


def _linear_dgrad(grad: Tensor, planes: list[Tensor], spec: str, n: int, k: int) -> Tensor:
    fmt = parse_format(spec)
    flat = grad.reshape(-1, n)
    named = dict(zip(fmt.plane_names, planes, strict=True))
    kernel = select_gradient(problem_of(flat, flat.shape[0], n, k, spec, ""))
    return kernel.function(flat, named, fmt, n, k).view(*grad.shape[:-1], k)


def _linear_dgrad_fake(grad: Tensor, planes: list[Tensor], spec: str, n: int, k: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], k)


def _embedding(ids: Tensor, planes: list[Tensor], spec: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of the table `(n, k)`: the rows' planes are gathered, then dequantized."""
    fmt = parse_format(spec)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"lowbit.embedding ({spec}): ids must be int32 or int64, got {ids.dtype}" + see("input-mismatch")
        )
    flat = ids.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < n:
        # On a GPU the gather below checks it without a synchronization.
        raise IndexError(
            f"lowbit.embedding ({spec}): the table has {n} rows, ids go from {flat.min()} to {flat.max()}"
            + see("id-out-of-range")
        )
    rows = {}
    for p, t in zip(fmt.planes, planes, strict=True):
        if p.shape is None and p.n is not None:
            index = flat if p.n == 1 else flat // p.n
            # index_select has no float8 kernels; the bytes are what moves.
            t = t.view(torch.uint8).index_select(0, index).view(t.dtype) if t.dtype.itemsize == 1 else t[index]
        rows[p.name] = t
    return fmt.dequantize(rows, flat.numel(), k, dtype).view(*ids.shape, k)


def _embedding_fake(ids: Tensor, planes: list[Tensor], spec: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, k, dtype=dtype)


def _convolution(
    x: Tensor, spec: str, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Convolution:  # fmt: skip
    conv = Convolution(tuple(weight_shape), stride, padding, dilation, groups)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"lowbit.conv2d ({spec}): the input must be bf16, fp16 or fp32, got {x.dtype}" + see("input-mismatch")
        )
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(
            f"lowbit.conv2d ({spec}): {weight_shape[0]} output channels do not make {groups} groups"
            + see("input-mismatch")
        )
    if x.shape[1] != conv.in_channels:
        raise ValueError(
            f"lowbit.conv2d ({spec}): weight {tuple(weight_shape)} with groups = {groups} takes {conv.in_channels} "
            f"input channels, got {x.shape[1]}" + see("input-mismatch")
        )
    return conv


def _conv2d(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, spec: str, weight_shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    conv, fmt = _convolution(x, spec, weight_shape, stride, padding, dilation, groups), parse_format(spec)
    if x.device != planes[0].device:
        raise ValueError(
            f"lowbit.conv2d ({spec}): input on {x.device}, weight on {planes[0].device}" + see("input-mismatch")
        )
    return convolution.conv2d(x, dict(zip(fmt.plane_names, planes, strict=True)), bias, fmt, conv)


def _conv2d_fake(
    x: Tensor, planes: list[Tensor], bias: Tensor | None, spec: str, weight_shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    _convolution(x, spec, weight_shape, stride, padding, dilation, groups)
    w = x.new_empty(weight_shape)
    return torch.conv2d(x, w, None, stride, padding, dilation, groups).contiguous()


def _conv2d_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, planes, bias, *where = inputs
    ctx.save_for_backward(*planes)
    ctx.lowbit = (where, x.shape, bias is not None)


def _conv2d_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    where, input_shape, has_bias = ctx.lowbit
    planes, needs = list(ctx.saved_tensors), ctx.needs_input_grad
    dx = torch.ops.lowbit.conv2d_dgrad(grad, planes, input_shape, *where) if needs[0] else None
    dbias = grad.sum((0, 2, 3)) if has_bias and needs[2] else None
    return dx, [None] * len(planes), dbias, *([None] * len(where))


def _conv2d_dgrad(
    grad: Tensor, planes: list[Tensor], input_shape: list[int], spec: str, weight_shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    fmt, conv = parse_format(spec), Convolution(tuple(weight_shape), stride, padding, dilation, groups)
    named = dict(zip(fmt.plane_names, planes, strict=True))
    return convolution.conv2d_dgrad(grad, named, fmt, conv, input_shape)


def _conv2d_dgrad_fake(
    grad: Tensor, planes: list[Tensor], input_shape: list[int], spec: str, weight_shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty(input_shape)


def _quantize_act(x: Tensor, act_scale: Tensor | None, act: str) -> list[Tensor]:
    activation = parse_activation(act)
    if activation is None:
        raise ValueError("lowbit.quantize_act: the activation spec is empty" + see("bad-option"))
    planes = activation.quantize(x.reshape(-1, x.shape[-1]), act_scale)
    # A static scale comes back as a plane; an op's outputs must not be its inputs.
    return [t.clone() if act_scale is not None and t.numel() == 1 else t for t in planes.values()]


def _quantize_act_fake(x: Tensor, act_scale: Tensor | None, act: str) -> list[Tensor]:
    fmt = parse_format(act.partition("@")[0])
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    return [x.new_empty(p.shape_for(m, k), dtype=p.dtype) for p in fmt.planes]


def _dequantize(planes: list[Tensor], spec: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    fmt = parse_format(spec)
    return fmt.dequantize(dict(zip(fmt.plane_names, planes, strict=True)), n, k, dtype)


def _dequantize_fake(planes: list[Tensor], spec: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return planes[0].new_empty(n, k, dtype=dtype)


for _name, _impl, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_silu_mul", _linear_silu_mul, _linear_silu_mul_fake),
    ("linear_of_operand", _linear_of_operand, _linear_of_operand_fake),
    ("linear_dgrad", _linear_dgrad, _linear_dgrad_fake),
    ("embedding", _embedding, _embedding_fake),
    ("conv2d", _conv2d, _conv2d_fake),
    ("conv2d_dgrad", _conv2d_dgrad, _conv2d_dgrad_fake),
    ("quantize_act", _quantize_act, _quantize_act_fake),
    ("dequantize", _dequantize, _dequantize_fake),
):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_LIB)
torch.library.register_autograd("lowbit::linear", _linear_backward, setup_context=_linear_setup, lib=_LIB)
torch.library.register_autograd("lowbit::conv2d", _conv2d_backward, setup_context=_conv2d_setup, lib=_LIB)

linear: Callable[..., Tensor] = torch.ops.lowbit.linear.default
#: What `linear` runs, for callers who know that nothing else has to see the call.
linear_unwatched: Callable[..., Tensor] = _linear
linear_silu_mul: Callable[..., Tensor] = torch.ops.lowbit.linear_silu_mul.default
linear_of_operand: Callable[..., Tensor] = torch.ops.lowbit.linear_of_operand.default
linear_dgrad: Callable[..., Tensor] = torch.ops.lowbit.linear_dgrad.default
embedding: Callable[..., Tensor] = torch.ops.lowbit.embedding.default
conv2d: Callable[..., Tensor] = torch.ops.lowbit.conv2d.default
conv2d_dgrad: Callable[..., Tensor] = torch.ops.lowbit.conv2d_dgrad.default
quantize_act: Callable[..., list[Tensor]] = torch.ops.lowbit.quantize_act.default
dequantize: Callable[..., Tensor] = torch.ops.lowbit.dequantize.default
