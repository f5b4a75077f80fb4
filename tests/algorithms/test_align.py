"""Alignment: the weight whose output, for other inputs, is nearest to what it was."""

from __future__ import annotations

import pytest
import torch
from cases import each_format, weights
from torch import Tensor

from lowbit.algorithms.align import aligned
from lowbit.algorithms.gptq import gptq
from lowbit.formats import Format

N, K, M = 24, 160, 512


def both(noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Inputs of the original and of a model whose earlier layers shrank and disturbed them, `(M, K)`."""
    g = torch.Generator().manual_seed(1)
    original = torch.randn(M, 32, generator=g) @ torch.randn(32, K, generator=g) + torch.randn(M, K, generator=g)
    return original, 0.9 * original + noise * torch.randn(M, K, generator=g) * original.std()


def distance(w: Tensor, x: Tensor, wanted: Tensor) -> float:
    return float((x.double() @ w.double().T - wanted.double()).square().sum())


def test_it_is_the_least_squares_solution() -> None:
    """With little damping, of the problem with all rows; and with any, better than the weight as it was."""
    w, (x0, x) = weights("normal", N, K), both()
    h, drift = x.T @ x, (x0 - x).T @ x
    solution = torch.linalg.lstsq(x.double(), x0.double() @ w.double().T).solution.T
    torch.testing.assert_close(aligned(w, h, drift, damp=1e-7).double(), solution, rtol=1e-3, atol=1e-4)
    for damp in (0.01, 0.05, 1.0):
        assert distance(aligned(w, h, drift, damp=damp), x, x0 @ w.T) < distance(w, x, x0 @ w.T)


def test_without_drift_nothing_changes() -> None:
    w, (_, x) = weights("normal", N, K), both()
    assert torch.equal(aligned(w, x.T @ x, torch.zeros(K, K)), w)
    assert torch.equal(aligned(w, torch.zeros(K, K), torch.zeros(K, K)), w)


def test_the_unit_of_the_sums_does_not_matter() -> None:
    w, (x0, x) = weights("normal", N, K), both()
    h, drift = x.T @ x, (x0 - x).T @ x
    torch.testing.assert_close(aligned(w, h / M, drift / M), aligned(w, h, drift))


@each_format
def test_rounding_an_aligned_weight_comes_nearer(fmt: Format) -> None:
    """With every format: its output for the inputs there are is nearer to the original's output for its own."""
    w, (x0, x) = weights("normal", N, K), both()
    h, wanted = x.T @ x, x0 @ w.T
    better = aligned(w, h, (x0 - x).T @ x)
    plain, moved = (distance(fmt.dequantize(gptq(v, h, fmt), N, K), x, wanted) for v in (w, better))
    assert moved < plain


def test_wrong_arguments() -> None:
    w, h = weights("normal", N, K), torch.eye(K)
    with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
        aligned(w, h, h, damp=0.0)
    with pytest.raises(ValueError, match=r"\[lowbit: input-mismatch\]"):
        aligned(w, h, torch.eye(K - 1))
