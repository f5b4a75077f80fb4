"""SmoothQuant: moves what is hard to quantize from activations to weights, one scale per input channel.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438. A linear's output stays when inputs are divided and the weight's columns multiplied by s (equation 3);
a few channels of large activations then no longer take the range of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import see


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
