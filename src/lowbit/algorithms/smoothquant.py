"""SmoothQuant: moves what is hard to quantize from activations to weights, one scale per input channel.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438. A linear's output stays when inputs are divided and the weight's columns multiplied by s (equation 3);
a few channels of large activations then no longer take the range of all.

The paper has one alpha for a model and finds it by trying (section 4.2). Here it is found for each input of each layer,
as the one with the least error of the quantized product on some tokens, rounding of both operands included. No scale
at all is among those that are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowbit.algorithms.qat import fake_quantize
from lowbit.errors import see
from lowbit.formats.activation import Activation
from lowbit.formats.base import Format

#: The values of alpha that are tried.
GRID = tuple(i / 10 for i in range(11))


def smooth_scale(weights: Sequence[Tensor], amax: Tensor, alpha: float = 0.5) -> Tensor:
    """`s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (equation 4), fp32 `(K,)`; 1 where inputs or weights are all zero.

    Args:
        weights: `(N_i, K)` of all linears that read the input.
        amax: `(K,)`, the largest magnitude seen in each channel.
        alpha: from 0 (all of the difficulty stays in the activations) to 1 (all goes to the weights).

    Raises:
        ValueError: alpha is not from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth_scale: alpha must be from 0 to 1, got {alpha}" + see("bad-option"))
    largest = torch.stack([w.detach().float().abs().amax(0) for w in weights]).amax(0)
    s = amax.to(largest).pow(alpha) / largest.pow(1 - alpha)
    return torch.where((s > 0) & s.isfinite(), s, 1.0)


def least_error_scale(
    weights: Sequence[tuple[Tensor, Format, Activation | None]],
    x: Tensor,
    candidates: Iterable[Tensor],
    share: Tensor | None = None,
) -> Tensor:
    """Of ones and `candidates` (fp32 `(K,)` each), the scale s with the least

        sum over weights of  || share * (Qa(x / s) Qw(W s)^T - x W^T) ||^2

    Args:
        weights: each `(N_i, K)` that reads the input, with the formats that it and its input will have.
        x: `(M, K)`, some tokens.
        share: `(M, 1)`, how much each token counts.

    Raises:
        ValueError: shapes do not fit.
    """
    k = x.shape[1]
    if any(w.shape[1:] != (k,) for w, _, _ in weights):
        raise ValueError(
            f"least_error_scale: weights (N, {k}) are needed for inputs {tuple(x.shape)}, got "
            f"{[tuple(w.shape) for w, _, _ in weights]}" + see("input-mismatch")
        )
    x, best, least = x.float(), torch.ones(k, dtype=torch.float32, device=x.device), float("inf")
    wanted = [x @ w.float().T for w, _, _ in weights]
    for s in (best, *candidates):
        error = 0.0
        for (w, fmt, act), y in zip(weights, wanted):
            scaled, rounded = x / s, fake_quantize(w.float() * s, fmt)
            e = (scaled if act is None else fake_quantize(scaled, act)) @ rounded.T - y
            error += float((e if share is None else e * share).square().sum(dtype=torch.float64))
        if error < least:
            best, least = s, error
    return best
