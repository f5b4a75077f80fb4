"""GPTQ: weights come out further from the original than by rounding, and the layer's output nearer to it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FORMATS, each_format, same_bits, weights
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.algorithms.gptq import gptq, output_error
from lowbit.formats import Format, Planes, parse_format

N, K = 24, 192
# Formats whose scales can be chosen group by group: no plane spans the weight, a row, or other scales.
FOLLOWING = {f for f in FORMATS if all(p.shape is None and p.k is not None for p in f.planes)}
each_way = pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])


def inputs(k: int, tokens: int = 512, shared: int = 32, noise: float = 0.5, seed: int = 1) -> Tensor:
    """Activations `(tokens, k)`: a few directions that all columns share, and some noise of every column's own."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, shared, generator=g) @ torch.randn(shared, k, generator=g)
    return common + noise * torch.randn(tokens, k, generator=g)


def hessian(k: int, **how: float) -> Tensor:
    x = inputs(k, **how)  # type: ignore[arg-type]
    return x.T @ x


def weight_error(w: Tensor, planes: Planes, fmt: Format) -> float:
    return float((w - fmt.dequantize(planes, *w.shape)).double().square().sum())


def same_planes(a: Planes, b: Planes) -> bool:
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)


# What must be true of the result -----------------------------------------------------------------


@each_format
def test_weights_lose_and_the_output_gains(fmt: Format) -> None:
    """Under the same scales rounding to nearest has the smallest weight error there is, by its definition. That the
    output's error is smaller than rounding's is no theorem, since columns are decided one at a time; for inputs as
    correlated as these it holds for every format: a fifth of rounding's with 3 bits and more. Fewer saturate so often
    that only the direction is sure.
    """
    w, h = weights("normal", N, K), hessian(K)
    params = fmt.choose_params(w)
    rounded, chosen = fmt.quantize(w, params), gptq(w, h, fmt, params)
    assert weight_error(w, chosen, fmt) >= weight_error(w, rounded, fmt)
    least = output_error(w, rounded, h, fmt)
    assert output_error(w, chosen, h, fmt) < (0.2 if fmt.element.bits / fmt.element.vector >= 3 else 1) * least
    # So it is under scales of its own, and in the other order.
    assert output_error(w, gptq(w, h, fmt), h, fmt) < least
    assert output_error(w, gptq(w, h, fmt, act_order=True), h, fmt) < least


@each_format
@each_way
def test_uncorrelated_inputs_leave_rounding_to_nearest(fmt: Format, act_order: bool) -> None:
    """With H = I no column can mend another's error, so that codes and scales are those of `quantize`, bit by bit."""
    for w in (weights("outlier_channels", 5, 131), weights("normal", N, 140).bfloat16(), weights("normal", 1, 1)):
        h = torch.eye(w.shape[1])
        params = fmt.choose_params(w)
        assert same_planes(gptq(w, h, fmt, params, act_order=act_order), fmt.quantize(w, params))
        assert same_planes(gptq(w, 3 * h, fmt, act_order=act_order), fmt.quantize(w))


def textbook(w: Tensor, h: Tensor, fmt: Format, params: Planes | None, damp: float = 0.01) -> Planes:
    """Equation 2 as it is written, in fp64: the inverse over the columns that are left is computed anew every time."""
    k, v = w.shape[1], fmt.element.vector
    h = h.double() / h.double().diagonal().mean()
    h.diagonal().add_(damp)
    w, chosen, codes = w.double().clone(), [], []
    group = fmt.plane("scale").k if params is None and fmt in FOLLOWING else None
    held = params if params is not None else fmt.choose_params(w.float())
    for q in range(0, k, v):
        if group is not None:
            if q % group == 0:
                chosen.append(fmt.choose_params(w[:, q : q + group].float()))
            scales = chosen[-1]
        else:
            scales = fmt.slice_planes(held, 1, q, q + v)
        now = w[:, q : q + v]
        codes.append(fmt.encode(now.float(), scales))
        error = now - fmt.scaled(fmt.levels(codes[-1], scales, v), scales)
        inverse = torch.linalg.inv(h[q:, q:])
        w[:, q:] -= error @ torch.linalg.inv(inverse[:v, :v]) @ inverse[:v]
    if group is not None:
        held = {
            p.name: torch.cat([c[p.name].view(torch.uint8) for c in chosen], 1).view(p.dtype) for p in fmt.scale_planes
        }
    return fmt.element.pack(torch.cat(codes, 1)) | {p.name: held[p.name] for p in fmt.scale_planes}


