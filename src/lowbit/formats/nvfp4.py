"""NVFP4: E2M1 elements, one E4M3 scale per 16 along K, one fp32 scale for the tensor.

outer scale = amax(W) / (448 * 6); block scale = E4M3(amax(block) / 6 / outer scale); a weight is
element * (block scale * outer scale) (NVIDIA, "Pretraining large language models with NVFP4", arXiv:2509.25149).
Block scales are kept between E4M3's smallest subnormal and 448, so a tiny block is never lost to a zero scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import Format, Plane, Planes, divide, register, safe_scale, tile_amax
from lowbit.formats.elements import FloatElement
from lowbit.formats.fp8 import E4M3
from lowbit.formats.mx import E2M1

BLOCK = 16


@register("nvfp4")
@dataclass(frozen=True)
class NVFP4Format(Format):
    """Blocks of 16 E2M1 values with two levels of scales. `outer_scale` is NVIDIA's global scale."""

    examples = ("nvfp4",)

    @classmethod
    def from_spec(cls, name: str, *options: str) -> NVFP4Format:
        if options:
            raise ValueError(f"format {':'.join((name, *options))!r}: nvfp4 has no options" + see("bad-option"))
        return cls()

    @property
    def spec(self) -> str:
        return "nvfp4"

    @property
    def element(self) -> FloatElement:
        return E2M1

    @cached_property
    def scale_planes(self) -> tuple[Plane, ...]:
        return (
            Plane("scale", torch.float8_e4m3fn, 1, BLOCK),
            Plane("outer_scale", torch.float32, None, None),
        )

    def choose_params(self, w: Tensor, outer_scale: Tensor | None = None) -> Planes:
        """`outer_scale`: a known fp32 global scale, shape (1, 1), instead of the tensor's own."""
        amax = tile_amax(w, (1, BLOCK))
        if outer_scale is None:
            top = amax.amax().reshape(1, 1) if amax.numel() else amax.new_zeros(1, 1)
            outer_scale = safe_scale(divide(top, E4M3.max * E2M1.max))
        scale = (divide(amax, E2M1.max) / outer_scale).clamp(E4M3.min_subnormal, E4M3.max)
        scale = torch.where(amax == 0, torch.ones_like(scale), scale)  # NaN stays NaN
        return {"scale": scale.to(torch.float8_e4m3fn), "outer_scale": outer_scale}
