"""Activations to operands in one pass: largest magnitude, scale, rounding, in registers.

What comes out is `Activation.split`: an operand (levels, exact in bf16, or real 8-bit codes) and fp32 row scales.
Every step is the definition's own arithmetic in fp32 (correctly rounded division, round to nearest even, clamp
before rounding), so the results are equal to the bit. Small floats are rounded with integer and fp32 arithmetic
rather than conversion instructions: that works for every width, on every GPU, and in Triton's interpreter.

`rule_of` says which formats these kernels know. Any other format takes `Activation.split`, plain torch operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats.activation import Activation
from lowbit.formats.base import LARGEST_WEIGHT, MIN_SCALE, Format
from lowbit.formats.elements import FloatElement, IntElement
from lowbit.formats.fp8 import E4M3, Float8Format
from lowbit.formats.int import IntFormat
from lowbit.formats.mx import MXFormat
from lowbit.formats.nvfp4 import NVFP4Format
from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import OPTIONS, early_options, on_device

BLOCK = 2048
LARGEST: tl.constexpr = tl.constexpr(LARGEST_WEIGHT)


@dataclass(frozen=True)
class Rule:
    """How an activation finds its scales and rounds, as constants of a kernel."""

    scaling: str  # "amax": amax / top; "range": asymmetric; "mx"; "nvfp4"
    group: int  # weights per scale along K; 0 for a whole row or tensor
    is_float: bool
    low: float  # smallest and largest level
    high: float
    top: float  # what the largest magnitude is divided by
    mantissa_bits: int = 0
    lowest_exponent: int = 0
    scale_dtype: str = "fp32"
    scale_min: float = MIN_SCALE
    scale_max: float = torch.finfo(torch.float32).max
    rceil: bool = False
    max_exponent: int = 0
    max_mantissa: int = 0  # the 23 fraction bits of the largest level


@cache
def rule_of(fmt: Format) -> Rule | None:
    """The rule of a family that the kernels know, else None."""
    e = fmt.element
    group = fmt.scale_planes[0].k or 0
    if fmt.scale_planes[0].n not in (None, 1) or group & (group - 1) or not 0 <= group <= BLOCK:
        return None
    if isinstance(e, FloatElement) and type(fmt) in (Float8Format, NVFP4Format, MXFormat):
        return Rule(
            scaling="mx" if isinstance(fmt, MXFormat) else "nvfp4" if isinstance(fmt, NVFP4Format) else "amax",
            group=group, is_float=True, low=-e.max, high=e.max, top=e.max,
            mantissa_bits=e.mantissa_bits, lowest_exponent=1 - e.bias, max_exponent=e.max_exponent,
            max_mantissa=int((math.frexp(e.max)[0] * 2 - 1) * 2**23),
            rceil=isinstance(fmt, MXFormat) and fmt.scaling == "rceil",
        )  # fmt: skip
    if type(fmt) is IntFormat and isinstance(e, IntElement) and e.bits > 1:
        steps, dtype = (1 << e.bits) - 1, fmt.scale_dtype or torch.float32
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        tiny, huge = max(MIN_SCALE, torch.finfo(dtype).tiny), torch.finfo(dtype).max
        if not fmt.symmetric:
            if group or fmt.scale_planes[0].n is None:
                return None
            return Rule("range", 0, False, 0.0, steps, steps, 0, 0, names[dtype], tiny, huge)
        half = 1 << (e.bits - 1)
        return Rule("amax", group, False, -half, half - 1, steps / 2, 0, 0, names[dtype], tiny, huge)
    return None


@triton.jit
def _round_even(x):
    """Nearest integer, ties to even, for |x| below 2**22; NaN stays NaN."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_float(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """fp32 within a small float's range to the nearest one: a multiple of 2**(exponent - MANTISSA), ties to even."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.minimum(tl.maximum(exponent, LOWEST), 64)
    up = ((MANTISSA - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    rounded = (_round_even(x * up) * down).to(tl.int32, bitcast=True)
    # A negative number that rounds to zero keeps its sign, which is a bit of the code.
    return (rounded | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _level(x, R: tl.constexpr):
    """Scaled fp32 values to the nearest level."""
    # Comparisons with NaN are false, so NaN passes the clamp.
    x = tl.where(x < R.low, R.low, x)
    x = tl.where(x > R.high, R.high, x)
    if R.is_float:
        return _round_float(x, R.mantissa_bits, R.lowest_exponent)
    else:
        return _round_even(x)


@triton.jit
def _safe(scale, R: tl.constexpr):
    """`formats.base.safe_scale` followed by the rounding to the stored dtype."""
    kept = tl.where(scale < R.scale_min, R.scale_min, scale)
    kept = tl.where(kept > R.scale_max, R.scale_max, kept)
    kept = tl.where(scale == float("inf"), scale, kept)
    kept = tl.where(scale == 0, 1.0, kept)
    if R.scale_dtype == "bf16":
        return kept.to(tl.bfloat16).to(tl.float32)
    elif R.scale_dtype == "fp16":
        return kept.to(tl.float16).to(tl.float32)
    else:
        return kept


@triton.jit
def _magnitude(x):
    """|x| as int32 bits: ordered like the numbers, with Inf and then NaN on top, so that a maximum keeps them."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _bounded(bits):
    """Bits of a magnitude, those of finite numbers at most LARGEST_WEIGHT = 2**126 (`formats.base.bounded`)."""
    return tl.where(bits < 0x7F800000, tl.minimum(bits, 0x7E800000), bits)


@triton.jit
def row_amax_kernel(x, amax, M, K, BLOCK: tl.constexpr):
    """fp32 largest magnitude of each row `(M,)`. Grid `(M,)`."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.zeros((BLOCK,), dtype=tl.int32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        best = tl.maximum(best, _magnitude(tl.load(x + row * K + k, mask=k < K, other=0.0)))
    tl.store(amax + row, _bounded(tl.max(best, axis=0)).to(tl.float32, bitcast=True))


@triton.jit
def tensor_scale_kernel(amax, scale, M, TOP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """The scale of a tensor from its rows' largest magnitudes `(M,)`, by one program."""
    best = tl.zeros((BLOCK,), dtype=tl.int32)
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        best = tl.maximum(best, _magnitude(tl.load(amax + m, mask=m < M, other=0.0)))
    tl.store(scale, _safe(tl.div_rn(tl.max(best, axis=0).to(tl.float32, bitcast=True), TOP), R))


@triton.jit
def quantize_rows_kernel(
    x, operand, scales, static_scale, M, K, R: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One scale per row, or the given one. Grid `(M,)`; the second pass over a row reads it from the cache."""
    let_the_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    wait_for_the_kernel_before(EARLY)
    zero_point = 0.0
    if STATIC:
        scale = tl.load(static_scale).to(tl.float32)
    elif R.scaling == "range":
        low = tl.zeros((BLOCK,), dtype=tl.float32)
        high = tl.zeros((BLOCK,), dtype=tl.float32)
        best = tl.zeros((BLOCK,), dtype=tl.int32)
        for k0 in range(0, K, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
            low = tl.minimum(low, v)
            high = tl.maximum(high, v)
            best = tl.maximum(best, _magnitude(v))
        bottom = tl.maximum(tl.min(low, axis=0), -LARGEST)
        top = tl.minimum(tl.max(high, axis=0), LARGEST)
        wide = tl.div_rn(top, R.top) - tl.div_rn(bottom, R.top)
        # Minimum and maximum lose NaN, and the bound loses Inf: the largest magnitude kept them.
        amax = tl.max(best, axis=0)
        scale = _safe(tl.where(amax < 0x7F800000, wide, amax.to(tl.float32, bitcast=True)), R)
        zero_point = _round_even(tl.minimum(tl.maximum(tl.div_rn(-bottom, scale), 0.0), R.high))
    else:
        best = tl.zeros((BLOCK,), dtype=tl.int32)
        for k0 in range(0, K, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            best = tl.maximum(best, _magnitude(tl.load(x + row * K + k, mask=k < K, other=0.0)))
        scale = _safe(tl.div_rn(_bounded(tl.max(best, axis=0)).to(tl.float32, bitcast=True), R.top), R)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        q = tl.div_rn(v, scale)
        if R.scaling == "range":
            # Rounded, moved, clamped: in this order, as in the definition. 2**21 is beyond every code.
            q = _round_even(tl.minimum(tl.maximum(q, -2097152.0), 2097152.0)) + zero_point
            q = _level(q, R) - zero_point
        else:
            q = _level(q, R)
        tl.store(operand + row * K + k, q.to(operand.dtype.element_ty), mask=k < K)
    if not STATIC:
        tl.store(scales + row, scale)


@triton.jit
def quantize_groups_kernel(
    x, operand, scales, static_scale, M, K, groups, R: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr
):
    """One scale per group along K. Grid `(M, ceil(K/BLOCK))`.

    With `FOLD` the scales are multiplied into the operand, otherwise stored, `(M, groups)`.
    """
    G: tl.constexpr = BLOCK // R.group
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * G + tl.arange(0, G)
    k = group[:, None] * R.group + tl.arange(0, R.group)[None, :]
    v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    bits = _bounded(tl.max(_magnitude(v), axis=1))
    amax = bits.to(tl.float32, bitcast=True)
    if R.scaling == "mx":
        exponent = (bits >> 23) - R.max_exponent
        if R.rceil:
            # One more where the mantissa is above that of the largest level: there the next power is needed.
            exponent += ((bits & 0x7FFFFF) > R.max_mantissa).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, 0), 254)
        exponent = tl.where(bits == 0, 127, exponent)
        scale_bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        inner = tl.where(bits >= 0x7F800000, 0x7FC00000, scale_bits).to(tl.float32, bitcast=True)
        scale = inner
    elif R.scaling == "nvfp4":
        outer = tl.load(static_scale).to(tl.float32)
        inner = tl.div_rn(tl.div_rn(amax, R.top), outer)
        inner = tl.where(inner < 0.001953125, 0.001953125, inner)
        inner = _round_float(tl.where(inner > 448.0, 448.0, inner), 3, -6)
        inner = tl.where(amax == 0, 1.0, inner)
        scale = inner * outer
    else:
        scale = _safe(tl.div_rn(amax, R.top), R)
        inner = scale
    q = _level(tl.div_rn(v, tl.broadcast_to(scale[:, None], (G, R.group))), R)
    if FOLD:
        q *= inner[:, None]
    else:
        tl.store(scales + row * groups + group, scale, mask=group < groups)
    tl.store(operand + row * K + k, q.to(operand.dtype.element_ty), mask=k < K)


def _row_block(k: int) -> int:
    return min(BLOCK, max(16, 1 << (k - 1).bit_length()))


def _tensor_scale(x: Tensor, rule: Rule) -> Tensor:
    """fp32 `(1, 1)`: the scale of the whole tensor, or NVFP4's outer scale."""
    m, k = x.shape
    top = rule.top * E4M3.max if rule.scaling == "nvfp4" else rule.top
    amax = torch.empty(m, dtype=torch.float32, device=x.device)
    scale = torch.empty(1, 1, dtype=torch.float32, device=x.device)
    with on_device(x):
        row_amax_kernel[(m,)](x, amax, m, k, BLOCK=_row_block(k), num_warps=4, **OPTIONS)
        tensor_scale_kernel[(1,)](amax, scale, m, TOP=top, R=rule, BLOCK=_row_block(m), num_warps=4, **OPTIONS)
    return scale


def quantize(
    x: Tensor, act: Activation, static_scale: Tensor | None, dtype: torch.dtype, fold: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Operand `(M, K)` in `dtype` and fp32 row scales, or None if the format is none of those the kernels know.

    Args:
        x: contiguous, bf16, fp16 or fp32, `M, K >= 1`.
        dtype: bf16 (levels), or the dtype of 8-bit codes without a zero point. fp32 also holds every level.
        fold: multiply grouped scales into the operand, which rounds it to `dtype`. Those of MX and NVFP4 always are:
            the operand stays exact.

    Returns:
        Scales `(M, 1)`, `(1, 1)` for one scale per tensor, or `(M, ceil(K / group))`.
    """
    rule = rule_of(act.format)
    if rule is None:
        return None
    m, k = x.shape
    operand = torch.empty(m, k, dtype=dtype, device=x.device)
    if rule.group:
        outer = static_scale
        if rule.scaling == "nvfp4" and outer is None:
            outer = _tensor_scale(x, rule)
        groups = -(-k // rule.group)
        folded = fold or rule.scaling in ("mx", "nvfp4")
        scales = operand if folded else torch.empty(m, groups, dtype=torch.float32, device=x.device)
        block = max(rule.group, min(1024, _row_block(k)))
        with on_device(x):
            quantize_groups_kernel[(m, -(-k // block))](
                x, operand, scales, x if outer is None else outer, m, k, groups, R=rule, FOLD=folded, BLOCK=block,
                num_warps=4, **OPTIONS,
            )  # fmt: skip
        if not folded:
            return operand, scales
        return operand, torch.ones(1, 1, dtype=torch.float32, device=x.device) if outer is None else outer.view(1, 1)
    per_tensor = act.format.scale_planes[0].n is None
    if per_tensor and static_scale is None:
        static_scale = _tensor_scale(x, rule)
    scales = (
        torch.empty(m, 1, dtype=torch.float32, device=x.device) if static_scale is None else static_scale.view(1, 1)
    )
    with on_device(x):
        quantize_rows_kernel[(m,)](
            x, operand, scales, scales, m, k, R=rule, STATIC=static_scale is not None, BLOCK=_row_block(k),
            num_warps=4 if k <= 4096 else 8, **early_options(x.device), **OPTIONS,
        )  # fmt: skip
    return operand, scales


def split(x: Tensor, act: Activation, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`Activation.split` on a GPU: a bf16 operand and row scales."""
    if act.static and static_scale is None:
        return act.split(x, static_scale)  # raises the error that says what is missing
    found = quantize(x, act, static_scale if act.static else None, torch.bfloat16)
    return act.split(x, static_scale) if found is None else found


def dequantized(x: Tensor, act: Activation, static_scale: Tensor | None) -> Tensor:
    """A grouped activation `(M, K)` rounded to its format and back, in the dtype of `x`."""
    found = quantize(x, act, static_scale if act.static else None, x.dtype, fold=True)
    if found is not None:
        return found[0]
    m, k = x.shape
    return act.format.dequantize(act.quantize(x, static_scale), m, k, x.dtype)


def codes(x: Tensor, act: Activation, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whole 8-bit codes `(M, K)` in the dtype of their plane, and fp32 scales `(M or 1, 1)`.

    For activations without zero points and with one level of scales.
    """
    if act.static and static_scale is None:
        act.quantize(x)  # raises the error that says what is missing
    found = quantize(x, act, static_scale if act.static else None, act.format.planes[0].dtype)
    if found is None:
        planes = act.quantize(x, static_scale)
        found = planes["qdata"], planes["scale"].float()
    return found
