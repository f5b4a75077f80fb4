"""Half-quadratic quantization: scales and zero points for a robust norm of the weights' error, without data.

H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023
(https://mobiusml.github.io/hqq_blog/). Sought is argmin over the scale s and the zero point z of sum |W - Wq|^p with
p < 1, which lets few weights be far off where the squared error would not. With an auxiliary error E the problem splits
into two that are solved in turns, beta growing by kappa each time:

    E    <- shrink(W - Wq, beta) = sign(x) max(|x| - |x|^(p-1) / beta, 0)    generalized soft threshold (l_p, p <= 1)
    z    <- mean(Q - (W - E) / s)                                            closed form, codes Q fixed
    s    <- <Q - z, W - E> / <Q - z, Q - z>                                  closed form, codes Q fixed

The paper moves a zero point of any value and leaves s alone. Two things differ here:

- Zero points are stored as integers, so z is rounded, and s moves as well, which needs no zero point: the split holds
  for any element whose levels are multiplied by a scale. Nearly all of the gain comes from s. A rounded z stayed where
  `choose_params` puts it in every tile that was tried (1, 2, 4 and 8 bits; heavy tails, outlier columns, one-sided
  weights): the mean of Q - (W - E) / s is less than half a step away. Left unrounded until the end, z gave a larger
  l_p error than s alone (0.965 against 0.959 of rounding to nearest, int4:g64:asym, Student-t weights, p = 0.7).
- x is measured in steps of the tile, (W - Wq) / s, so that beta means the same for large and small weights. In the
  weights' own unit the threshold takes every error of an ordinary layer (|x| = 0.002 needs beta > 3000), E is always 0,
  and what is left is least squares.

What is kept is the best that was seen, by the l_p error of the planes as stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.algorithms.search import keep_better, quotient, stored_scale, tile_sums
from lowbit.errors import see
from lowbit.formats.base import Format, Planes


def hqq_params(
    w: Tensor, fmt: Format, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20
) -> Planes:
    """Scale planes that lower `sum |w - wq|**p` of each tile; a tile's sum is never above that of `choose_params(w)`.

    Outer scales, offsets and codebooks are those of `choose_params`. Scales that are powers of two rarely move: the
    closed form seldom comes nearer to another one.

    Args:
        w: `(N, K)`, any float dtype, finite.
        p: above 0, at most 1; smaller cares less about the largest errors.
        beta: weight of the auxiliary error, for errors measured in steps of the tile.
        kappa: factor of `beta` per iteration, at least 1.
        iterations: how many scales and zero points are tried.

    Raises:
        ValueError: an option is out of its range.
    """
    if not (0 < p <= 1 and 0 < beta < math.inf and 1 <= kappa < math.inf and iterations >= 0):
        raise ValueError(
            f"hqq_params: needs 0 < p <= 1, beta > 0, kappa >= 1 and iterations >= 0, got p={p}, beta={beta}, "
            f"kappa={kappa}, iterations={iterations}" + see("bad-option")
        )

    def terms(w: Tensor, q: Tensor, s: Tensor) -> list[Tensor]:
        error, q, s = (w - q * s).double(), q.double(), s.double()
        target = w - shrink(error / s, beta, p) * s
        return [error.abs().pow_(p), q * target, q * q, q - target / s, torch.ones_like(q)]

    best = params = fmt.choose_params(w)
    if w.numel() == 0:
        return best
    least, *sums = tile_sums(w, fmt, params, terms)
    for _ in range(iterations):
        params = updated(fmt, params, *sums)
        beta *= kappa
        loss, *sums = tile_sums(w, fmt, params, terms)
        best, least = keep_better(fmt, best, least, params, loss)
    return best


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalized soft threshold: nearly argmin_e |e|^p + beta/2 (e - x)^2, and exactly for p = 1."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)


def updated(fmt: Format, params: Planes, across: Tensor, square: Tensor, shift: Tensor, count: Tensor) -> Planes:
    """Both closed forms for the codes that `params` gave, rounded to what is stored."""
    out = params | {"scale": stored_scale(fmt, params, quotient(fmt, params, across, square))}
    if fmt.has("zero_point"):
        zero_point, top = params["zero_point"], (1 << fmt.element.bits) - 1
        moved = zero_point + (shift / count).nan_to_num_()
        out["zero_point"] = moved.round_().clamp_(0, top).to(zero_point.dtype)
    return out
