"""SmoothQuant: equation 4, and what it is for."""

from __future__ import annotations

import pytest
import torch
from cases import weights

from lowbit.algorithms.smoothquant import GRID, least_error_scale, smooth_scale
from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation


def test_equation_4() -> None:
    w = [torch.tensor([[1.0, -4.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.0, -8.0]])]
    amax = torch.tensor([16.0, 9.0, 5.0, 0.0])
    assert smooth_scale(w, amax).tolist() == [4.0, 1.5, 1.0, 1.0]
    assert smooth_scale(w, amax, alpha=1.0).tolist() == [16.0, 9.0, 5.0, 1.0]
    assert smooth_scale(w, amax, alpha=0.0).tolist() == [1.0, 0.25, 1.0, 0.125]
    with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
        smooth_scale(w, amax, alpha=1.5)


def test_half_makes_both_ranges_equal() -> None:
    """With alpha = 1/2 a channel of the activation reaches as far as that of the weight (below equation 4)."""
    w, amax = weights("normal", 16, 64), torch.rand(64) * 100 + 0.1
    s = smooth_scale([w], amax)
    torch.testing.assert_close(amax / s, (w * s).abs().amax(0))


@pytest.mark.parametrize("spec", ["int8:row", "float8_e4m3:row"])
def test_8_bit_products_keep_more(spec: str) -> None:
    """Activations with a few channels 100 times as large as others, both operands rounded to 8 bits per row."""
    fmt = parse_format(spec)
    x, w = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)), weights("normal", 32, 64)
    x[:, ::16] *= 100
    s = smooth_scale([w], x.abs().amax(0))

    def error(x: torch.Tensor, w: torch.Tensor) -> float:
        xq, wq = (fmt.dequantize(fmt.quantize(t), *t.shape) for t in (x, w))
        return float((xq @ wq.T - x @ w.T).square().sum())

    assert error(x / s, w * s) < (0.2 if spec == "int8:row" else 1.0) * error(x, w)


@pytest.mark.parametrize("act", ["int8:row", "float8_e4m3:row"])
def test_the_scale_of_least_error_is_taken(act: str) -> None:
    fmt, how = parse_format("int8:row"), parse_activation(act)
    x, w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), weights("normal", 32, 64)
    x[:, ::16] *= 100
    candidates = [smooth_scale([w], x.abs().amax(0), a) for a in GRID]

    def error(s: torch.Tensor) -> float:
        xq = how.format.dequantize(how.format.quantize(x / s, how.params(x / s)), *x.shape)
        return float((xq @ fmt.dequantize(fmt.quantize(w * s), *w.shape).T - x @ w.T).square().sum())

    best = least_error_scale([(w, fmt, how)], x, candidates)
    least = min(error(s) for s in (torch.ones(64), *candidates))
    assert error(best) == pytest.approx(least, rel=1e-5)
    assert least < error(torch.ones(64)) or torch.equal(best, torch.ones(64))
    assert torch.equal(least_error_scale([(w, fmt, how)], x, []), torch.ones(64))
    with pytest.raises(ValueError, match=r"\[lowbit: input-mismatch\]"):
        least_error_scale([(w[:, :3], fmt, how)], x, [])


def test_a_token_that_does_not_count_is_not_looked_at() -> None:
    fmt, how = parse_format("int8:row"), parse_activation("int8:row")
    x, w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), weights("normal", 32, 64)
    x[:, ::16] *= 100
    loud = torch.cat((x, 1e4 * torch.randn(1, 64, generator=torch.Generator().manual_seed(1))))
    share = torch.ones(65, 1)
    share[64] = 0
    candidates = [smooth_scale([w], x.abs().amax(0), a) for a in GRID]
    chosen = least_error_scale([(w, fmt, how)], loud, candidates, share)
    assert torch.equal(chosen, least_error_scale([(w, fmt, how)], x, candidates))
    assert not torch.equal(chosen, torch.ones(64))
