"""Alignment: weights that give the original's output for the inputs that quantized layers before them make.

Once earlier layers are quantized, a layer meets X where the original met X0. What its weight should be is the least
squares solution of

    min_W'  || X W'^T - X0 W^T ||^2  +  damp mean(diag H) || W' - W ||^2,      H = X^T X

in closed form `W' = W + W C (H + damp mean(diag H) I)^-1` with `C = (X0 - X)^T X`: Arai and Ichikawa, "Quantization
Error Propagation: Revisiting Layer-Wise Post-Training Quantization", arXiv:2504.09629. Rounding W' by an algorithm that
minimizes `tr((W' - Wq) H (W' - Wq)^T)` then minimizes the distance to the original's output, since what of X0 is
orthogonal to X is lost either way; GPTAQ (Li et al., arXiv:2504.02692) puts C into the columns of GPTQ one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.errors import see


def aligned(w: Tensor, hessian: Tensor, drift: Tensor, *, damp: float = 0.05) -> Tensor:
    """W' as above, fp32 `(N, K)`.

    Args:
        w: `(N, K)`.
        hessian: `(K, K)`, `X^T X`.
        drift: `(K, K)`, `(X0 - X)^T X`, over the same tokens and in the same unit.
        damp: above 0. Larger stays nearer to W, which few tokens need.

    Raises:
        ValueError: damp is not above 0 or shapes do not fit.
    """
    k = w.shape[1]
    if not 0 < damp < math.inf:
        raise ValueError(f"aligned: damp must be finite and above 0, got {damp}" + see("bad-option"))
    if not hessian.shape == drift.shape == (k, k):
        raise ValueError(
            f"aligned: a weight {tuple(w.shape)} needs H and drift of shape ({k}, {k}), got {tuple(hessian.shape)} and "
            f"{tuple(drift.shape)}" + see("input-mismatch")
        )
    w = w.detach().float()
    mean = hessian.diagonal().double().mean()
    if not mean > 0:
        return w
    damped = hessian.double() / mean
    damped.diagonal().add_(damp)
    target = (w @ drift).double() / mean
    return w + torch.cholesky_solve(target.T, torch.linalg.cholesky(damped)).T.float()
