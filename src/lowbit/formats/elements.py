"""Elements: what one code means before scaling, and how codes are laid out in bytes.

Three kinds cover the field: integers, floats of 4 to 8 bits, and tables (NF4, codebooks). Each one encodes scaled
values to codes, decodes codes to fp32 levels and packs codes into byte planes. Kernels branch on the kind, never on
the format.

Packing (canonical form): codes of 1, 2, 4 or 8 bits fill bytes from the least significant end, in K order. Codes of
3, 5, 6 or 7 bits are split into power-of-two planes, low bits first (6 = 4 + 2), so that each plane is addressable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Bits per code -> widths of its planes, low bits first.
PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """uint8 codes `(N, C)`, each below `2**width`, to bytes `(N, ceil(C * width / 8))`, low bits first."""
    per_byte = 8 // width
    if per_byte == 1:
        return codes
    n, c = codes.shape
    if c % per_byte:
        codes = torch.nn.functional.pad(codes, (0, -c % per_byte))
    parts = codes.view(n, -1, per_byte)
    out = parts[..., 0].clone()
    for i in range(1, per_byte):
        out |= parts[..., i] << (i * width)
    return out


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` codes of each row as uint8."""
    per_byte = 8 // width
    if per_byte == 1:
        return packed[:, :count]
    mask = (1 << width) - 1
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & mask).flatten(1)[:, :count]


