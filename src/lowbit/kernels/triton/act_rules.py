"""How activations find their scales and round, as constants and functions of kernels.

Every step is the definition's own arithmetic in fp32 (correctly rounded division, round to nearest even, clamp before
rounding), so the results are equal to the bit. Small floats are rounded with integer and fp32 arithmetic rather than
conversion instructions: that works for every width, on every GPU, and in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from lowbit.formats.base import LARGEST_WEIGHT, MIN_SCALE, Format
from lowbit.formats.elements import FloatElement, IntElement
from lowbit.formats.fp8 import Float8Format
from lowbit.formats.int import IntFormat
from lowbit.formats.mx import MXFormat
from lowbit.formats.nvfp4 import NVFP4Format

GROUP_MOST = 2048  # weights of a group that one block holds
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
    if fmt.scale_planes[0].n not in (None, 1) or group & (group - 1) or not 0 <= group <= GROUP_MOST:
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
def round_even(x):
    """Nearest integer, ties to even, for |x| below 2**22; NaN stays NaN."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_float(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """fp32 within a small float's range to the nearest one: a multiple of 2**(exponent - MANTISSA), ties to even."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.minimum(tl.maximum(exponent, LOWEST), 64)
    up = ((MANTISSA - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    rounded = (round_even(x * up) * down).to(tl.int32, bitcast=True)
    # A negative number that rounds to zero keeps its sign, which is a bit of the code.
    return (rounded | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def level(x, R: tl.constexpr):
    """Scaled fp32 values to the nearest level."""
    # Comparisons with NaN are false, so NaN passes the clamp.
    x = tl.where(x < R.low, R.low, x)
    x = tl.where(x > R.high, R.high, x)
    if R.is_float:
        return round_float(x, R.mantissa_bits, R.lowest_exponent)
    else:
        return round_even(x)


@triton.jit
def safe(scale, R: tl.constexpr):
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
def magnitude(x):
    """|x| as int32 bits: ordered like the numbers, with Inf and then NaN on top, so that a maximum keeps them."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def bounded_bits(bits):
    """Bits of a magnitude, those of finite numbers at most LARGEST_WEIGHT = 2**126 (`formats.base.bounded`)."""
    return tl.where(bits < 0x7F800000, tl.minimum(bits, 0x7E800000), bits)


@triton.jit
def row_scale(v, R: tl.constexpr):
    """Scale and zero point of a whole row `v (BLOCK,)` fp32, padded with zeros: `Format.choose_params`."""
    amax = tl.max(magnitude(v), axis=0)
    if R.scaling == "range":
        bottom = tl.maximum(tl.minimum(tl.min(v, axis=0), 0.0), -LARGEST)
        top = tl.minimum(tl.maximum(tl.max(v, axis=0), 0.0), LARGEST)
        wide = tl.div_rn(top, R.top) - tl.div_rn(bottom, R.top)
        # Minimum and maximum lose NaN, and the bound loses Inf: the largest magnitude kept them.
        scale = safe(tl.where(amax < 0x7F800000, wide, amax.to(tl.float32, bitcast=True)), R)
        zero_point = round_even(tl.minimum(tl.maximum(tl.div_rn(-bottom, scale), 0.0), R.high))
        return scale, zero_point
    else:
        return safe(tl.div_rn(bounded_bits(amax).to(tl.float32, bitcast=True), R.top), R), 0.0


@triton.jit
def divided(v, by, FMA: tl.constexpr):
    """`v / by` for one divisor, correctly rounded where `|v / by|` is between 2**-18 and 2**16, and below as near to 0.

    With fused multiply-adds a division is five instructions once the divisor's reciprocal r is known, instead of a
    dozen: a quotient corrected by its remainder is within one unit in the last place, and one that is, corrected once
    more with a correctly rounded r, is correctly rounded (Markstein, "Computation of elementary functions on the IBM
    RISC System/6000 processor", 1990). Remainders must not underflow: other divisors, Inf and NaN among them, are left
    to the instruction.
    """
    if FMA:
        if (by > 8.271806125530277e-25) & (by < 1.2379400392853803e27):  # 2**-80 and 2**90
            r = tl.div_rn(1.0, by)
            q = v * r
            q = tl.fma(tl.fma(-q, by, v), r, q)
            q = tl.fma(tl.fma(-q, by, v), r, q)
        else:
            q = tl.div_rn(v, by)
        return q
    else:
        return tl.div_rn(v, by)


@triton.jit
def int8_of(x):
    """Integers within int8 as int8: the lowest byte of the sum of `round_even`. A conversion is four times as slow."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def row_level(v, scale, zero_point, R: tl.constexpr, FMA: tl.constexpr, ROUND: tl.constexpr):
    """Level - zero point of fp32 `v` under one scale; unrounded without `ROUND`, for a conversion that rounds."""
    q = divided(v, scale, FMA)
    if R.scaling == "range":
        # Rounded, moved, clamped: in this order, as in the definition. 2**21 is beyond every code.
        q = round_even(tl.minimum(tl.maximum(q, -2097152.0), 2097152.0)) + zero_point
        return level(q, R) - zero_point
    elif ROUND:
        return level(q, R)
    else:
        return q


@triton.jit
def group_scales(v, outer, R: tl.constexpr):
    """Of groups `v (G, group)` fp32: what they are divided by, and the same without the scale of the whole tensor."""
    bits = bounded_bits(tl.max(magnitude(v), axis=1))
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
        return inner, inner
    elif R.scaling == "nvfp4":
        inner = tl.div_rn(tl.div_rn(amax, R.top), outer)
        inner = tl.where(inner < 0.001953125, 0.001953125, inner)
        inner = round_float(tl.where(inner > 448.0, 448.0, inner), 3, -6)
        inner = tl.where(amax == 0, 1.0, inner)
        return inner * outer, inner
    else:
        scale = safe(tl.div_rn(amax, R.top), R)
        return scale, scale
