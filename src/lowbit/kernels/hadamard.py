"""The Hadamard transform of rows, in PyTorch: an orthogonal T with `T = T^T = T^-1` for every size, stored nowhere.

For K a power of two, T is Sylvester's matrix of +-1/sqrt(K). For others, T is the Kronecker product of Hartley's matrix
over the odd factor o of K, `(cos + sin)(2 pi i j / o) / sqrt(o)`, and Sylvester's over the rest (1536 = 3 * 512): no
entry is larger than sqrt(2 / K), so that no channel stands out, and the fast transform's `K log K` stays.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def factors(k: int) -> tuple[int, int]:
    """The odd factor of K and the power of two beside it."""
    two = k & -k
    return k // two, two


@cache
def hartley(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hartley's orthogonal matrix `(n, n)`, symmetric."""
    with torch.inference_mode(False):
        i = torch.arange(n, dtype=torch.int64)
        angle = (i[:, None] * i % n).double() * (2 * math.pi / n)
        return ((angle.cos() + angle.sin()) / math.sqrt(n)).to(device, dtype)


def transformed(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    """The definition of `lowbit.hadamard` (decoder_ops.py): `(x * signs) T`, or `(x T) * signs` for its inverse.

    Sums are in fp32 (fp64 for fp64), pairs at distance 1, 2, 4, ... one after the other, so that every kernel that adds
    the same pairs has the same bits where K is a power of two.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    odd, two = factors(x.shape[-1])
    if signs is not None and not inverse:
        wide = wide * signs
    rows, h = wide.reshape(-1, two), 1
    while h < two:
        a, b = rows.view(-1, two // (2 * h), 2, h).unbind(2)
        rows, h = torch.stack((a + b, a - b), 2).view(-1, two), 2 * h
    if odd > 1:
        rows = hartley(odd, x.device, wide.dtype) @ rows.view(-1, odd, two)
    v: Tensor = rows.reshape(x.shape) * two**-0.5
    if signs is not None and inverse:
        v = v * signs
    return v.to(x.dtype)
