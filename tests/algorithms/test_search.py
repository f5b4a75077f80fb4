"""Searched scales: no tile is worse than rounding to nearest, heavy tails gain, and what matters more errs less."""

import math

import pytest
import torch
from cases import FORMATS, each_format, same_bits, sqnr_db, weights
from torch import Tensor

from lowbit.algorithms.search import search_params, stored_scale
from lowbit.formats import Format, Planes, parse_format
from lowbit.formats.base import tile_reduce

# 2 to 4 bits per weight. One symmetric bit has its best scale, the mean, from the start.
FEW_BITS = [f for f in FORMATS if 2 <= f.element.bits / f.element.vector <= 4]
few_bits = pytest.mark.parametrize("fmt", FEW_BITS, ids=str)


def decoded(fmt: Format, w: Tensor, params: Planes | None = None) -> Tensor:
    return fmt.dequantize(fmt.quantize(w, params), *w.shape)


def tile_errors(fmt: Format, w: Tensor, params: Planes, importance: Tensor | None = None) -> Tensor:
    """fp64 weighted squared error of each tile of the scale plane, from what is stored."""
    error = (w.double() - decoded(fmt, w, params)).square() * (1 if importance is None else importance.double())
    return tile_reduce(error, fmt.plane("scale").tile, lambda t: t.sum(1))


def is_valid(fmt: Format, params: Planes, n: int, k: int) -> None:
    assert list(params) == [p.name for p in fmt.scale_planes]
    for p in fmt.scale_planes:
        assert params[p.name].dtype == p.dtype, p.name
        assert tuple(params[p.name].shape) == p.shape_for(n, k), p.name
        assert params[p.name].float().isfinite().all(), p.name
    assert fmt.effective_scale(params)[0].isfinite().all()


@each_format
@pytest.mark.parametrize("kind", ["student_t", "outlier_channels", "zeros", "denormal"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_tile_is_worse_than_rounding_to_nearest(fmt: Format, kind: str, weighted: bool) -> None:
    w = weights(kind, 33, 200)
    importance = torch.rand(200, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    rtn, found = fmt.choose_params(w), search_params(w, fmt, importance)
    is_valid(fmt, found, *w.shape)
    before, after = (tile_errors(fmt, w, p, importance) for p in (rtn, found))
    assert (after <= before * (1 + 1e-12)).all()
    assert decoded(fmt, w, found).isfinite().all()
    for name in ("outer_scale", "scale_offset", "codebook"):
        if fmt.has(name):
            assert same_bits(found[name], rtn[name])


@few_bits
@pytest.mark.parametrize("kind", ["student_t", "outlier_channels"])
def test_heavy_tails_gain(fmt: Format, kind: str) -> None:
    w = weights(kind, 64, 512)
    gain = sqnr_db(w, decoded(fmt, w, search_params(w, fmt))) - sqnr_db(w, decoded(fmt, w))
    assert gain > (0.2 if kind == "student_t" else 0.0), f"{gain:.2f} dB"


@few_bits
def test_important_columns_err_less(fmt: Format) -> None:
    w, importance = weights("student_t", 64, 512), torch.ones(512)
    importance[::8] = 100
    plain, weighted = (decoded(fmt, w, search_params(w, fmt, i)) for i in (None, importance))
    assert sqnr_db(w[:, ::8], weighted[:, ::8]) > sqnr_db(w[:, ::8], plain[:, ::8])
    assert same_bits(decoded(fmt, w, search_params(w, fmt, torch.full((512,), 7.0))), plain)


@each_format
def test_zeros_stay_as_they_were(fmt: Format) -> None:
    w = weights("student_t", 6, 300)
    w[2:4] = 0
    rtn, found = fmt.choose_params(w), search_params(w, fmt)
    if fmt.plane("scale").n == 1:
        assert same_bits(found["scale"][2:4], rtn["scale"][2:4])
    assert (decoded(fmt, w, found)[2:4] == 0).all()
    nothing = torch.zeros(4, 256)
    assert decoded(fmt, nothing, search_params(nothing, fmt)).count_nonzero() == 0
    empty = torch.zeros(0, 256)
    assert search_params(empty, fmt)["scale"].shape == fmt.choose_params(empty)["scale"].shape


@each_format
def test_row_blocks_and_repetition_change_nothing(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same planes whether rows are looked at together or a few at a time, and the weight is left alone."""
    w = weights("student_t", 300, 64).bfloat16()
    before, whole = w.clone(), search_params(w, fmt)
    few = Format.row_blocks
    monkeypatch.setattr(Format, "row_blocks", lambda self, n, k, elements=1024: few(self, n, k, elements))
    for name, plane in search_params(w, fmt).items():
        assert same_bits(plane, whole[name]), name
    assert same_bits(w, before)


@each_format
def test_stored_scale_inverts_effective_scale(fmt: Format) -> None:
    params = fmt.choose_params(weights("normal", 33, 200))
    again = stored_scale(fmt, params, fmt.effective_scale(params)[0])
    assert (again.view(torch.uint8) == params["scale"].view(torch.uint8)).all()


def test_one_symmetric_bit_takes_the_weighted_mean() -> None:
    fmt = parse_format("int1:g128:fp32")
    w, h = weights("student_t", 8, 256), torch.rand(256, generator=torch.Generator().manual_seed(0))
    scale = search_params(w, fmt, h)["scale"]
    mean = (w.abs() * h).view(8, 2, 128).sum(2) / h.view(2, 128).sum(1)
    # The error is flat at its minimum: a scale 1e-3 off costs 1e-6 of it, and fp32 tells such errors just apart.
    torch.testing.assert_close(scale, mean, rtol=1e-3, atol=0)


def test_ends_of_an_asymmetric_range_move_apart() -> None:
    """One far weight above zero and 1023 below: the upper end comes down, the lower one stays."""
    fmt = parse_format("int4:row:asym")
    w = -torch.linspace(0, 1, 1024).repeat(2, 1)
    w[:, 0] = 0.5
    (lower, upper), (found_lower, found_upper) = (
        (p["zero_point"] * p["scale"], (15 - p["zero_point"].float()) * p["scale"])
        for p in (fmt.choose_params(w), search_params(w, fmt))
    )
    assert (found_upper < upper / 2).all()
    assert (found_lower > 0.95 * lower).all()


@pytest.mark.parametrize(
    "importance", [torch.ones(3), torch.ones(1, 64), -torch.ones(64), torch.full((64,), math.nan)], ids=str
)
def test_wrong_importance_is_named(importance: Tensor) -> None:
    with pytest.raises(ValueError, match="importance must"):
        search_params(torch.ones(2, 64), parse_format("int4:g32"), importance)


def test_wrong_ratios_are_named() -> None:
    with pytest.raises(ValueError, match="above 0"):
        search_params(torch.ones(2, 64), parse_format("int4:g32"), shrink=(1.0, 0.0))
