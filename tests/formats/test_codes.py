"""Codes, scales and decoded weights of every registered format, bit for bit against NumPy."""

from statistics import NormalDist

import numpy as np
import numpy_reference
import pytest
import torch
from cases import KINDS, each_format, weights

from lowbit.formats import Format, Planes, parse_format
from lowbit.formats.codebook import FP4, NF4

# Whole and partial groups, blocks and bytes; one row; more groups than one outer scale of a double-quantized format.
SHAPES = ((140, 301), (1, 5))


def as_numpy(planes: Planes) -> dict[str, np.ndarray]:
    """Codes as bytes, everything else as the fp32 values that they stand for."""
    return {
        name: (t.view(torch.uint8) if name.startswith("qdata") else t.float()).numpy() for name, t in planes.items()
    }


def check(fmt: Format, w: torch.Tensor) -> None:
    n, k = w.shape
    planes = fmt.quantize(w)
    got = as_numpy(planes)
    expected = numpy_reference.quantize(fmt.spec, w.float().numpy(), got)
    for name, values in expected.params.items():
        assert (got[name] == values).all(), f"{name}: {(got[name] != values).sum()} of {values.size} differ"
    for name, plane in numpy_reference.pack(expected.codes, fmt.element.bits).items():
        assert (got[name] == plane).all(), f"{name}: {(got[name] != plane).sum()} of {plane.size} bytes differ"
    assert set(got) == set(expected.params) | {p.name for p in fmt.code_planes}
    back = numpy_reference.dequantize(fmt.spec, expected, n, k)
    decoded = fmt.dequantize(planes, n, k).numpy()
    assert (decoded.view(np.int32) == back.astype(np.float32).view(np.int32)).all()


@each_format
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_numpy(fmt: Format, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for n, k in SHAPES:
            check(fmt, weights(kind, n, k).to(dtype))


@pytest.mark.parametrize("spec", ["nf4:g64:dq", "fp4:g32:dq"])
def test_equal_to_numpy_with_several_outer_scales(spec: str) -> None:
    check(parse_format(spec), weights("student_t", 3, 20_000))


@pytest.mark.parametrize("spec", ["int4:b16x8", "int3:b3x5:asym", "int8:g7", "float8_e5m2:b5x7"])
def test_equal_to_numpy_with_odd_tiles(spec: str) -> None:
    check(parse_format(spec), weights("normal", 37, 101))


@pytest.mark.parametrize(
    "spec", ["int4:g32:fp32", "int4:g32:fp16", "int8:row:bf16", "int3:g64:asym:fp16", "int1:g32:fp16"]
)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_equal_to_numpy_with_other_scale_dtypes(spec: str, size: float) -> None:
    """fp16 scales neither vanish nor overflow: they stop at the ends of fp16."""
    check(parse_format(spec), weights("outlier_channels", 9, 101) * size)


@each_format
def test_the_largest_numbers_stay_finite(fmt: Format) -> None:
    w = weights("normal", 130, 300)
    w[::7, ::3] = torch.finfo(torch.float32).max
    w[::5, 1::3] = -torch.finfo(torch.float32).max
    check(fmt, w)
    assert fmt.dequantize(fmt.quantize(w), *w.shape).isfinite().all()


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: 8 positive and 7 negative quantiles and zero, scaled to end at 1."""
    offset, inverse = 0.9677083, NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    table = np.array(sorted([*negative, 0.0, *positive])) / max(positive)
    assert np.abs(table - NF4).max() < 1e-6


def test_fp4_is_a_float_of_twelfths() -> None:
    twelfths = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    assert np.abs(np.concatenate([twelfths, -twelfths]) - FP4).max() < 1e-7


@pytest.mark.parametrize("spec", ["nf4:g64", "fp4:g64", "codebook4:g64", "codebook4v2:g64", "codebook2v4:g64"])
def test_every_entry_of_a_table_is_its_own_nearest(spec: str) -> None:
    fmt = parse_format(spec)
    table = fmt.quantize(weights("normal", 64, 256))["codebook"].float()
    codes = fmt.element.encode(table.reshape(1, -1), {"codebook": table})
    assert (fmt.element.decode(codes, {"codebook": table}) == table.reshape(1, -1)).all()


def test_half_way_goes_to_the_even_code_of_a_small_float() -> None:
    e2m1 = parse_format("mxfp4").element
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0, -0.25]])
    levels = e2m1.decode(e2m1.encode(x, {}), {})
    assert levels.tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0, -0.0]]