@dataclass(frozen=True)
class Element:
    """Base of the three kinds. `bits` is the width of a code; `vector` is how many weights one code stands for."""

    bits: int

    @property
    def vector(self) -> int:
        return 1

    @property
    def native_dtype(self) -> torch.dtype:
        """dtype of the code plane when codes are whole bytes."""
        return torch.uint8

    @cached_property
    def code_planes(self) -> tuple[tuple[str, int, torch.dtype], ...]:
        """(name, width in bits, dtype) of each code plane."""
        widths = PLANE_WIDTHS[self.bits]
        if widths == (8,):
            return (("qdata", 8, self.native_dtype),)
        if len(widths) == 1:
            return (("qdata", widths[0], torch.uint8),)
        return tuple((f"qdata_{w}bit", w, torch.uint8) for w in widths)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """uint8 codes `(N, C)` to the code planes."""
        out, shift = {}, 0
        for name, width, dtype in self.code_planes:
            part = codes if width == self.bits else (codes >> shift) & ((1 << width) - 1)
            out[name] = pack_bits(part, width).view(dtype)
            shift += width
        return out

    def unpack(self, planes: Mapping[str, Tensor], count: int) -> Tensor:
        """The code planes to uint8 codes `(N, count)`."""
        codes, shift = None, 0
        for name, width, _ in self.code_planes:
            part = unpack_bits(planes[name].view(torch.uint8), width, count)
            codes = part if codes is None else codes | (part << shift)
            shift += width
        assert codes is not None
        return codes

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Scaled fp32 values `(N, K)` to uint8 codes `(N, ceil(K / vector))`."""
        raise NotImplementedError

    def decode(self, codes: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        """uint8 codes to fp32 levels `(N, K)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class IntElement(Element):
    """Integers: level = code * step - offset.

    Symmetric codes are offset binary (offset `2**(bits-1)`), asymmetric ones have offset 0 and a zero point.
    8-bit symmetric codes are stored as two's complement int8, the form that matrix units and other libraries take.
    One-bit symmetric codes mean -1 and +1 (step 2, offset 1), the binary weights of XNOR-Net (arXiv:1603.05279).
    """

    symmetric: bool

    @property
    def step(self) -> int:
        return 2 if self.symmetric and self.bits == 1 else 1

    @property
    def offset(self) -> int:
        return (1 if self.bits == 1 else 1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def native_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        # The clamp comes first: a value beyond 2**31 has no integer to be converted to.
        if self.step == 2:
            return (x >= 0).to(torch.uint8)
        codes = (x.round() + self.offset).clamp_(0, (1 << self.bits) - 1).to(torch.uint8)
        return codes ^ 0x80 if self.native_dtype == torch.int8 and self.bits == 8 else codes

    def decode(self, codes: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        if self.native_dtype == torch.int8 and self.bits == 8:
            return codes.view(torch.int8).float()
        return codes.float() * self.step - self.offset


@dataclass(frozen=True)
class FloatElement(Element):
    """Small binary floats: 1 sign bit, `exponent_bits`, `mantissa_bits`, subnormals, round to nearest even, saturating.

    float8_e4m3fn and float8_e5m2 are PyTorch dtypes; E2M1, E2M3 and E3M2 (OCP MX 1.0, section 5.3) have no Inf or NaN.
    """

    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def native_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.exponent_bits == 4 else torch.float8_e5m2

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value: `emax` of OCP MX 1.0."""
        return math.frexp(self.max)[1] - 1

    @property
    def max(self) -> float:
        if self.bits == 8:
            return torch.finfo(self.native_dtype).max
        top = (1 << self.exponent_bits) - 1 - self.bias
        return 2.0**top * (2 - 2.0**-self.mantissa_bits)

    @property
    def min_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        x = x.clamp(-self.max, self.max)
        if self.bits == 8:
            # Clamped first: what the cast does beyond the largest value differs between releases and devices.
            return x.to(self.native_dtype).view(torch.uint8)
        lowest = 1 - self.bias
        exponent = torch.where(x == 0, lowest, torch.frexp(x)[1] - 1).clamp_(min=lowest)
        # x / 2**(exponent - mantissa_bits) is exact; a mantissa that rounds up to the next power carries by itself.
        mantissa = torch.ldexp(x.abs(), self.mantissa_bits - exponent).round_().to(torch.int32)
        magnitude = mantissa + ((exponent + self.bias - 1) << self.mantissa_bits)
        sign = torch.signbit(x).to(torch.int32) << (self.bits - 1)
        return (magnitude | sign).to(torch.uint8)

    def decode(self, codes: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        if self.bits == 8:
            return codes.view(self.native_dtype).float()
        # The bits placed in an fp16 have the right value up to the difference of the biases, subnormals included.
        codes = codes.to(torch.int16)
        sign = (codes >> (self.bits - 1)) << 15
        magnitude = (codes & ((1 << (self.bits - 1)) - 1)) << (10 - self.mantissa_bits)
        return (sign | magnitude).view(torch.float16).float() * 2.0 ** (15 - self.bias)


@dataclass(frozen=True)
class TableElement(Element):
    """Codes that index a stored table, the plane `codebook`: `(2**bits,)`, or `(2**bits, vector)` for vectors.

    Encoding takes the nearest entry (Euclidean); half way between two levels, the lower level.
    """

    width: int = 1

    @property
    def vector(self) -> int:
        return self.width

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        table = params["codebook"].float()
        if self.width == 1:
            order = torch.argsort(table, stable=True)
            levels = table[order]
            order = order[torch.searchsorted(levels, levels)]  # of equal levels (FP4 has two zeros) the first
            # Midpoints in fp64, where they are exact; a value on a midpoint goes to the lower level.
            middle = (levels[1:].double() + levels[:-1].double()) / 2
            return order.to(torch.uint8)[torch.bucketize(x.double(), middle)]
        n, k = x.shape
        points = torch.nn.functional.pad(x, (0, -k % self.width)).view(-1, self.width).double()
        out = torch.empty(points.shape[0], dtype=torch.uint8, device=x.device)
        t = table.double()
        half_norms = (t * t).sum(1) / 2
        for i in range(0, points.shape[0], 1 << 16):  # (65536, entries) distances at a time
            out[i : i + (1 << 16)] = torch.addmm(half_norms, points[i : i + (1 << 16)], t.T, alpha=-1).argmin(1)
        return out.view(n, -1)

    def decode(self, codes: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        values = planes["codebook"].float()[codes.int()]
        return values.flatten(1) if self.width > 1 else values
