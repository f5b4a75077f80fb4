"""Integers of 1 to 8 bits: `int4:g128`, `int4:g32:asym`, `int8:row`, `int3:g64`, `int8:b128x128`, `int4:g128:fp32`.

Symmetric: scale = amax / ((2**bits - 1) / 2), codes round(w / scale) clamped to [-2**(bits-1), 2**(bits-1) - 1]
(the convention of torchao and compressed-tensors). One bit symmetric: scale = mean |w|, codes the signs
(XNOR-Net, arXiv:1603.05279); its only way to say zero is a scale of zero.
Asymmetric: the range [min(w, 0), max(w, 0)] in 2**bits - 1 steps with an integer zero point, so that 0 is exact
(Jacob et al., arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import (
    Format,
    Plane,
    Planes,
    bounded,
    divide,
    register,
    safe_scale,
    tile_amax,
    tile_reduce,
)
from lowbit.formats.elements import IntElement
from lowbit.granularity import Granularity, PerGroup, parse_granularity

SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE_NAMES = {v: k for k, v in SCALE_DTYPES.items()}


def parse_options(name: str, options: tuple[str, ...], allowed: dict[str, tuple[str, object]]) -> dict[str, object]:
    """The words after a format's name as keyword arguments; a granularity is recognized by its form.

    Raises:
        ValueError: a word that the family does not know, or two that say the same thing.
    """
    out: dict[str, object] = {}
    for word in options:
        granularity = parse_granularity(word)
        key, value = ("granularity", granularity) if granularity is not None else allowed.get(word, (None, None))
        if key is None:
            known = ["tensor", "row", "g<size>", "b<rows>x<columns>", *allowed]
            spec = ":".join((name, *options))
            raise ValueError(f"format {spec!r}: unknown option {word!r}; known: {', '.join(known)}" + see("bad-option"))
        if key in out:
            raise ValueError(f"format {':'.join((name, *options))!r}: {word!r} repeats an option" + see("bad-option"))
        out[key] = value
    return out


@register(*(f"int{b}" for b in range(1, 9)))
@dataclass(frozen=True)
class IntFormat(Format):
    """Signed or unsigned integers with one scale (and zero point) per tile.

    Scales are bf16 per group and fp32 otherwise, unless `scale_dtype` says so.
    """

    bits: int
    granularity: Granularity = PerGroup(128)
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None

    examples = (
        "int8:row", "int8:tensor", "int8:g128", "int8:b128x128", "int8:row:asym", "int8:g32:asym",
        "int4:g128", "int4:g32", "int4:g64:asym", "int4:g256", "int4:row", "int4:tensor",
        "int1:g128", "int2:g64", "int2:g32:asym", "int3:g64", "int5:g128", "int6:g64:asym", "int7:row", "int1:g64:asym",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"IntFormat: bits must be 1 to 8, got {self.bits}" + see("bad-option"))
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", self._default_scale_dtype)
        if self.scale_dtype not in _SCALE_NAMES:
            raise ValueError(
                f"IntFormat: scale_dtype must be one of {list(_SCALE_NAMES)}, got {self.scale_dtype}"
                + see("bad-option")
            )

    @property
    def _default_scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if isinstance(self.granularity, PerGroup) else torch.float32

    @classmethod
    def from_spec(cls, name: str, *options: str) -> IntFormat:
        allowed: dict[str, tuple[str, object]] = {"asym": ("symmetric", False)}
        allowed |= {word: ("scale_dtype", dtype) for word, dtype in SCALE_DTYPES.items()}
        return cls(int(name[3:]), **parse_options(name, options, allowed))  # type: ignore[arg-type]

    @cached_property
    def spec(self) -> str:
        words = [f"int{self.bits}", self.granularity.spec]
        if not self.symmetric:
            words.append("asym")
        if self.scale_dtype != self._default_scale_dtype:
            words.append(_SCALE_NAMES[self.scale_dtype])  # type: ignore[index]
        return ":".join(words)

    @cached_property
    def element(self) -> IntElement:
        return IntElement(self.bits, self.symmetric)

    @cached_property
    def scale_planes(self) -> tuple[Plane, ...]:
        tile = self.granularity.tile
        scale = Plane("scale", self.scale_dtype or torch.float32, *tile)
        return (scale,) if self.symmetric else (scale, Plane("zero_point", torch.uint8, *tile))

    def encode(self, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        if self.element.step == 2:
            # The codes are signs, and a weight far below its scale would lose its own in the quotient.
            w = w.sign()
        return super().encode(w, params)

    def choose_params(self, w: Tensor) -> Planes:
        tile, top, dtype = self.granularity.tile, (1 << self.bits) - 1, self.scale_dtype or torch.float32
        if not self.symmetric:
            low = bounded(tile_reduce(w, tile, lambda t: t.amin(1)).clamp_(max=0))
            high = bounded(tile_reduce(w, tile, lambda t: t.amax(1)).clamp_(min=0))
            # Divided before subtracting: high - low can exceed the largest fp32.
            scale = safe_scale(divide(high, top) - divide(low, top), dtype)
            zero_point = (-low / scale.float()).round_().clamp_(0, top).to(torch.uint8)
            return {"scale": scale, "zero_point": zero_point}
        if self.bits == 1:
            # The mean over the weights that exist: a partial tile is padded with zeros, which count for nothing.
            total = tile_reduce(w.float().abs(), tile, lambda t: t.double().sum(1))
            count = tile_reduce(torch.ones_like(w, dtype=torch.float32), tile, lambda t: t.sum(1))
            scale = safe_scale((total / count).float(), dtype)
            return {"scale": torch.where(total > 0, scale, torch.zeros_like(scale))}
        return {"scale": safe_scale(divide(tile_amax(w, tile), top / 2), dtype)}
