"""What every number format is made of: planes, an element, scales, and one name.

A format maps a weight `W (N, K)` to a handful of stored tensors (*planes*) and back:

    W[n, k]  ~  (level(code[n, k]) - zero_point[n', k']) * scale[n', k']

`level` is the format's *element* (integers, a small float, a table), and a scale belongs to a tile of weights.
Everything here is derived from those declarations: storage, slicing, bits per weight, dequantization and what
kernels load. A new format is a frozen dataclass with a `spec`, an `element`, its scale planes and
`choose_params`; nothing else needs to hear of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.elements import Element

Planes = dict[str, Tensor]
Tile = tuple[int | None, int | None]

# Smallest normal fp32. Scales never go below it, so that 1/scale and w/scale stay finite.
MIN_SCALE = 2.0**-126
# Scales are chosen as if no weight were larger, so that every level times its scale is finite in fp32 (a float may be
# rounded up to the next power of two; one asymmetric bit spans twice the largest weight).
LARGEST_WEIGHT = 2.0**126
# Rows are encoded in chunks of about this many weights: the temporaries of a quantization stay small and in cache.
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Plane:
    """One stored tensor of a format.

    `n` and `k` say how many weights along N and K one stored element covers; `None` means that the plane is not
    tiled along that axis (its size there is 1). `shape` replaces both for planes that belong to the whole tensor
    (a codebook).
    """

    name: str
    dtype: torch.dtype
    n: int | None
    k: int | None
    shape: tuple[int, ...] | None = None

    def shape_for(self, n: int, k: int) -> tuple[int, ...]:
        """Stored shape for a weight `(n, k)`. A last, partial tile counts as a whole one."""
        if self.shape is not None:
            return self.shape
        return (1 if self.n is None else -(-n // self.n), 1 if self.k is None else -(-k // self.k))

    @property
    def tile(self) -> Tile:
        return (self.n, self.k)

    @property
    def bits_per_weight(self) -> float:
        """Bits this plane adds to one weight of a large tensor."""
        if self.shape is not None or self.n is None or self.k is None:
            return 0.0
        return 8 * self.dtype.itemsize / (self.n * self.k)


@dataclass(frozen=True)
class Format(ABC):
    """The meaning of a quantized tensor's bits. Immutable, hashable, and rebuilt from its `spec` string."""

    #: Specs that stand for the family in tests, `doctor` and the documentation.
    examples: ClassVar[tuple[str, ...]] = ()

    # What a family declares ----------------------------------------------------------------------

    @property
    @abstractmethod
    def spec(self) -> str:
        """The canonical short name; `parse_format(spec)` gives an equal format."""

    @property
    @abstractmethod
    def element(self) -> Element:
        """What one code means before scaling."""

    @property
    @abstractmethod
    def scale_planes(self) -> tuple[Plane, ...]:
        """Everything stored beside the codes: `scale` first, then `zero_point`, `outer_scale`, `scale_offset`,
        `codebook` where the format has them.

        The scale of a weight is `scale * outer_scale + scale_offset` in fp32.
        """

    @abstractmethod
    def choose_params(self, w: Tensor) -> Planes:
        """Round-to-nearest choice of the scale planes for `w (N, K)`, any float dtype, finite."""

    #: Lowest SQNR in dB of a kernel against fp64 arithmetic on the dequantized weights, bf16 in and out, whatever the
    #: input. The decoded weight and the output are each rounded to bf16, by at most 2**-9; where one product dominates
    #: the errors of both add up to 2**-8 (48 dB), and 2 dB are left for outputs in which larger terms cancel.
    kernel_sqnr_db: ClassVar[float] = 46.0

    # What follows from it ------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.spec

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """All stored tensors: code planes first, then the scale planes."""
        e = self.element
        codes = tuple(Plane(name, dtype, 1, e.vector * (8 // width)) for name, width, dtype in e.code_planes)
        return codes + self.scale_planes

    @cached_property
    def plane_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.planes)

    def has(self, name: str) -> bool:
        """Whether the format stores a plane of this name."""
        return name in self.plane_names

    def plane(self, name: str) -> Plane:
        """The declaration of a plane that the format `has`."""
        return self.planes[self.plane_names.index(name)]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a large tensor, scales and zero points included."""
        return sum(p.bits_per_weight for p in self.planes)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """The smallest tile `(n, k)` that can be cut out: the least common multiple over the planes."""
        return (
            math.lcm(*(p.n or 1 for p in self.planes if p.shape is None)),
            math.lcm(*(p.k or 1 for p in self.planes if p.shape is None)),
        )

    def nbytes(self, n: int, k: int) -> int:
        """Exact bytes of all planes for a weight `(n, k)`."""
        return sum(math.prod(p.shape_for(n, k)) * p.dtype.itemsize for p in self.planes)

    def quantize(self, w: Tensor, params: Planes | None = None, *, check_finite: bool = True) -> Planes:
        """Quantize `w (N, K)` to planes, rounding to nearest.

        Args:
            w: 2-D, any float dtype, every value finite.
            params: scale planes to use instead of `choose_params(w)` (what an algorithm or a calibration found).
            check_finite: off for activations, where the check would wait for the device; a NaN or Inf then makes
                every value that shares its scale NaN.

        Raises:
            ValueError: `w` is not 2-D, or holds NaN or Inf.
        """
        if w.dim() != 2:
            raise ValueError(
                f"{self.spec}: quantize takes a 2-D weight (N, K), got shape {tuple(w.shape)}" + see("input-mismatch")
            )
        if not w.is_floating_point():
            raise ValueError(f"{self.spec}: quantize takes a float tensor, got {w.dtype}" + see("input-mismatch"))
        if check_finite and (bad := count_nonfinite(w)):
            raise ValueError(
                f"{self.spec}: the weight holds {bad} NaN or Inf values; quantize needs finite numbers"
                + see("nonfinite-weight")
            )
        w = w.detach()
        params = self.choose_params(w) if params is None else params
        out = {p.name: torch.empty(p.shape_for(*w.shape), dtype=p.dtype, device=w.device) for p in self.code_planes}
        for start, stop in self.row_blocks(*w.shape):
            codes = self.encode(w[start:stop].float(), self.slice_planes(params, 0, start, stop))
            for name, plane in self.element.pack(codes).items():
                out[name][start:stop].view(torch.uint8).copy_(plane.view(torch.uint8))
        return out | {p.name: params[p.name] for p in self.scale_planes}

    def dequantize(self, planes: Mapping[str, Tensor], n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `(n, k)` that the planes stand for, computed in fp32 and rounded once to `dtype`."""
        codes = self.element.unpack(planes, -(-k // self.element.vector))
        return self.scaled(self.levels(codes, planes, k), planes).to(dtype)

    def dequantize_rows(
        self, planes: Mapping[str, Tensor], start: int, stop: int, k: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Rows `start..stop` alone, bounds on tile boundaries or at the end."""
        return self.dequantize(self.slice_planes(planes, 0, start, stop), stop - start, k, dtype)

    def row_blocks(self, n: int, k: int, elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
        """Bounds of consecutive rows, on tile boundaries, of about `elements` weights each."""
        step = max(1, elements // max(k, 1) // self.tile[0]) * self.tile[0]
        return ((i, min(i + step, n)) for i in range(0, n, step))

    def encode(self, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """uint8 codes `(N, ceil(K / vector))` of `w (N, K)` fp32 under the scale planes `params`."""
        scale, tile = self.effective_scale(params)
        x = self._tiled(torch.div, w, scale, tile)
        if "zero_point" in params:
            zp = self.plane("zero_point")
            x = self._tiled(torch.add, x.round_(), params["zero_point"].float(), zp.tile)
        return self.element.encode(x, params)

    def levels(self, codes: Tensor, planes: Mapping[str, Tensor], k: int) -> Tensor:
        """fp32 `(N, k)`: level - zero point of uint8 codes, what is left to be multiplied by the scale."""
        values = self.element.decode(codes, planes)[:, :k]
        if "zero_point" not in planes:
            return values
        return self._tiled(torch.sub, values, planes["zero_point"].float(), self.plane("zero_point").tile)

    def scaled(self, levels: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        """`levels` fp32 `(n, k)` times the effective scale of each tile."""
        scale, tile = self.effective_scale(planes)
        return self._tiled(torch.mul, levels, scale, tile)

    @cached_property
    def code_planes(self) -> tuple[Plane, ...]:
        return self.planes[: len(self.element.code_planes)]

    def effective_scale(self, planes: Mapping[str, Tensor]) -> tuple[Tensor, Tile]:
        """fp32 scale per tile of `scale`, outer scale and offset applied, and that tile `(n, k)`."""
        plane = self.plane("scale")
        scale = planes["scale"].float()
        if "outer_scale" in planes:
            outer, o = planes["outer_scale"].float(), self.plane("outer_scale")
            if o.k is not None and plane.k is not None:
                outer = outer.repeat_interleave(o.k // plane.k, dim=1)[:, : scale.shape[1]]
            scale = scale * outer
        if "scale_offset" in planes:
            scale = scale + planes["scale_offset"].float()
        return scale, plane.tile

    def slice_planes(self, planes: Mapping[str, Tensor], dim: int, start: int, stop: int) -> Planes:
        """Views of the planes that hold weights `start..stop` along `dim` (0: N, 1: K); no alignment check."""
        out = {}
        for p in self.planes:
            if p.name in planes:
                size = (p.n, p.k)[dim]
                t = planes[p.name]
                if p.shape is None and size is not None:
                    t = t.narrow(dim, start // size, -(-stop // size) - start // size)
                out[p.name] = t
        return out

    def join_planes(self, parts: Sequence[Mapping[str, Tensor]], rows: Sequence[int]) -> Planes:
        """The planes of weights with the same K put below each other: what `slice_planes` along N takes apart.

        Args:
            parts: the planes of each weight.
            rows: N of each.

        Raises:
            ValueError: the joint weight would not have the same values: parts have different scales or tables where
                the format holds one for the whole tensor, or a part ends inside a tile.
        """
        out = {}
        for p in self.planes:
            held = [part[p.name] for part in parts]
            if p.shape is not None or p.n is None:
                if any(not torch.equal(held[0].view(torch.uint8), t.view(torch.uint8)) for t in held[1:]):
                    raise ValueError(
                        f"{self.spec} holds one {p.name} for a whole tensor, and the parts have different ones"
                        + see("cut-inside-tile")
                    )
                out[p.name] = held[0]
                continue
            if any(n % p.n for n in rows[:-1]):
                raise ValueError(
                    f"{self.spec} stores tiles of {p.n} rows, and parts of {', '.join(map(str, rows))} rows do not end "
                    "with one" + see("cut-inside-tile")
                )
            # Not every one-byte float has a `cat`; their bytes have.
            kind = torch.uint8 if p.dtype.itemsize == 1 else p.dtype
            out[p.name] = torch.cat([t.view(kind) for t in held]).view(p.dtype)
        return out

    # Internals -----------------------------------------------------------------------------------

    @staticmethod
    def _tiled(op: Callable[[Tensor, Tensor], Tensor], w: Tensor, s: Tensor, tile: Tile) -> Tensor:
        """`op(w, s)` with each element of `s` applied to its tile of `w (n, k)`, or to its row if it has n rows."""
        n, k = w.shape
        tn, tk = tile[0] or n, tile[1] or k
        if s.shape[0] not in (1, n):
            s = s.repeat_interleave(tn, dim=0)[:n]
        if s.shape[1] == 1:
            return op(w, s)
        whole = k - k % tk
        if whole == k:
            return op(w.reshape(n, k // tk, tk), s.unsqueeze(-1)).reshape(n, k)
        return op(w, s.repeat_interleave(tk, dim=1)[:, :k])


def count_nonfinite(w: Tensor) -> int:
    """How many values of `w` are NaN or Inf, looked at a few rows at a time."""
    step = max(1, CHUNK_ELEMENTS * w.shape[0] // max(w.numel(), 1))
    return sum(int(rows.isfinite().logical_not_().sum()) for rows in w.split(step)) if w.numel() else 0


def tile_reduce(w: Tensor, tile: Tile, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each tile of `w (N, K)` to one number; partial tiles at the edges are padded with zeros.

    `reduce` maps `(tiles, elements)` to `(tiles,)`. Returns `(ceil(N/n), ceil(K/k))`, fp64 where `reduce` gives
    that and fp32 otherwise.
    """
    n, k = w.shape
    tn, tk = tile[0] or max(n, 1), tile[1] or max(k, 1)
    gn, gk = -(-n // tn) if tile[0] else 1, -(-k // tk) if tile[1] else 1
    if gn * tn != n or gk * tk != k:
        w = torch.nn.functional.pad(w, (0, gk * tk - k, 0, gn * tn - n))
    tiles = w.reshape(gn, tn, gk, tk).transpose(1, 2).reshape(gn * gk, tn * tk)
    out = reduce(tiles).reshape(gn, gk)
    return out if out.dtype == torch.float64 else out.float()


def tile_amax(w: Tensor, tile: Tile) -> Tensor:
    """Largest magnitude of each tile, fp32, at most `LARGEST_WEIGHT`."""
    if w.numel() == 0:
        return tile_reduce(w, tile, lambda t: t.new_zeros(t.shape[0]))
    return bounded(tile_reduce(w, tile, lambda t: torch.maximum(t.amax(1), -t.amin(1))))


def bounded(x: Tensor) -> Tensor:
    """Finite numbers brought to within +-`LARGEST_WEIGHT`; NaN and Inf stay."""
    return torch.where(x.isinf(), x, x.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT))


def divide(x: Tensor, number: float) -> Tensor:
    """`x / number`, rounded once on every device: CUDA multiplies by the rounded inverse of a Python number."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def safe_scale(scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales as stored: 1 for a tile of zeros, otherwise from the smallest normal number to the largest of `dtype`.

    NaN and Inf pass through: an activation that holds one must not come out as a number.
    """
    kept = scale.float().clamp(max(MIN_SCALE, torch.finfo(dtype).tiny), torch.finfo(dtype).max)
    return torch.where(scale == 0, 1.0, torch.where(scale.isinf(), scale.float(), kept)).to(dtype)


# The registry ------------------------------------------------------------------------------------

_FAMILIES: dict[str, Callable[..., Format]] = {}
_EXAMPLES: list[str] = []
F = TypeVar("F", bound=type[Format])


def register(*names: str, parse: Callable[..., Format] | None = None) -> Callable[[F], F]:
    """Class decorator: specs whose first word is in `names` build this family.

    `parse(name, *options)` turns the `:`-separated words into a format; the default is the class's `from_spec`.
    """

    def add(cls: F) -> F:
        for name in names:
            if name in _FAMILIES:
                raise ValueError(f"format name {name!r} is taken by another family" + see("format-name-taken"))
            _FAMILIES[name] = parse or cls.from_spec  # type: ignore[attr-defined]
        _EXAMPLES.extend(cls.examples)
        return cls

    return add


def unregister(*names: str) -> None:
    """Forget families, for tests that register their own."""
    for name in names:
        _FAMILIES.pop(name, None)
        _EXAMPLES[:] = [s for s in _EXAMPLES if s.split(":")[0] != name]
    parse_format.cache_clear()


@cache
def parse_format(spec: str) -> Format:
    """The format named by a spec such as `int4:g128`, `float8_e4m3:row`, `mxfp4`, `nf4:g64:dq`.

    Raises:
        ValueError: unknown family or option; the message lists what exists.
    """
    name, *options = spec.split(":")
    if name not in _FAMILIES:
        raise ValueError(f"unknown format {spec!r}; families: {', '.join(sorted(_FAMILIES))}" + see("unknown-format"))
    return _FAMILIES[name](name, *options)


def families() -> tuple[str, ...]:
    """The first words that specs can have."""
    return tuple(sorted(_FAMILIES))


def registered() -> tuple[Format, ...]:
    """One format per registered example: what registry-driven tests, `doctor` and the docs iterate over."""
    return tuple(parse_format(s) for s in dict.fromkeys(_EXAMPLES))
