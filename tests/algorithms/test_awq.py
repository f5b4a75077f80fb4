"""AWQ: channels that meet much input keep more, and the output never loses more than by rounding."""

from __future__ import annotations

import pytest
import torch
from cases import each_format, weights
from torch import Tensor

from lowbit.algorithms.awq import awq_scale, candidate_scale
from lowbit.algorithms.gptq import output_error
from lowbit.formats import Format, parse_format

N, K = 24, 192


def hessian(salient: float = 30.0) -> Tensor:
    """Of inputs in which every 16th channel is `salient` times as large."""
    x = torch.randn(512, K, generator=torch.Generator().manual_seed(1))
    x[:, ::16] *= salient
    return x.T @ x


def error_of(w: Tensor, fmt: Format, h: Tensor, s: Tensor) -> float:
    """Of the output, straight from the definition: the weight that a linear with the folded scale has."""
    error = (w - fmt.dequantize(fmt.quantize(w * s), *w.shape) / s).double()
    return float((error @ h.double() * error).sum())


@each_format
def test_the_output_never_loses(fmt: Format) -> None:
    w, h = weights("normal", N, K), hessian()
    s = awq_scale([(w, fmt)], h)
    plain = output_error(w, fmt.quantize(w), h, fmt)
    assert error_of(w, fmt, h, s) <= plain * (1 + 1e-5)
    if fmt.spec in ("int4:g128", "int4:g64:asym", "int3:g64"):
        assert error_of(w, fmt, h, s) < 0.7 * plain


def test_it_is_the_best_of_the_grid() -> None:
    """Over all weights that read the input, each in its own format."""
    many = [
        (weights("normal", N, K), parse_format("int3:g64")),
        (weights("student_t", 8, K), parse_format("int4:g128")),
    ]
    h, grid = hessian(), (0.0, 0.3, 0.6, 0.9)
    found = awq_scale(many, h, grid=grid)
    tried = [candidate_scale(h.diagonal().sqrt(), r) for r in grid]
    total = [sum(error_of(w, fmt, h, s) for w, fmt in many) for s in tried]
    assert torch.equal(found, tried[total.index(min(total))])
    assert not bool((found == 1).all())


@pytest.mark.parametrize("r", [0.0, 0.25, 1.0])
def test_scales_grow_with_the_input(r: float) -> None:
    magnitude = torch.tensor([0.0, 1.0, 3.0, 40.0, 40.0])
    s = candidate_scale(magnitude, r)
    assert bool((s.diff() >= 0).all())
    torch.testing.assert_close(s[-1] / s[1], torch.tensor(40.0**r))
    torch.testing.assert_close(s.max() * s.min(), torch.tensor(1.0))
    assert s[3] == s[4]
    assert s[0] == s[1]


def test_inputs_alike_need_no_scale() -> None:
    assert bool((awq_scale([(weights("normal", N, K), parse_format("int4:g64"))], torch.eye(K)) == 1).all())
    zero = torch.zeros(K, K)
    assert bool((awq_scale([(weights("normal", N, K), parse_format("int4:g64"))], zero) == 1).all())


def test_wrong_arguments() -> None:
    w, fmt = weights("normal", N, K), parse_format("int4:g64")
    with pytest.raises(ValueError, match=r"\[lowbit: input-mismatch\]"):
        awq_scale([(w, fmt)], torch.eye(K + 1))
    with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
        awq_scale([(w, fmt)], hessian(), grid=[float("nan")])
