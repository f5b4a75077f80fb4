"""Half-quadratic quantization: no tile's l_p error is above that of rounding to nearest, and its steps mean what they
say."""

import pytest
import torch
from cases import FORMATS, each_format, same_bits, weights
from torch import Tensor

from lowbit.algorithms.hqq import hqq_params, shrink, updated
from lowbit.formats import Format, Planes, parse_format
from lowbit.formats.base import tile_reduce
from lowbit.formats.elements import IntElement

FEW_INTEGERS = [f for f in FORMATS if isinstance(f.element, IntElement) and f.element.bits <= 4]


def lp_errors(fmt: Format, w: Tensor, params: Planes, p: float) -> Tensor:
    """fp64 sum of |w - wq|**p of each tile of the scale plane, from what is stored."""
    error = (w - fmt.dequantize(fmt.quantize(w, params), *w.shape)).double().abs() ** p
    return tile_reduce(error, fmt.plane("scale").tile, lambda t: t.sum(1))


@each_format
@pytest.mark.parametrize("kind", ["student_t", "outlier_channels", "zeros", "denormal"])
def test_no_tile_is_worse_than_rounding_to_nearest(fmt: Format, kind: str) -> None:
    w = weights(kind, 33, 200)
    found, rtn = hqq_params(w, fmt, iterations=8), fmt.choose_params(w)
    for p in fmt.scale_planes:
        assert (found[p.name].dtype, tuple(found[p.name].shape)) == (p.dtype, p.shape_for(*w.shape)), p.name
        assert found[p.name].float().isfinite().all(), p.name
    before, after = (lp_errors(fmt, w, params, 0.7) for params in (rtn, found))
    assert (after <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("fmt", FEW_INTEGERS, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_heavy_tails_gain(fmt: Format, p: float) -> None:
    w = weights("student_t", 64, 512)
    before, after = (lp_errors(fmt, w, params, p).sum() for params in (fmt.choose_params(w), hqq_params(w, fmt, p=p)))
    assert after < 0.98 * before


@each_format
def test_zero_rows_stay_zero(fmt: Format) -> None:
    w = weights("student_t", 6, 300)
    w[2:4] = 0
    found, rtn = hqq_params(w, fmt, iterations=3), fmt.choose_params(w)
    if fmt.plane("scale").n == 1:
        assert same_bits(found["scale"][2:4], rtn["scale"][2:4])
    assert (fmt.dequantize(fmt.quantize(w, found), *w.shape)[2:4] == 0).all()
    assert hqq_params(torch.zeros(0, 256), fmt)["scale"].shape == fmt.choose_params(torch.zeros(0, 256))["scale"].shape


@each_format
def test_row_blocks_and_repetition_change_nothing(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights("student_t", 300, 64).bfloat16()
    before, whole = w.clone(), hqq_params(w, fmt, iterations=3)
    few = Format.row_blocks
    monkeypatch.setattr(Format, "row_blocks", lambda self, n, k, elements=1024: few(self, n, k, elements))
    for name, plane in hqq_params(w, fmt, iterations=3).items():
        assert same_bits(plane, whole[name]), name
    assert same_bits(w, before)


@pytest.mark.parametrize("fmt", FEW_INTEGERS, ids=str)
def test_size_of_the_weights_does_not_matter(fmt: Format) -> None:
    """`beta` is about steps of the tile: weights 1024 times as large have the same codes and scales 1024 times as
    large."""
    w = weights("student_t", 16, 256)
    small, large = hqq_params(w, fmt), hqq_params(w * 1024, fmt)
    assert torch.equal(small["scale"] * 1024, large["scale"])
    assert torch.equal(fmt.encode(w, small), fmt.encode(w * 1024, large))


def test_shrink_minimizes_the_split_objective() -> None:
    """argmin_e |e| + beta/2 (e - x)^2 on a fine grid, for p = 1, where the soft threshold is exact."""
    x, grid, beta = torch.linspace(-2, 2, 41).double(), torch.linspace(-2, 2, 4001).double(), 2.5
    objective = grid.abs() + beta / 2 * (grid - x[:, None]).square()
    torch.testing.assert_close(shrink(x, beta, 1.0), grid[objective.argmin(1)], atol=1e-3, rtol=0)
    assert torch.equal(shrink(torch.zeros(3), 10.0, 0.7), torch.zeros(3))
    few = shrink(torch.tensor([0.1, 0.2, 4.0, -4.0]), 10.0, 0.7)
    assert few[0] == 0
    assert 0 < few[1] < 0.1  # small errors are taken for noise of rounding, large ones nearly left alone
    assert few[2] == -few[3] > 3.9


def test_a_displaced_zero_point_is_moved_back() -> None:
    """The closed form mean(Q - (W - E) / s), here with codes of the right zero point and E = 0."""
    fmt = parse_format("int4:g64:asym:fp32")
    w = weights("normal", 4, 128)
    right = fmt.choose_params(w)
    codes = fmt.encode(w, right)
    wrong = right | {"zero_point": right["zero_point"] + 2}
    levels, step = fmt.levels(codes, wrong, 128).double(), right["scale"].repeat_interleave(64, 1)
    sums = [levels * w, levels * levels, levels - w / step, torch.ones_like(levels)]
    moved = updated(fmt, wrong, *(tile_reduce(t, (1, 64), lambda t: t.sum(1)) for t in sums))
    assert torch.equal(moved["zero_point"], right["zero_point"])


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 1.5}, {"beta": 0}, {"kappa": 0.9}, {"iterations": -1}], ids=str)
def test_wrong_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs 0 < p <= 1"):
        hqq_params(torch.ones(2, 64), parse_format("int4:g32"), **options)
