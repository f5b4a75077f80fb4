"""Faster decoding for codes that lie in one plane: packed words go to the matrix units' layout and are decoded there.

A word holds the codes of `parts` neighbours along K. Part `j` of a tile, the weights `parts * i + j`, comes from the
same words by another shift, and meets part `j` of the activation: no code ever moves to another thread. Words are
bytes, decoded in fp32 arithmetic, or, for integers, 4-bit floats and tables of 16 with bf16 operands on NVIDIA GPUs,
pairs of bytes that a few PTX instructions decode. The numbers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.decode import Layout, level_of
from lowbit.kernels.triton.launch import uses_ptx

# A matrix instruction sums at least this many products along K.
MIN_PART = 16


@dataclass(frozen=True)
class Packing:
    """How a launch decodes: `parts` weights a word (0: not in parts), and the assembly of each part, if any."""

    parts: int = 0
    ptx: tuple[str, ...] = ()
    has_ptx: bool = False
    has_lut: bool = False  # the one assembly gives all parts, from a table held in registers


@cache
def _packing(layout: Layout, bk: int, operand: torch.dtype, words: bool) -> Packing:
    tiles = (layout.scale, layout.zero, layout.outer, layout.shift)
    # Zero points are subtracted in the operand's dtype, which holds small integers exactly.
    if operand == torch.float32 or layout.parts == 0 or layout.zero.kind not in ("", "narrow"):
        return Packing()

    def fits(parts: int) -> bool:
        return bk // parts >= MIN_PART and all(t.k % parts == 0 for t in tiles)

    if words and operand == torch.bfloat16 and fits(2 * layout.parts):
        if layout.kind == "int" or (layout.kind == "float" and layout.bits == 4):
            return Packing(2 * layout.parts, tuple(_ptx(layout, j) for j in range(2 * layout.parts)), True)
        if layout.kind == "table" and layout.bits == 4 and layout.vector == 1:
            return Packing(4, (_LUT,), False, True)
    return Packing(layout.parts) if fits(layout.parts) else Packing()


def packing_for(layout: Layout, bk: int, operand: torch.dtype, codes: Tensor) -> Packing:
    """The fastest decoding of the plane `codes` in steps of `bk`; two-byte words need even addresses."""
    even = codes.shape[1] % 2 == 0 and codes.stride(0) % 2 == 0 and codes.data_ptr() % 2 == 0
    return _packing(layout, bk, operand, even and uses_ptx(codes.device))


def _ptx(layout: Layout, part: int) -> str:
    """Two words `$1` of 16 bits to the two bf16 levels `$0` of one part."""

    def constant(name: str, half: int) -> str:
        return f".reg .b32 {name}; mov.b32 {name}, {half << 16 | half:#x}; "

    def number(name: str, value: int) -> str:
        """A small integer or its negative as bf16."""
        bits = int(torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16).item())
        return constant(name, bits & 0xFFFF)

    def shifted(to: str, by: int) -> str:
        return f"{'shr' if by >= 0 else 'shl'}.b32 {to}, $1, {abs(by)}; "

    width, at = layout.w0, layout.w0 * part
    code = "{ .reg .b32 g, h; "
    if layout.kind == "float":
        # Sign and magnitude to where bf16 has them, then the missing exponent bias.
        top = 7 + width - 1 - layout.mantissa_bits
        magnitude = ((1 << (width - 1)) - 1) << (top - width + 1)
        code += constant("sign", 0x8000) + constant("size", magnitude) + constant("factor", (254 - layout.bias) << 7)
        code += shifted("h", at + width - 16) + shifted("g", at + width - 1 - top)
        # (h & sign) | (g & size), then times 2**(127 - bias); the third operand is -0.
        code += "and.b32 g, g, size; lop3.b32 h, h, sign, g, 0xea; fma.rn.bf16x2 $0, h, factor, sign; "
    elif width == 8:
        # The low 7 bits and the top bit, each in the mantissa of 128.
        code += constant("low", 0x007F) + constant("high", 0x0080) + constant("magic", 0x4300) + number("one", 1)
        code += number("minus", -1) + number("bias", -128)
        code += shifted("h", at) + "lop3.b32 g, h, low, magic, 0xea; lop3.b32 h, h, high, magic, 0xea; "
        if layout.flip:  # two's complement: the top bit counts -128
            code += "fma.rn.bf16x2 $0, h, minus, g; "
        else:
            code += "fma.rn.bf16x2 h, h, one, bias; fma.rn.bf16x2 g, g, one, bias; fma.rn.bf16x2 $0, h, one, g; "
    else:
        code += constant("mask", (1 << width) - 1) + constant("magic", 0x4300) + number("one", 1)
        code += shifted("h", at) + "lop3.b32 h, h, mask, magic, 0xea; "  # 128 + code
        if layout.step == 1:
            code += number("bias", -128 - layout.offset) + "fma.rn.bf16x2 $0, h, one, bias; "
        else:
            code += number("step", layout.step) + number("bias", -128 * layout.step) + number("last", -layout.offset)
            code += "fma.rn.bf16x2 h, h, step, bias; fma.rn.bf16x2 $0, h, one, last; "
    return code + "}"


@triton.constexpr_function
def _assembly(packing, part):  # type: ignore[no-untyped-def]
    return packing.ptx[part]


# Two words `$4` of four 4-bit codes each to the entries of a table of 16 bf16 numbers: part j of both words in `$j`.
# `prmt` picks four bytes out of eight by the low three bits of each code; the top bit chooses between the halves of
# the table, whose low bytes are in $5, $7, $9, $11 and high bytes in $13, $15, $17, $19 (four entries in each).
_LUT = (
    "{ .reg .b32 s, t, u, m, n, a, b, l0, l1, h0, h1, p, q; "
    "and.b32 s, $4, 0x77777777; shr.b32 t, s, 16; shl.b32 u, $4, 4; "
    # 0xff where the top bit of a code is set: `prmt` repeats the sign of a byte.
    "prmt.b32 m, u, $4, 0xd9c8; prmt.b32 n, u, $4, 0xfbea; "
    "prmt.b32 a, $5, $7, s; prmt.b32 b, $9, $11, s; lop3.b32 l0, a, b, m, 0xd8; "
    "prmt.b32 a, $13, $15, s; prmt.b32 b, $17, $19, s; lop3.b32 h0, a, b, m, 0xd8; "
    "prmt.b32 a, $5, $7, t; prmt.b32 b, $9, $11, t; lop3.b32 l1, a, b, n, 0xd8; "
    "prmt.b32 a, $13, $15, t; prmt.b32 b, $17, $19, t; lop3.b32 h1, a, b, n, 0xd8; "
    "prmt.b32 p, l0, h0, 0x5140; prmt.b32 q, l1, h1, 0x5140; "
    "prmt.b32 $0, p, q, 0x5410; prmt.b32 $1, p, q, 0x7632; "
    "prmt.b32 p, l0, h0, 0x7362; prmt.b32 q, l1, h1, 0x7362; "
    "prmt.b32 $2, p, q, 0x5410; prmt.b32 $3, p, q, 0x7632; }"
)


@triton.jit
def _four_bytes(codebook, FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """One byte of each of four entries, rounded to bf16, in an int32."""
    word = 0
    for i in tl.static_range(4):
        entry = tl.load(codebook + (FIRST + i)).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
        word = word | (((entry >> SHIFT) & 255) << (8 * i))
    return word


@triton.jit
def lut_of(codebook):
    """A table of 16 as eight registers: low bytes, then high bytes."""
    l0, l1 = _four_bytes(codebook, 0, 0), _four_bytes(codebook, 4, 0)
    l2, l3 = _four_bytes(codebook, 8, 0), _four_bytes(codebook, 12, 0)
    h0, h1 = _four_bytes(codebook, 0, 8), _four_bytes(codebook, 4, 8)
    h2, h3 = _four_bytes(codebook, 8, 8), _four_bytes(codebook, 12, 8)
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def lut_parts(words, l0, l1, l2, l3, h0, h1, h2, h3, PACKING: tl.constexpr):
    """The four parts of int16 words of 4-bit codes of a table."""
    return tl.inline_asm_elementwise(
        _assembly(PACKING, 0), "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [words, l0, l1, l2, l3, h0, h1, h2, h3],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def part_of(words, codebook, J: tl.constexpr, L: tl.constexpr, PACKING: tl.constexpr, NATIVE: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """Levels of part J in `DTYPE`, without their zero point; `words` are bytes, or int16 with assembly."""
    if PACKING.has_ptx:
        return tl.inline_asm_elementwise(
            _assembly(PACKING, J), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif L.kind == "table":
        code = (words.to(tl.uint8, bitcast=True).to(tl.int32) >> (J // L.vector * L.w0)) & ((1 << L.w0) - 1)
        return tl.load(codebook + (code * L.vector + J % L.vector)).to(DTYPE)
    elif L.kind == "float" and L.bits == 8 and L.mantissa_bits == 2 and NATIVE:
        return words.to(tl.float8e5, bitcast=True).to(tl.float32).to(DTYPE)
    elif L.kind == "float" and L.bits == 8 and NATIVE:
        return words.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(DTYPE)
    else:
        return level_of((words.to(tl.uint8, bitcast=True).to(tl.int32) >> (J * L.w0)) & ((1 << L.w0) - 1), L).to(DTYPE)


@triton.jit
def _halves(x):
    """Even and odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _quarters(x):
    even, odd = _halves(x)
    a, c = _halves(even)
    b, d = _halves(odd)
    return a, b, c, d


@triton.jit
def split_parts(x, PARTS: tl.constexpr):
    """`x (M, C * PARTS)` to the tuple of its parts `(M, C)`: part j holds columns `PARTS * i + j`."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        return _halves(x)
    elif PARTS == 4:
        return _quarters(x)
    else:
        even, odd = _halves(x)
        a, c, e, g = _quarters(even)
        b, d, f, h = _quarters(odd)
        return (a, b, c, d, e, f, g, h)