@each_format
def test_equals_the_textbook(fmt: Format) -> None:
    """In fp32 by one factor and in blocks of any size, also smaller than a group or cutting through one, the weights
    are those of fp64 and many inverses. A sum that is almost half way may fall to the other side: one row may."""
    n, k = 16, 136
    w, h = weights("normal", n, k), hessian(k, noise=1.0)
    for params in (None, fmt.choose_params(w)):
        wanted = textbook(w, h, fmt, params)
        for block in (1, 48, 1000):
            got = gptq(w, h, fmt, params, block=block)
            a, b = (fmt.dequantize(planes, n, k) for planes in (got, wanted))
            apart = ~a.isclose(b, rtol=1e-5, atol=0).all(1)  # fp32 scales that follow differ by rounding
            assert apart.sum() <= 1, f"block {block}: rows {apart.nonzero().flatten().tolist()}"


def test_some_formats_choose_scales_group_by_group() -> None:
    assert {"int4:g128", "int4:g64:asym", "float8_e4m3:b128x128", "mxfp4"} <= {f.spec for f in FOLLOWING}
    for fmt in FOLLOWING:
        k = max(256, 2 * fmt.tile[1])
        w, h = weights("normal", N, k), hessian(k, noise=0.1)
        own, planes = fmt.choose_params(w)["scale"].float(), gptq(w, h, fmt)
        assert torch.equal(planes["scale"].float()[:, 0], own[:, 0])
        assert not torch.equal(planes["scale"].float(), own)
        assert same_bits(gptq(w, h, fmt, act_order=True)["scale"], fmt.choose_params(w)["scale"])


@each_format
@each_way
def test_planes_are_those_of_the_format(fmt: Format, act_order: bool) -> None:
    """Complete, of the declared shapes and types, the same every time, and whatever is left over at the edges."""
    w, h = weights("student_t", 9, 149), hessian(149)
    before = w.clone(), h.clone()
    planes = gptq(w, h, fmt, block=50, act_order=act_order)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in planes.items()} == {
        p.name: (p.dtype, p.shape_for(*w.shape)) for p in fmt.planes
    }
    assert QuantizedTensor(planes, fmt, w.shape, torch.bfloat16).dequantize().isfinite().all()
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])
    # Any positive multiple of H will do. One by a power of two is exact, so that no bit may change.
    assert same_planes(planes, gptq(w, h * 2.0**-20, fmt, block=50, act_order=act_order))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.element.vector == 1 and f.plane("scale").k is None], ids=str)
def test_act_order_does_not_depend_on_the_columns_order(fmt: Format) -> None:
    """Columns given in another order are visited in the same one. Integers as inputs make H exact."""
    w, x = weights("normal", N, K), inputs(K).mul(4).round()
    h = x.T @ x
    shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    a = gptq(w, h, fmt, act_order=True)
    b = gptq(w[:, shuffled], h[shuffled][:, shuffled], fmt, act_order=True)
    assert torch.equal(fmt.dequantize(a, N, K)[:, shuffled], fmt.dequantize(b, N, K))
    falling = h.diagonal().argsort(descending=True)
    sorted_w, sorted_h = w[:, falling], h[falling][:, falling]
    assert same_planes(gptq(sorted_w, sorted_h, fmt), gptq(sorted_w, sorted_h, fmt, act_order=True))


# Inputs that leave something open ----------------------------------------------------------------


@each_format
@each_way
def test_columns_without_input_are_rounded_and_disturb_nothing(fmt: Format, act_order: bool) -> None:
    n, k = 12, 130
    w, x = weights("normal", n, k), inputs(k)
    dead = torch.arange(k) % 7 == 3
    x[:, dead] = 0
    h = x.T @ x
    params = fmt.choose_params(w)
    planes = gptq(w, h, fmt, params, act_order=act_order)
    if fmt.element.vector == 1:  # a pair is chosen as one
        rounded = fmt.dequantize(fmt.quantize(w, params), n, k)
        assert torch.equal(fmt.dequantize(planes, n, k)[:, dead], rounded[:, dead])
        # What stands there changes nothing elsewhere.
        other = gptq(w.masked_fill(dead, 0), h, fmt, params, act_order=act_order)
        assert torch.equal(fmt.dequantize(planes, n, k)[:, ~dead], fmt.dequantize(other, n, k)[:, ~dead])
    assert output_error(w, planes, h, fmt) < output_error(w, fmt.quantize(w), h, fmt)


