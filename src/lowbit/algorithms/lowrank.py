"""Low-rank error correction: two thin matrices beside a quantized weight that give back most of what rounding lost.

For an error `E = W - Wq` and inputs X with `H = X^T X`, the product of rank r that leaves the least output error

    min over B (N, r), A (r, K)  of  || X (E - B A)^T ||^2  =  tr((E - B A) H (E - B A)^T)

comes from the singular value decomposition of `E H^(1/2)`: its r largest singular values are taken away, and what is
left is the sum of the squares of the others (Eckart and Young, 1936). Zhang et al., "QERA: an Analytical Framework for
Quantization Error Reconstruction", arXiv:2410.06040 (theorem 1); with the diagonal of H alone it is L2QER of Zhang et
al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs", arXiv:2402.02446 (section 3.2), and with the identity
in its place LoRC of Yao et al., "ZeroQuant-V2", arXiv:2303.08302 (section 5).

No root of H is taken back here: with `E H^(1/2) = U S V^T`, the best product is `B A = U_r U_r^T E`, so that `B = U_r`
and `A = U_r^T E`. H may therefore be singular, as it is where channels met no input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import see


def low_rank(error: Tensor, rank: int, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`A (rank, K)` and `B (N, rank)`, fp32, with the least error as above; B has orthonormal columns.

    Args:
        error: `(N, K)`, the weight less what its codes stand for.
        rank: from 1 to the smaller of N and K.
        hessian: `(K, K)`, `X^T X` of the inputs or any positive multiple of it; None counts all channels alike.

    Raises:
        ValueError: the rank is out of range, or shapes do not fit.
    """
    n, k = error.shape
    if not 1 <= rank <= min(n, k):
        raise ValueError(f"low_rank: a ({n}, {k}) error has ranks 1 to {min(n, k)}, got {rank}" + see("bad-option"))
    if hessian is not None and hessian.shape != (k, k):
        raise ValueError(
            f"low_rank: an error ({n}, {k}) needs a Hessian ({k}, {k}), got {tuple(hessian.shape)}"
            + see("input-mismatch")
        )
    e = error.detach().double()
    h = None if hessian is None else hessian.to(e)
    # The eigenvectors of the smaller of the two products of E H^(1/2) with itself; fp64, because it squares.
    if n <= k:
        b = _largest((e if h is None else e @ h) @ e.T, rank)
    else:
        seen = e if h is None else e @ _root(h)
        # Orthonormal but for the length of each column, and where that is nothing, all the same.
        b = torch.linalg.qr(seen @ _largest(seen.T @ seen, rank))[0]
    return (b.T @ e).float(), b.float()


def _largest(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors `(n, count)` of the largest eigenvalues, which come last."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -count:].flip(1)


def _root(h: Tensor) -> Tensor:
    """Some S with `S S^T = H`."""
    values, vectors = torch.linalg.eigh(h)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
