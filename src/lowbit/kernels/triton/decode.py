"""Tiles of packed codes to numbers, for every format: the only place where a Triton kernel learns what bits mean.

A `Layout` is a format's declarations as compile-time constants; `weight_args` are its planes as kernel arguments.
`levels` loads a tile `(BN, BK)` of codes and gives `level - zero_point`, `scales` gives what it is multiplied with.
Both are fp32, so their product is `Format.dequantize` to the bit. No format is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.elements import FloatElement, IntElement, TableElement

MAX_PLANES = 3
_SCALE_PLANES = ("scale", "zero_point", "outer_scale", "scale_offset")


@dataclass(frozen=True)
class Tiles:
    """One plane beside the codes: how it stores numbers and how many weights `(n, k)` one of them covers; 0: all."""

    kind: str  # "number" (converts to fp32), "narrow" (every value fits bf16), "e8m0", "e4m3"; "" for none
    n: int = 0
    k: int = 0


@dataclass(frozen=True)
class Layout:
    """A format as constants of a kernel. Equal layouts share compiled kernels."""

    kind: str  # "int", "float", "table"
    bits: int
    w0: int  # widths of the code planes, low bits first; 0 for none
    w1: int
    w2: int
    vector: int
    step: int  # int: level = (code ^ flip) * step - offset
    offset: int
    flip: int
    mantissa_bits: int  # float: sign, exponent, mantissa
    bias: int
    has_nan: bool  # the largest magnitude is NaN (E4M3)
    scale: Tiles
    zero: Tiles
    outer: Tiles
    shift: Tiles

    @property
    def parts(self) -> int:
        """Weights that one byte of codes stands for, or 0 if codes are spread over several planes."""
        return 0 if self.w1 else self.vector * 8 // self.w0

    def scale_fits(self, step: int) -> bool:
        """Whether each row has one scale for `step` consecutive weights along K."""
        return all(t.k % step == 0 for t in (self.scale, self.outer, self.shift))

    @property
    def scale_is_constant_along_k(self) -> bool:
        return all(t.k == 0 for t in (self.scale, self.outer, self.shift))


def _tiles(fmt: Format, name: str) -> Tiles:
    if not fmt.has(name):
        return Tiles("")
    plane = fmt.plane(name)
    kinds = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
    kinds |= dict.fromkeys((torch.bfloat16, torch.int8, torch.uint8), "narrow")
    return Tiles(kinds.get(plane.dtype, "number"), plane.n or 0, plane.k or 0)


@cache
def layout_of(fmt: Format) -> Layout:
    """The layout of `fmt`, from its declarations alone."""
    e = fmt.element
    widths = [width for _, width, _ in e.code_planes]
    assert len(widths) <= MAX_PLANES, f"{fmt.spec}: {len(widths)} code planes"
    w0, w1, w2 = widths + [0] * (MAX_PLANES - len(widths))
    constants: dict[str, Any] = {"step": 1, "offset": 0, "flip": 0, "mantissa_bits": 0, "bias": 0, "has_nan": False}
    if isinstance(e, IntElement):
        two_complement = e.bits == 8 and e.native_dtype == torch.int8
        # Flipping the sign bit turns two's complement into offset binary.
        constants |= {"kind": "int", "step": e.step, "offset": 128 if two_complement else e.offset}
        constants |= {"flip": 128 if two_complement else 0}
    elif isinstance(e, FloatElement):
        constants |= {"kind": "float", "mantissa_bits": e.mantissa_bits, "bias": e.bias}
        constants |= {"has_nan": e.bits == 8 and e.exponent_bits == 4}
    elif isinstance(e, TableElement):
        constants |= {"kind": "table"}
    else:
        raise TypeError(f"{fmt.spec}: kernels decode IntElement, FloatElement and TableElement, got {type(e).__name__}")
    scale, zero, outer, shift = (_tiles(fmt, name) for name in _SCALE_PLANES)
    return Layout(
        bits=e.bits, w0=w0, w1=w1, w2=w2, vector=e.vector,
        scale=scale, zero=zero, outer=outer, shift=shift, **constants,
    )  # fmt: skip


def weight_args(fmt: Format, planes: Mapping[str, Tensor]) -> dict[str, Any]:
    """The planes as arguments of a kernel: pointers and row strides. A plane that a format lacks repeats the first."""
    codes = [_rows(planes[name]) for name, _, _ in fmt.element.code_planes]
    codes += [codes[0]] * (MAX_PLANES - len(codes))
    args: dict[str, Any] = {}
    for i, t in enumerate(codes):
        args |= {f"p{i}": t, f"stride_p{i}": t.stride(0), f"bytes_p{i}": t.shape[1]}
    for name in _SCALE_PLANES:
        t = _rows(planes[name]) if name in planes else codes[0]
        args |= {name: t, f"stride_{name}": t.stride(0)}
    args["codebook"] = planes["codebook"].contiguous() if "codebook" in planes else codes[0]
    return args


def _rows(t: Tensor) -> Tensor:
    """`t` with unit stride along K, its 8-bit floats as bytes. Only a plane permuted by hand needs the copy."""
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        t = t.contiguous()
    return t.view(torch.uint8) if t.is_floating_point() and t.dtype.itemsize == 1 else t


@triton.jit
def _small_float(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, HAS_NAN: tl.constexpr):
    """int32 codes of a float of at most 8 bits to fp32.

    Its bits fit an fp16; the value is then right up to the difference of the biases, subnormals included.
    """
    magnitude = code & ((1 << (BITS - 1)) - 1)
    half = ((code >> (BITS - 1)) << 15) | (magnitude << (10 - MANTISSA))
    value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    if BIAS != 15:
        value = value * (2.0 ** (15 - BIAS))
    if HAS_NAN:
        value = tl.where(magnitude == 127, float("nan"), value)
    return value


@triton.jit
def _number(v, KIND: tl.constexpr):
    """A loaded element of a scale plane as fp32."""
    if KIND == "e8m0":
        e = v.to(tl.int32)
        bits = tl.where(e == 0, 0x00400000, e << 23)
        return tl.where(e == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        return _small_float(v.to(tl.int32), 8, 3, 7, True)
    else:
        # Adding zero keeps LLVM from seeing two widened bf16 numbers in a product that is narrowed to fp16: it would
        # narrow the factors instead, and a small scale would lose digits.
        return v.to(tl.float32) + 0.0


@triton.jit
def tile_of(ptr, stride, rows, ok, k0, K, T: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr):
    """fp32 numbers of a plane for every `STEP`th weight of `rows x [k0, k0 + BK)`.

    `(BN, 1)` where one serves all, otherwise `(BN, BK / STEP)`; then `STEP` divides the plane's tile.
    """
    KIND: tl.constexpr = T.kind
    if T.n == 0:
        base = ptr + (rows * 0).to(tl.int64)
    elif T.n == 1:
        base = ptr + rows.to(tl.int64) * stride
    else:
        base = ptr + (rows // T.n).to(tl.int64) * stride
    if T.k == 0:
        return _number(tl.load(base, mask=ok, other=0), KIND)[:, None]
    elif T.k % BK == 0:
        return _number(tl.load(base + k0 // T.k, mask=ok, other=0), KIND)[:, None]
    elif BK % T.k == 0:
        groups = k0 // T.k + tl.arange(0, BK // T.k)
        inside = ok[:, None] & (groups * T.k < K)[None, :]
        v = _number(tl.load(base[:, None] + groups[None, :], mask=inside, other=0), KIND)
        v = tl.broadcast_to(v[:, :, None], (rows.shape[0], BK // T.k, T.k // STEP))
        return tl.reshape(v, (rows.shape[0], BK // STEP))
    else:
        k = k0 + tl.arange(0, BK // STEP) * STEP
        v = tl.load(base[:, None] + (k // T.k)[None, :], mask=ok[:, None] & (k < K)[None, :], other=0)
        return _number(v, KIND)


@triton.jit
def tile_bytes(ptr, stride, width, rows, ok, k0, PER: tl.constexpr, BK: tl.constexpr):
    """The bytes `(BN, BK / PER)` of weights `rows x [k0, k0 + BK)`: `PER` weights a byte, `width` bytes a row.

    `k0` is a multiple of `BK`.
    """
    columns = tl.multiple_of(k0 // PER, BK // PER) + tl.arange(0, BK // PER)
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=ok[:, None] & (columns < width)[None, :], other=0)


@triton.jit
def _codes(ptr, stride, width, rows, ok, k0, WIDTH: tl.constexpr, VECTOR: tl.constexpr, BK: tl.constexpr):
    """int32 codes `(BN, BK / VECTOR)` of one plane of codes of `WIDTH` bits."""
    PER: tl.constexpr = 8 // WIDTH
    packed = tile_bytes(ptr, stride, width, rows, ok, k0, PER * VECTOR, BK)
    if PER == 1:
        return packed.to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        shifts = tl.arange(0, PER) * WIDTH
        codes = (packed.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << WIDTH) - 1)
        return tl.reshape(codes, (rows.shape[0], BK // VECTOR))


@triton.jit
def level_of(code, L: tl.constexpr):
    """int32 codes of an integer or a small float to fp32 levels."""
    if L.kind == "int":
        # An integer below 2**23 in the mantissa of 2**23 is that integer plus 2**23: no conversion instruction.
        return (((code ^ L.flip) * L.step) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + L.offset)
    else:
        return _small_float(code, L.bits, L.mantissa_bits, L.bias, L.has_nan)


@triton.jit
def levels(
    p0, p1, p2, stride_p0, stride_p1, stride_p2, bytes_p0, bytes_p1, bytes_p2,
    zero_point, stride_zero_point, codebook, rows, ok, k0, K, L: tl.constexpr, BK: tl.constexpr,
    TABLE_DTYPE: tl.constexpr,
):  # fmt: skip
    """fp32 `level - zero_point` of weights `rows x [k0, k0 + BK)`. Past N or K it is some finite number.

    Table entries are rounded to `TABLE_DTYPE`, the dtype they are multiplied in.
    """
    ZERO: tl.constexpr = L.zero
    code = _codes(p0, stride_p0, bytes_p0, rows, ok, k0, L.w0, L.vector, BK)
    if L.w1:
        code = code | (_codes(p1, stride_p1, bytes_p1, rows, ok, k0, L.w1, L.vector, BK) << L.w0)
    if L.w2:
        code = code | (_codes(p2, stride_p2, bytes_p2, rows, ok, k0, L.w2, L.vector, BK) << (L.w0 + L.w1))
    if L.kind != "table":
        value = level_of(code, L)
    elif L.vector == 1:
        value = tl.load(codebook + code).to(TABLE_DTYPE).to(tl.float32)
    else:
        entry = code[:, :, None] * L.vector + tl.arange(0, L.vector)[None, None, :]
        value = tl.reshape(tl.load(codebook + entry).to(TABLE_DTYPE).to(tl.float32), (rows.shape[0], BK))
    if ZERO.kind != "":
        value = value - tile_of(zero_point, stride_zero_point, rows, ok, k0, K, ZERO, BK, 1)
    return value


@triton.jit
def scales(
    scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
    rows, ok, k0, K, L: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """fp32 `scale * outer_scale + scale_offset` of every `STEP`th weight, `(BN, 1)` or `(BN, BK / STEP)`.

    Kernels are compiled without contraction to fused multiply-add, so the roundings are those of `effective_scale`.
    """
    SCALE: tl.constexpr = L.scale
    OUTER: tl.constexpr = L.outer
    SHIFT: tl.constexpr = L.shift
    value = tile_of(scale, stride_scale, rows, ok, k0, K, SCALE, BK, STEP)
    if OUTER.kind != "":
        value = value * tile_of(outer_scale, stride_outer_scale, rows, ok, k0, K, OUTER, BK, STEP)
    if SHIFT.kind != "":
        value = value + tile_of(scale_offset, stride_scale_offset, rows, ok, k0, K, SHIFT, BK, STEP)
    return value
