"""Rotations are orthogonal, spread every channel over all, and cancel between writer and reader."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.algorithms.rotation import hadamard, random_rotation, rotated_reader, rotated_writer


@pytest.mark.parametrize("n", [1, 2, 8, 64, 12, 45, 576])
def test_orthogonal(n: int) -> None:
    q = random_rotation(n, seed=3)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(q, random_rotation(n, seed=3))
    if n > 2:
        assert not torch.equal(q, random_rotation(n, seed=4))


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_hadamard_spreads_evenly(n: int) -> None:
    h = hadamard(n)
    assert torch.equal(h.abs(), torch.full((n, n), 1 / math.sqrt(n), dtype=torch.float64))
    assert torch.equal(random_rotation(n).abs(), h.abs())
    with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
        hadamard(3)


def test_an_outlier_is_spread_over_all_channels() -> None:
    """576 = 9 * 64: one channel of 1 becomes channels of at most 1/8."""
    assert float(random_rotation(576).abs().max()) <= 1 / 8
    assert int((random_rotation(576).abs() > 1e-6).sum()) == 576 * 576


def test_reader_undoes_writer() -> None:
    g = torch.Generator().manual_seed(0)
    up, down, gain = torch.randn(24, 10, generator=g), torch.randn(7, 24, generator=g), torch.rand(24, generator=g)
    for size in (24, 8):
        q = random_rotation(size)
        product = rotated_reader(down, q) @ rotated_writer(up, q)
        torch.testing.assert_close(product, (down.double() @ up.double()), rtol=0, atol=1e-12)
        torch.testing.assert_close(rotated_writer(up[:, 0], q), rotated_writer(up, q)[:, 0])
    q = random_rotation(24)
    torch.testing.assert_close(rotated_reader(down, q, gain) @ q.T, down.double() * gain.double(), rtol=0, atol=1e-12)
