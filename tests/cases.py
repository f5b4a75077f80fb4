"""What the registry-driven tests share: every registered format, weights of several kinds, and signal-to-noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.formats import Format, registered

FORMATS = registered()
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
KINDS = ("normal", "student_t", "outlier_channels", "zeros", "denormal")


def weights(kind: str, n: int, k: int, seed: int = 0) -> Tensor:
    """fp32 `(n, k)`: a bell, heavy tails, a few large columns, a bell with zero runs, numbers at the end of fp32."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.02
    if kind == "student_t":
        chi = torch.randn(3, n, k, generator=g).square().sum(0)
        w = w / (chi / 3).sqrt()
    elif kind == "outlier_channels":
        w[:, torch.randperm(k, generator=g)[: max(1, k // 50)]] *= 60
    elif kind == "zeros":
        w[:, : k // 2] = 0
        w[n // 2 :: 3] = 0
    elif kind == "denormal":
        w = w * 2.0 ** torch.randint(-149, -118, (n, 1), generator=g)
    return w


def quantized(fmt: Format, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedTensor:
    return QuantizedTensor.from_float(weights("normal", n, k, seed).to(dtype), fmt)


def sqnr_db(signal: Tensor, got: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite where nothing is lost."""
    s, noise = signal.detach().double(), signal.detach().double() - got.detach().double()
    if not bool(noise.any()):
        return float("inf")
    return float(10 * torch.log10(s.square().sum() / noise.square().sum()))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (NaN equals NaN, -0 is not 0)."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
