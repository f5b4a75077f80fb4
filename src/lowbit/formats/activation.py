"""Activations: a weight's number formats applied to `x (M, K)` while the model runs.

An activation is split into an *operand* and a *row scale*, `x ~ operand * row_scale`, such that the operand is exact
in bf16: integer or float8 codes for per-token and per-tensor scales, element times block scale for MX and NVFP4.
Every matmul then needs one multiplication per output at the end, and no format of activations needs a kernel of its
own. Scales per group (1x128) do not fit bf16 exactly; they stay beside the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import Format, Planes, parse_format
from lowbit.formats.mx import MXFormat
from lowbit.formats.nvfp4 import NVFP4Format


@dataclass(frozen=True)
class Activation:
    """How a linear layer quantizes its input. `spec` is the format's, with `@static` where the scale is calibrated."""

    format: Format
    static: bool = False

    def __post_init__(self) -> None:
        static_ok = isinstance(self.format, NVFP4Format) or self.scale_tile == (None, None)
        if self.static and (not static_ok or self.format.has("zero_point")):
            raise ValueError(
                f"static activation scales need a per-tensor symmetric format or nvfp4, got {self.format.spec}; "
                "use a dynamic config for scales per token or block" + see("bad-option")
            )

    @property
    def spec(self) -> str:
        return self.format.spec + ("@static" if self.static else "")

    @property
    def scale_tile(self) -> tuple[int | None, int | None]:
        return self.format.scale_planes[0].tile

    @cached_property
    def grouped(self) -> bool:
        """Whether scales vary along K and have to be applied inside the matmul."""
        return self.scale_tile[1] is not None and not isinstance(self.format, (MXFormat, NVFP4Format))

    def row_scale_shapes(self, m: int, k: int) -> list[tuple[int, int]]:
        """What the scales beside an operand `(M, K)` can be."""
        group = self.scale_tile[1]
        return [(m, -(-k // group))] if self.grouped and group else [(m, 1), (1, 1)]

    def params(self, x: Tensor, static_scale: Tensor | None = None) -> Planes:
        """The scale planes for `x (M, K)`; `static_scale` fp32 `(1, 1)` replaces the tensor-wide scale found from `x`.

        Raises:
            ValueError: the activation is static and its scale is missing.
        """
        if not self.static:
            return self.format.choose_params(x)
        if static_scale is None:
            raise ValueError(
                f"{self.spec}: a static activation needs its calibrated scale; run lowbit.calibrate first"
                + see("missing-calibration")
            )
        if isinstance(self.format, NVFP4Format):
            return self.format.choose_params(x, outer_scale=static_scale.view(1, 1))
        return {"scale": static_scale.view(1, 1)}

    def quantize(self, x: Tensor, static_scale: Tensor | None = None) -> Planes:
        """Planes of `x (M, K)`."""
        return self.format.quantize(x, self.params(x, static_scale), check_finite=False)

    def codes(self, x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole 8-bit codes `(M, K)` in the dtype of their plane, and `row_scale (M or 1, 1)` fp32.

        For formats without zero points and with one level of scales.
        """
        planes = self.quantize(x, static_scale)
        return planes["qdata"], planes["scale"].float()

    def split(self, x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`operand (M, K)` bf16 and `row_scale (M or 1, 1)` fp32 with `x ~ operand * row_scale`.

        For grouped scales the second is `(M, ceil(K / group))`, to be applied group by group. The codes are never
        packed: what an operand needs is their levels.
        """
        fmt, params = self.format, self.params(x, static_scale)
        levels = fmt.levels(fmt.encode(x.float(), params), params, x.shape[1])
        if not isinstance(fmt, (MXFormat, NVFP4Format)):
            return levels.to(torch.bfloat16), params["scale"].float()
        one = torch.ones(1, 1, dtype=torch.float32, device=x.device)
        outer = params.get("outer_scale", one)
        inner = params | {"outer_scale": one} if "outer_scale" in params else params
        return fmt.scaled(levels, inner).to(torch.bfloat16), outer


@cache
def parse_activation(spec: str) -> Activation | None:
    """`float8_e4m3:row`, `int8:tensor@static` -> the activation; the empty string means none."""
    if not spec:
        return None
    name, _, static = spec.partition("@")
    if static not in ("", "static"):
        raise ValueError(f"activation {spec!r}: after '@' only 'static' is known, got {static!r}" + see("bad-option"))
    return Activation(parse_format(name), bool(static))
