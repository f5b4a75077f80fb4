"""float8 weights and activations: `float8_e4m3:row`, `float8_e4m3:tensor`, `float8_e5m2:g128`, `float8_e4m3:b128x128`.

scale = amax / largest value (448 for E4M3, 57344 for E5M2) in fp32, codes round to nearest even and saturate
(Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import Format, Plane, Planes, divide, register, safe_scale, tile_amax
from lowbit.formats.elements import FloatElement
from lowbit.formats.int import parse_options
from lowbit.granularity import Granularity, PerRow

E4M3 = FloatElement(8, 4, 3)
E5M2 = FloatElement(8, 5, 2)
_ELEMENTS = {"float8_e4m3": E4M3, "float8_e5m2": E5M2}


@register(*_ELEMENTS)
@dataclass(frozen=True)
class Float8Format(Format):
    """8-bit floats with one fp32 scale per tile."""

    variant: str = "float8_e4m3"
    granularity: Granularity = PerRow()

    examples = (
        "float8_e4m3:row", "float8_e4m3:tensor", "float8_e4m3:g128", "float8_e4m3:b128x128",
        "float8_e5m2:row", "float8_e5m2:tensor",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.variant not in _ELEMENTS:
            raise ValueError(
                f"Float8Format: variant must be one of {list(_ELEMENTS)}, got {self.variant!r}" + see("bad-option")
            )

    @classmethod
    def from_spec(cls, name: str, *options: str) -> Float8Format:
        return cls(name, **parse_options(name, options, {}))  # type: ignore[arg-type]

    @cached_property
    def spec(self) -> str:
        return f"{self.variant}:{self.granularity.spec}"

    @property
    def element(self) -> FloatElement:
        return _ELEMENTS[self.variant]

    @cached_property
    def scale_planes(self) -> tuple[Plane, ...]:
        return (Plane("scale", torch.float32, *self.granularity.tile),)

    def choose_params(self, w: Tensor) -> Planes:
        return {"scale": safe_scale(divide(tile_amax(w, self.granularity.tile), self.element.max))}
