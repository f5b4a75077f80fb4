"""Tables: the fixed ones of 4-bit floats (`nf4:g64`, `fp4:g64`, `nf4:g64:dq`) and learned codebooks
(`codebook4:g64`, `codebook4v2:g64`, `codebook2v4:g64`).

A weight is table[code] * scale of its group. NF4 is the NormalFloat of QLoRA (arXiv:2305.14314, appendix E), FP4
the E2M1-like table of bitsandbytes. `:dq` quantizes the scales again (QLoRA, section 3): the mean is taken off and
the rest kept as int8 with an fp32 scale per 256 of them along K.
Learned codebooks come from k-means on the weights divided by their group's largest magnitude, weighted by its
square (SqueezeLLM, arXiv:2306.07629, with the scale as sensitivity): 16 scalars, or 256 pairs of neighbours along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import Format, Plane, Planes, bounded, divide, register, safe_scale, tile_amax
from lowbit.formats.elements import TableElement
from lowbit.formats.int import parse_options
from lowbit.granularity import PerGroup

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0052083333, 0.6666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = _FP4_MAGNITUDES + tuple(-m for m in _FP4_MAGNITUDES)
TABLES = {"nf4": NF4, "fp4": FP4}
SCALES_PER_OUTER = 256


def _group_size(name: str, kwargs: dict[str, object]) -> int:
    granularity = kwargs.pop("granularity", PerGroup(64))
    if not isinstance(granularity, PerGroup):
        raise ValueError(
            f"format {name!r}: tables need one scale per group (g64, g32, ...), got {granularity.spec}"  # type: ignore[attr-defined]
            + see("bad-option")
        )
    return granularity.group_size


@register(*TABLES)
@dataclass(frozen=True)
class TableFormat(Format):
    """A fixed 16-entry table, scales per group, optionally quantized themselves (`double_quant`)."""

    variant: str = "nf4"
    group_size: int = 64
    double_quant: bool = False

    examples = ("nf4:g64", "nf4:g64:dq", "fp4:g64", "fp4:g32:dq")
    # Entries and scales are fp32: kernels round both to bf16, and their product, and the output (2**-7, 42 dB).
    kernel_sqnr_db = 40.0

    @classmethod
    def from_spec(cls, name: str, *options: str) -> TableFormat:
        kwargs = parse_options(name, options, {"dq": ("double_quant", True)})
        return cls(name, _group_size(name, kwargs), **kwargs)  # type: ignore[arg-type]

    @cached_property
    def spec(self) -> str:
        return f"{self.variant}:g{self.group_size}" + (":dq" if self.double_quant else "")

    @cached_property
    def element(self) -> TableElement:
        return TableElement(4)

    @cached_property
    def scale_planes(self) -> tuple[Plane, ...]:
        g = self.group_size
        codebook = Plane("codebook", torch.float32, None, None, shape=(16,))
        if not self.double_quant:
            return (Plane("scale", torch.float32, 1, g), codebook)
        return (
            Plane("scale", torch.int8, 1, g),
            Plane("outer_scale", torch.float32, 1, g * SCALES_PER_OUTER),
            Plane("scale_offset", torch.float32, None, None),
            codebook,
        )

    def choose_params(self, w: Tensor) -> Planes:
        amax = tile_amax(w, (1, self.group_size))
        codebook = torch.tensor(TABLES[self.variant], dtype=torch.float32, device=w.device)
        if not self.double_quant:
            return {"scale": safe_scale(amax), "codebook": codebook}
        offset = (amax.double().mean() if amax.numel() else amax.new_zeros(()).double()).float().reshape(1, 1)
        centred = amax - offset
        outer = safe_scale(divide(tile_amax(centred, (1, SCALES_PER_OUTER)), 127))
        expanded = outer.repeat_interleave(SCALES_PER_OUTER, dim=1)[:, : centred.shape[1]]
        scale = (centred / expanded).round_().clamp_(-127, 127)
        # A group of zeros among large ones may decode to a scale near zero or below. Any scale is right for it, and a
        # group whose scale decodes to exactly 0 would divide by it: one step up avoids that.
        scale = torch.where(scale * expanded + offset == 0, scale + 1, scale)
        return {"scale": scale.to(torch.int8), "outer_scale": outer, "scale_offset": offset, "codebook": codebook}


@register("codebook2", "codebook2v4", "codebook3", "codebook4", "codebook4v2")
@dataclass(frozen=True)
class CodebookFormat(Format):
    """A learned codebook per tensor, kept in bf16 so that kernels hold its entries exactly.

    `bits` per weight; with `vector = 2` one code of `2 * bits` bits names a pair, with 4 of `4 * bits` four weights.
    """

    bits: int = 4
    group_size: int = 64
    vector: int = 1

    # Without `codebook2v4:g64`: tests over the registry ask for CUDA C++ of every format, which decodes no vectors of
    # four. The kernels in C and Triton take it.
    examples = ("codebook4:g64", "codebook4v2:g64", "codebook3:g64", "codebook2:g32")

    def __post_init__(self) -> None:
        if self.bits * self.vector not in (2, 3, 4, 8) or self.group_size % self.vector:
            raise ValueError(
                f"CodebookFormat: bits * vector must be 2, 3, 4 or 8 and group_size a multiple of vector, got "
                f"bits={self.bits}, vector={self.vector}, group_size={self.group_size}" + see("bad-option")
            )

    @classmethod
    def from_spec(cls, name: str, *options: str) -> CodebookFormat:
        kwargs = parse_options(name, options, {})
        bits, _, vector = name.removeprefix("codebook").partition("v")
        return cls(int(bits), _group_size(name, kwargs), int(vector or 1))

    @cached_property
    def spec(self) -> str:
        return f"codebook{self.bits}{f'v{self.vector}' if self.vector > 1 else ''}:g{self.group_size}"

    @cached_property
    def element(self) -> TableElement:
        return TableElement(self.bits * self.vector, self.vector)

    @cached_property
    def scale_planes(self) -> tuple[Plane, ...]:
        entries = 1 << self.element.bits
        shape = (entries,) if self.vector == 1 else (entries, self.vector)
        return (
            Plane("scale", torch.bfloat16, 1, self.group_size),
            Plane("codebook", torch.bfloat16, None, None, shape=shape),
        )

    def choose_params(self, w: Tensor) -> Planes:
        scale = safe_scale(tile_amax(w, (1, self.group_size)), torch.bfloat16)
        points, weights = self._sample(w, scale.float())
        centres = (
            kmeans_1d(points[:, 0], weights, 1 << self.bits)
            if self.vector == 1
            else kmeans(points, weights, 1 << self.element.bits)
        )
        return {"scale": scale, "codebook": centres.to(torch.bfloat16)}

    def _sample(self, w: Tensor, scale: Tensor, limit: int = 1 << 18) -> tuple[Tensor, Tensor]:
        """At most about `limit` normalized points `(P, vector)` with their weights, from rows evenly spread."""
        count = min(w.shape[0], max(1, limit // max(w.shape[1], 1)))
        rows = torch.linspace(0, w.shape[0] - 1, count, dtype=torch.float32).long().to(w.device)
        s = scale[rows].repeat_interleave(self.group_size, dim=1)[:, : w.shape[1]]
        x = bounded(w[rows].float()) / s
        pad = (0, -w.shape[1] % self.vector)
        points = torch.nn.functional.pad(x, pad).reshape(-1, self.vector)
        weights = torch.nn.functional.pad(s, pad).reshape(-1, self.vector)[:, 0].double()
        top = weights.max().clamp(min=1e-300) if weights.numel() else 1.0
        return points.double(), (weights / top) ** 2


def kmeans_1d(points: Tensor, weights: Tensor, k: int, iterations: int = 25) -> Tensor:
    """Weighted Lloyd iterations on scalars, started at evenly spaced quantiles; deterministic.

    One level is exactly zero, so that a group of zeros decodes to zeros.

    Args:
        points, weights: fp64 `(P,)`.

    Returns:
        fp64 `(k,)`, sorted.
    """
    points, order = points.sort()
    weights = weights[order]
    total = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    moment = torch.cat([weights.new_zeros(1), (weights * points).cumsum(0)])
    at = ((torch.arange(k, dtype=torch.float32, device=points.device) + 0.5) / k * (points.numel() - 1)).long()
    centres = points[at].clone() if points.numel() else points.new_zeros(k)
    for _ in range(iterations):
        cut = torch.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([cut.new_zeros(1), cut, cut.new_full((1,), points.numel())])
        mass = total[edges[1:]] - total[edges[:-1]]
        mean = (moment[edges[1:]] - moment[edges[:-1]]) / mass.clamp(min=1e-300)
        centres = torch.where(mass > 0, mean, centres).sort().values
        centres[centres.abs().argmin()] = 0.0
    return centres


def kmeans(points: Tensor, weights: Tensor, k: int, iterations: int = 12, limit: int = 1 << 15) -> Tensor:
    """Weighted Lloyd iterations on vectors `(P, d)`, started on evenly spaced points sorted by direction and norm.

    Deterministic; entry 0 stays the zero vector, so that a group of zeros decodes to zeros.

    Returns:
        fp64 `(k, d)`.
    """
    step = max(1, points.shape[0] // limit)
    points, weights = points[::step], weights[::step]
    d = points.shape[1]
    key = torch.atan2(points[:, 1], points[:, 0]) + 1e-3 * points.norm(dim=1) if d == 2 else points.norm(dim=1)
    start = points[key.argsort()]
    at = ((torch.arange(k, dtype=torch.float32, device=points.device) + 0.5) / k * max(points.shape[0] - 1, 0)).long()
    centres = start[at].clone() if points.shape[0] else points.new_zeros(k, d)
    for _ in range(iterations):
        centres[0] = 0.0
        nearest = torch.addmm((centres * centres).sum(1) / 2, points, centres.T, alpha=-1).argmin(1)
        mass = torch.zeros(k, dtype=points.dtype, device=points.device).index_add_(0, nearest, weights)
        moment = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(mass[:, None] > 0, moment / mass.clamp(min=1e-300)[:, None], centres)
    centres[0] = 0.0
    return centres