@each_format
def test_fewer_tokens_than_columns(fmt: Format) -> None:
    """H has rank 40 of 128: without dampening there is no inverse, and a little of it needs fp64.

    One bit promises nothing here: most columns saturate, and what they pass on is beyond the range of the next ones.
    """
    w, h = weights("normal", N, 128), hessian(128, tokens=40)
    params = fmt.choose_params(w)
    least = output_error(w, fmt.quantize(w, params), h, fmt)
    for damp in (0.01, 1e-6):
        planes = gptq(w, h, fmt, params, damp=damp)
        assert fmt.dequantize(planes, *w.shape).isfinite().all()
        assert fmt.element.bits == 1 or output_error(w, planes, h, fmt) < least
    with pytest.raises(ValueError, match="no inverse"):
        gptq(w, h, fmt, damp=0)


def test_dampening_grows_until_there_is_an_inverse() -> None:
    """Sums in low precision may leave eigenvalues somewhat below zero."""
    fmt, w, h = parse_format("int4:g32"), weights("normal", N, K), hessian(K, tokens=40)
    h.diagonal().mul_(0.95)
    grown = gptq(w, h, fmt)
    assert output_error(w, grown, hessian(K, tokens=40), fmt) < output_error(w, fmt.quantize(w), h, fmt)
    with pytest.raises(ValueError, match=r"not even with 10 times the mean"):
        gptq(w, torch.full((K, K), 30.0).fill_diagonal_(1.0), fmt)


@pytest.mark.parametrize("seed", range(6))
def test_a_pivot_left_by_rounding_is_none(seed: int) -> None:
    """Two equal inputs have no inverse, whatever rounding leaves of their difference."""
    fmt, x = parse_format("int4:g32"), inputs(32, seed=seed)
    x[:, 7] = x[:, 20]
    w, h = weights("normal", 4, 32), x.T @ x
    h[7], h[:, 7] = h[20], h[:, 20]
    with pytest.raises(ValueError, match="no inverse"):
        gptq(w, h, fmt, damp=0)
    assert output_error(w, gptq(w, h, fmt), h, fmt) < output_error(w, fmt.quantize(w), h, fmt)


def test_no_dampening_where_none_is_needed() -> None:
    fmt, w, h = parse_format("int4:g32"), weights("normal", N, K), hessian(K)
    assert output_error(w, gptq(w, h, fmt, damp=0), h, fmt) < output_error(w, gptq(w, h, fmt, damp=1), h, fmt)


@each_format
def test_empty_weights(fmt: Format) -> None:
    for n, k in ((0, 64), (4, 0)):
        w = torch.zeros(n, k)
        planes = gptq(w, torch.zeros(k, k), fmt)
        assert [(t.dtype, t.shape) for t in planes.values()] == [(t.dtype, t.shape) for t in fmt.quantize(w).values()]


# The rest ----------------------------------------------------------------------------------------


def test_output_error_is_that_of_the_output() -> None:
    fmt, w, x = parse_format("int4:g32"), weights("normal", N, K), inputs(K)
    planes = fmt.quantize(w)
    lost = x.double() @ (w - fmt.dequantize(planes, N, K)).double().T
    assert output_error(w, planes, x.T @ x, fmt) == pytest.approx(float(lost.square().sum()), rel=1e-4)


def test_wrong_arguments_are_named() -> None:
    fmt, w, h = parse_format("int4:g32"), weights("normal", 4, 64), torch.eye(64)
    bad, indefinite = h.clone(), h.clone()
    bad[3, 4] = bad[4, 3] = math.nan
    indefinite[5, 5] = -2
    for kwargs, message in (
        ({"w": torch.zeros(3)}, r"2-D float weight.*\(3,\)"),
        ({"w": w.int()}, "2-D float weight.*int32"),
        ({"w": w.index_fill(1, torch.tensor([7]), math.inf)}, "weight holds 4 NaN or Inf"),
        ({"hessian": torch.eye(63)}, r"\(64, 64\).*\(63, 63\)"),
        ({"hessian": bad}, "Hessian holds 2 NaN or Inf"),
        ({"hessian": indefinite}, "sum of squares, got -2 at 5"),
        ({"hessian": 0 * h}, "Hessian is zero"),
        ({"damp": -0.1}, "damp=-0.1"),
        ({"damp": math.nan}, "damp=nan"),
        ({"block": 0}, "block=0"),
        ({"params": {}}, "scale planes of int4:g32"),
        ({"params": fmt.choose_params(w[:, :32])}, r"\(4, 2\).*\(4, 1\)"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            gptq(**({"w": w, "hessian": h, "fmt": fmt} | kwargs))
        assert "[lowbit: " in str(raised.value)
