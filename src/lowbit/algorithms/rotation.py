"""Rotations that make weights incoherent: no channel stands out any more, and fewer levels serve all of them.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456; Liu et al., "SpinQuant: LLM
Quantization with Learned Rotations", arXiv:2405.16406. An RMSNorm without a weight commutes with an orthogonal Q, since
`|x Q| = |x|`. So the whole residual stream can be turned: what writes to it is multiplied by Q, what reads from it by
Q^T, and the function stays (R1, SpinQuant section 3.1). Likewise v and o within each head (R2).

With `W (N, K)` and `y = W x`: a reader becomes `W Q`, a writer `Q^T W`, for a stream of rows `x Q`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.errors import see


def hadamard(n: int) -> Tensor:
    """Sylvester's orthogonal matrix of +-1/sqrt(n), fp64 `(n, n)`.

    Raises:
        ValueError: n is no power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: n must be a power of two, got {n}; random_rotation takes any" + see("bad-option"))
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(n)


def random_rotation(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, fp64 `(n, n)`: random signs, then Hadamard's over the power of two in n, Kronecker a
    random orthogonal matrix over the odd factor (576 = 9 * 64).

    Signs make the rotation random (QuaRot section 3: "randomized Hadamard"). Every row of the result is spread over all
    columns.
    """
    generator = torch.Generator().manual_seed(seed)
    two = n & -n
    odd, r = torch.linalg.qr(torch.randn(n // two, n // two, generator=generator, dtype=torch.float64))
    odd = odd * r.diagonal().sign()  # else the distribution depends on how qr chooses signs
    signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    return signs * torch.kron(odd.contiguous(), hadamard(two))


def rotated_reader(w: Tensor, q: Tensor, gain: Tensor | None = None) -> Tensor:
    """fp64 `W diag(gain) Q` of `w (N, K)`: reads `x Q` after a norm whose weight `gain (K,)` is folded in.

    A smaller `q (h, h)` turns each h columns alike.
    """
    w = w.double() if gain is None else w.double() * gain.double()
    return (w.reshape(w.shape[0], -1, q.shape[0]) @ q).flatten(1)


def rotated_writer(w: Tensor, q: Tensor) -> Tensor:
    """fp64 `Q^T W` of `w (N, K)` or a bias `(N,)`: writes `y Q`. A smaller `q (h, h)` turns each h rows alike."""
    rows = w.double().reshape(-1, q.shape[0], w.shape[1] if w.dim() == 2 else 1)
    out: Tensor = (q.T @ rows).reshape(w.shape)
    return out
