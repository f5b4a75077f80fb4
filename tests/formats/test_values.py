"""What quantization does to values: zeros stay zero, nothing becomes infinite, the error is what the bits allow."""

import math

import pytest
import torch
from cases import FORMATS, KINDS, each_format, same_bits, sqnr_db, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats import Format, parse_format

# Formats of which no plane is shared by groups: what one group holds is no other group's business.
LOCAL = [f for f in FORMATS if all(p.shape is None and p.n == 1 and p.k is not None for p in f.planes)]
FIXED_TABLE = [f for f in FORMATS if f.spec in ("nf4:g64", "fp4:g64")]


@each_format
def test_zeros_decode_to_zeros(fmt: Format) -> None:
    for w in (torch.zeros(130, 300), weights("zeros", 130, 300), torch.zeros(1, 1)):
        decoded = fmt.dequantize(fmt.quantize(w), *w.shape)
        untouched = (w != 0).any(dim=1)
        assert (decoded[~untouched] == 0).all()
        if fmt.spec != "int1:g128" and fmt.tile[1] <= 128:  # one symmetric bit has no zero beside other weights
            assert (decoded[:, :128] == 0).all()
    assert fmt.dequantize(fmt.quantize(torch.zeros(4, 256)), 4, 256).count_nonzero() == 0


MAGNITUDES = st.sampled_from([0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e30, 3e38])


@each_format
@given(sizes=st.lists(MAGNITUDES, min_size=6, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_mixed_groups_stay_finite(fmt: Format, sizes: list[float], seed: int) -> None:
    """Groups of any size side by side: every decoded weight is finite, groups of zeros are exactly zero, and a
    group's bits do not depend on the groups around it where the format gives each its own scale."""
    width, n = min(fmt.tile[1], 300), 2
    g = torch.Generator().manual_seed(seed)
    unit = torch.rand(n, len(sizes) * width, generator=g) * 2 - 1
    w = unit * torch.tensor(sizes).repeat_interleave(width)
    planes = fmt.quantize(w)
    decoded = fmt.dequantize(planes, *w.shape)
    assert decoded.isfinite().all()
    scale, _ = fmt.effective_scale(planes)
    assert scale.isfinite().all()
    for name in ("scale", "outer_scale"):
        if name in planes and fmt.element.bits > 1:
            assert (planes[name].float() != 0).all() or "scale_offset" in planes
    if fmt in LOCAL or fmt in FIXED_TABLE:
        for i, size in enumerate(sizes):
            part = slice(i * width, (i + 1) * width)
            if size == 0:
                assert (decoded[:, part] == 0).all()
            alone = fmt.dequantize(fmt.quantize(w[:, part]), n, width)
            assert same_bits(alone, decoded[:, part])


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.element.bits >= 4 and f.tile[1] <= 256], ids=str)
def test_denormal_weights_keep_their_signal(fmt: Format) -> None:
    """Weights below the smallest normal number share what the smallest stored scale leaves them, and never more
    error than their own size."""
    w = weights("normal", 8, 256) * 1e-38
    decoded = fmt.dequantize(fmt.quantize(w), *w.shape)
    assert (decoded - w).abs().max() <= w.abs().max()


def test_one_bit_keeps_the_sign_of_a_weight_far_below_its_scale() -> None:
    w = torch.tensor([[1e30, -1e-30, 1e-30, -1e-45, 0.0, -1e30]])
    fmt = parse_format("int1:g32")
    assert fmt.dequantize(fmt.quantize(w), 1, 6).sign().tolist() == [[1, -1, 1, -1, 1, -1]]


@each_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_are_refused(fmt: Format, bad: float) -> None:
    w = weights("normal", 4, 256)
    w[1, 7] = w[3, 9] = bad
    with pytest.raises(ValueError, match=r"2 NaN or Inf"):
        fmt.quantize(w)


@each_format
def test_wrong_inputs_are_named(fmt: Format) -> None:
    with pytest.raises(ValueError, match="2-D"):
        fmt.quantize(torch.zeros(3))
    with pytest.raises(ValueError, match="float"):
        fmt.quantize(torch.zeros(3, 4, dtype=torch.int32))


def floor_db(fmt: Format, kind: str) -> float:
    """What the width of a code promises in dB, less a few for the tails of the distribution.

    A uniform quantizer of b bits reaches about 6.02 b, less what the largest weight of a group takes: 8 dB for groups
    of 128 of a bell. A float's error is relative, so that only its mantissa counts. Tails and outlier columns cost
    formats with a scale per group 6 dB, and integers with one scale for many groups up to 30.
    """
    bits, mantissa = fmt.element.bits / fmt.element.vector, getattr(fmt.element, "mantissa_bits", None)
    scale = fmt.plane("scale")
    wide = scale.k is None or scale.n != 1
    if mantissa is not None:
        return 6.02 * (mantissa + 1) + (3 if kind == "normal" else -3)
    loss = 9.5 if kind == "normal" else 30 if wide else 15.5
    return max(0.0, 6.02 * bits - loss)


@each_format
@pytest.mark.parametrize("kind", KINDS[:4])
def test_signal_to_noise(fmt: Format, kind: str) -> None:
    w = weights(kind, 128, 1024)
    got = sqnr_db(w, fmt.dequantize(fmt.quantize(w), *w.shape))
    assert got >= floor_db(fmt, kind), f"{got:.1f} dB"


@pytest.mark.parametrize(("finer", "coarser"), [
    ("int8:g128", "int4:g128"), ("int5:g128", "int4:g128"), ("int4:g32", "int4:g128"), ("int4:g128", "int4:row"),
    ("int3:g64", "int2:g64"), ("int6:g64:asym", "int4:g64:asym"), ("nf4:g64", "fp4:g64"), ("nvfp4", "mxfp4"),
    ("mxfp8_e4m3", "mxfp8_e5m2"), ("mxfp6_e2m3", "mxfp4"), ("codebook4:g64", "nf4:g64"),
    ("codebook4v2:g64", "codebook3:g64"), ("codebook2v4:g64", "codebook2:g64"),
])  # fmt: skip
def test_more_bits_mean_less_error(finer: str, coarser: str) -> None:
    w = weights("normal", 256, 1024)
    fine, coarse = (sqnr_db(w, f.dequantize(f.quantize(w), *w.shape)) for f in map(parse_format, (finer, coarser)))
    assert fine > coarse


@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32:asym", "nvfp4", "mxfp4", "nf4:g64"])
def test_gradients_do_not_pass(spec: str) -> None:
    """Quantizing is not differentiable; planes carry no graph of the weight they came from."""
    w = weights("normal", 4, 64).requires_grad_()
    assert not any(t.requires_grad for t in parse_format(spec).quantize(w).values())


@each_format
def test_the_default_dtype_changes_nothing(fmt: Format) -> None:
    """Engines set it to bf16 while they build and load a model."""
    w = weights("normal", 48, 512)
    planes = fmt.quantize(w)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = fmt.quantize(w)
        decoded = fmt.dequantize(again, *w.shape)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(planes[name], again[name]) for name in planes)
    assert same_bits(decoded, fmt.dequantize(planes, *w.shape))
