"""Scales with the least squared error, found by trying clipped ranges: `choose_params` covers the largest weight of a
tile, and a smaller range is finer for all the others.

A candidate is the scale of `choose_params` times a ratio, stored as the format stores it. The ratio clips both ends of
a range with a zero point; there each end is then moved by itself. Last comes the scale that is best for the codes just
found, in closed form: argmin_s sum h (w - s q)^2 = <h q, w> / <h q, q> over the tile (the step of LSQ and of k-means;
for one symmetric bit it is the weighted mean of |w|, XNOR-Net, arXiv:1603.05279).

No family has a branch here. The scale plane's dtype says what can be stored, `effective_scale` what an outer scale and
an offset make of it; both of these, and a codebook, stay as `choose_params` made them, because every tile shares them
and a tile's choice must not worsen another's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats.base import Format, Planes, safe_scale, tile_reduce
from lowbit.formats.fp8 import E4M3

#: Part of the range that candidates keep. Above 1 are those that the largest weight may gain from: 7.5/7, 3.5/3 and
#: 1.5/1 put it on the last positive integer of 4, 3 and 2 bits, 1.5 puts it on 4 instead of 6 of E2M1, and scales that
#: were rounded down have a neighbour above.
SHRINK = (
    1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7, 0.67, 0.64, 0.61, 0.58, 0.55, 0.5, 0.45, 0.4,
    1.03, 7.5 / 7, 3.5 / 3, 1.5,
)  # fmt: skip
REFITS = 2

# `(w, levels, step) -> tensors to be summed`, all `(n, K)`: a weight decodes to level * step.
Terms = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


def search_params(
    w: Tensor, fmt: Format, importance: Tensor | None = None, *, shrink: Sequence[float] = SHRINK
) -> Planes:
    """Scale planes that minimize `sum_k importance[k] * (w - wq)**2` of each tile over the candidates.

    No tile's error is above that of `fmt.choose_params(w)`, which is the first candidate. Outer scales, offsets and
    codebooks are those of `choose_params`.

    Args:
        w: `(N, K)`, any float dtype, finite.
        importance: `(K,)`, not negative, such as the diagonal of X^T X of the layer's inputs; None counts all alike.
        shrink: ratios of the range to try. Scales that are powers of two take the nearest one of each. A tile of very
            many weights with far outliers may want smaller ratios than the default has.

    Raises:
        ValueError: `importance` has a wrong shape or negative or non-finite entries, or a ratio is not above 0.
    """
    if not all(0 < r < math.inf for r in shrink):
        raise ValueError(f"search_params: ratios must be finite and above 0, got {list(shrink)}" + see("bad-option"))
    best = fmt.choose_params(w)
    weight = checked_importance(importance, w)
    if w.numel() == 0:
        return best
    if fmt.plane("scale").dtype == torch.float8_e8m0fnu:  # ratios that would be stored alike are tried once
        shrink = [2.0 ** round(math.log2(r)) for r in shrink]
    ratios = [r for r in dict.fromkeys(shrink) if r != 1]

    def error(params: Planes) -> Tensor:
        return tile_sums(w, fmt, params, lambda w, q, s: [(w - q * s).double().square_() * weight])[0]

    def products(w: Tensor, q: Tensor, s: Tensor) -> list[Tensor]:
        hq = q.double() * weight
        return [hq * w, hq * q]

    least = error(best)
    # Both ends of the range together, then each alone where a zero point lets them differ.
    for low, high in ((1, 1), (0, 1), (1, 0)) if fmt.has("zero_point") else ((1, 1),):
        start = best
        for r in ratios:
            candidate = resized(fmt, start, r**low, r**high)
            best, least = keep_better(fmt, best, least, candidate, error(candidate))
    for _ in range(REFITS):
        candidate = best | {"scale": stored_scale(fmt, best, quotient(fmt, best, *tile_sums(w, fmt, best, products)))}
        best, least = keep_better(fmt, best, least, candidate, error(candidate))
    return best


def checked_importance(importance: Tensor | None, w: Tensor) -> Tensor:
    """fp64 `(K,)` on the device of `w (N, K)`, scaled to a largest entry of 1; ones for None."""
    if importance is None:
        return torch.ones(w.shape[1], dtype=torch.float64, device=w.device)
    if importance.shape != w.shape[1:]:
        raise ValueError(
            f"importance must have one entry per column, shape {tuple(w.shape[1:])}, got {tuple(importance.shape)}"
            + see("input-mismatch")
        )
    out = importance.detach().to(w.device, torch.float64)
    if not bool((out.isfinite() & (out >= 0)).all()):
        raise ValueError("importance must be finite and not negative" + see("input-mismatch"))
    return out / out.max().clamp(min=1e-300) if out.numel() else out


def tile_sums(w: Tensor, fmt: Format, params: Planes, terms: Terms) -> list[Tensor]:
    """`terms` of `w (N, K)`, rounded to nearest under `params`, summed over each tile of the scale plane in fp64.

    Works on a few rows at a time, so that temporaries stay small whatever the size of `w`.
    """
    plane, (n, k) = fmt.plane("scale"), w.shape
    out: list[Tensor] = []
    for start, stop in fmt.row_blocks(n, k):
        rows, part = w[start:stop].detach().float(), fmt.slice_planes(params, 0, start, stop)
        levels = fmt.levels(fmt.encode(rows, part), part, k)
        step = fmt.scaled(torch.ones_like(levels), part)
        sums = [tile_reduce(t, plane.tile, lambda t: t.sum(1, dtype=torch.float64)) for t in terms(rows, levels, step)]
        if not out:
            out = [s.new_zeros(plane.shape_for(n, k)) for s in sums]
        for total, s in zip(out, sums):
            (total if plane.n is None else total[start // plane.n : -(-stop // plane.n)]).add_(s)
    return out


def resized(fmt: Format, params: Planes, low: float, high: float) -> Planes:
    """`params` for a range whose ends below and above zero are `low` and `high` times as far out.

    Without a zero point both ends are one, and `high` counts.
    """
    scale, tile = fmt.effective_scale(params)
    if not fmt.has("zero_point"):
        return params | {"scale": stored_scale(fmt, params, scale * high)}
    assert fmt.plane("zero_point").tile == tile
    zero_point, top = params["zero_point"].float(), (1 << fmt.element.bits) - 1
    below, above = zero_point * low, (top - zero_point) * high
    out = params | {"scale": stored_scale(fmt, params, scale * ((below + above) / top))}
    below = below * (scale / fmt.effective_scale(out)[0])
    return out | {"zero_point": below.round_().clamp_(0, top).to(params["zero_point"].dtype)}


def quotient(fmt: Format, params: Planes, across: Tensor, square: Tensor) -> Tensor:
    """The least-squares scale `across / square` of each tile; where that is no number, the scale that it has."""
    scale = (across / square).float()
    return torch.where(scale.isfinite(), scale, fmt.effective_scale(params)[0])


def stored_scale(fmt: Format, params: Planes, target: Tensor) -> Tensor:
    """The scale plane whose effective scale is nearest to `target`, as far as its dtype reaches.

    The inverse of `effective_scale` under the outer scale and the offset of `params`.
    """
    offset = fmt.effective_scale(params | {"scale": torch.zeros_like(target)})[0]
    unit = fmt.effective_scale(params | {"scale": torch.ones_like(target)})[0] - offset
    x, dtype = (target - offset) / unit, fmt.plane("scale").dtype
    if dtype == torch.int8:
        return x.nan_to_num_().round_().clamp_(-127, 127).to(dtype)
    if dtype == torch.float8_e8m0fnu:  # the exponent, with a bias of 127
        return (x.clamp_(2.0**-127, 2.0**127).log2_().round_() + 127).to(torch.uint8).view(dtype)
    if dtype == torch.float8_e4m3fn:
        return x.clamp_(E4M3.min_subnormal, E4M3.max).to(dtype)
    return safe_scale(x, dtype)


def keep_better(fmt: Format, best: Planes, least: Tensor, params: Planes, loss: Tensor) -> tuple[Planes, Tensor]:
    """Of each tile the planes with the smaller loss, and that loss. A scale that is not above 0 is never better."""
    better = (loss < least) & (fmt.effective_scale(params)[0] > 0)  # NaN compares as False
    out = dict(best)
    for name in ("scale", "zero_point"):
        if name in best:
            kept, other = best[name], params[name]
            # Bytes: torch.where does not take every float8.
            whole = (kept.view(torch.uint8), other.view(torch.uint8)) if kept.dtype.itemsize == 1 else (kept, other)
            out[name] = torch.where(better, whole[1], whole[0]).view(kept.dtype)
    return out, torch.where(better, loss, least)
