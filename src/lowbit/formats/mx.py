"""OCP microscaling formats: `mxfp8_e4m3`, `mxfp8_e5m2`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp4`, each also `:rceil`.

32 consecutive elements share a power-of-two scale stored as E8M0 (OCP Microscaling Formats v1.0, section 5).
FLOOR is the conversion of section 6.3: the exponent of the block's largest magnitude minus the element's largest
exponent; magnitudes above the element's largest value saturate. RCEIL is NVIDIA's: the smallest power of two for
which nothing saturates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import Format, Plane, Planes, divide, register, tile_amax
from lowbit.formats.elements import FloatElement
from lowbit.formats.fp8 import E4M3, E5M2
from lowbit.formats.int import parse_options

BLOCK = 32
E2M1 = FloatElement(4, 2, 1)
E8M0_BIAS = 127
E8M0_NAN = 255
_ELEMENTS = {
    "mxfp8_e4m3": E4M3,
    "mxfp8_e5m2": E5M2,
    "mxfp6_e2m3": FloatElement(6, 2, 3),
    "mxfp6_e3m2": FloatElement(6, 3, 2),
    "mxfp4": E2M1,
}


@register(*_ELEMENTS)
@dataclass(frozen=True)
class MXFormat(Format):
    """Blocks of 32 small floats with an E8M0 scale."""

    variant: str
    scaling: Literal["floor", "rceil"] = "floor"

    examples = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4:rceil", "mxfp8_e4m3:rceil")

    def __post_init__(self) -> None:
        if self.variant not in _ELEMENTS or self.scaling not in ("floor", "rceil"):
            raise ValueError(
                f"MXFormat: variant must be one of {list(_ELEMENTS)} and scaling 'floor' or 'rceil', "
                f"got {self.variant!r}, {self.scaling!r}" + see("bad-option")
            )

    @classmethod
    def from_spec(cls, name: str, *options: str) -> MXFormat:
        kwargs = parse_options(name, options, {mode: ("scaling", mode) for mode in ("floor", "rceil")})
        if "granularity" in kwargs:
            raise ValueError(
                f"format {':'.join((name, *options))!r}: MX blocks always have {BLOCK} elements along K"
                + see("bad-option")
            )
        return cls(name, **kwargs)  # type: ignore[arg-type]

    @cached_property
    def spec(self) -> str:
        return self.variant if self.scaling == "floor" else f"{self.variant}:rceil"

    @property
    def element(self) -> FloatElement:
        return _ELEMENTS[self.variant]

    @cached_property
    def scale_planes(self) -> tuple[Plane, ...]:
        return (Plane("scale", torch.float8_e8m0fnu, 1, BLOCK),)

    def choose_params(self, w: Tensor) -> Planes:
        amax = tile_amax(w, (1, BLOCK))
        if self.scaling == "floor":
            exponent = torch.frexp(amax)[1] - 1 - self.element.max_exponent
        else:
            mantissa, exponent = torch.frexp(divide(amax.double(), self.element.max))
            exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        exponent = torch.where(amax == 0, 0, exponent).clamp(-E8M0_BIAS, E8M0_BIAS)
        scale = torch.where(amax.isfinite(), exponent + E8M0_BIAS, E8M0_NAN).to(torch.uint8)
        return {"scale": scale.view(torch.float8_e8m0fnu)}
