"""Planes have the declared shapes and bytes, packing is a bijection, a spec rebuilds its format."""

import math

import numpy as np
import numpy_reference
import pytest
import torch
from cases import each_format, same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats import Format, parse_format, registered
from lowbit.formats.elements import PLANE_WIDTHS, IntElement, pack_bits, unpack_bits

SIZES = [(1, 1), (3, 31), (64, 128), (129, 257)]


@each_format
def test_planes_are_as_declared(fmt: Format) -> None:
    for n, k in SIZES:
        planes = fmt.quantize(weights("normal", n, k))
        assert tuple(planes) == fmt.plane_names
        for plane in fmt.planes:
            assert planes[plane.name].shape == plane.shape_for(n, k)
            assert planes[plane.name].dtype == plane.dtype
            assert planes[plane.name].is_contiguous()
        assert fmt.nbytes(n, k) == sum(t.numel() * t.dtype.itemsize for t in planes.values())


@each_format
def test_bytes_are_the_bits_of_the_format(fmt: Format) -> None:
    """A weight of whole tiles takes its bits and, beyond them, only the planes that belong to the whole of it."""
    n, k = 4 * fmt.tile[0], 8 * math.lcm(fmt.tile[1], 8)
    whole = sum(math.prod(p.shape_for(n, k)) * p.dtype.itemsize for p in fmt.planes if p.shape or None in p.tile)
    assert fmt.nbytes(n, k) - whole == fmt.bits_per_weight * n * k / 8
    codes = sum(p.bits_per_weight for p in fmt.code_planes)
    assert codes == fmt.element.bits / fmt.element.vector


@pytest.mark.parametrize("bits", range(1, 9))
@given(n=st.integers(1, 9), k=st.integers(1, 70), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_packing_is_a_bijection(bits: int, n: int, k: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (n, k), dtype=np.uint8))
    element = IntElement(bits, symmetric=False)
    planes = element.pack(codes)
    assert sum(t.shape[1] for t in planes.values()) == sum(-(-k * width // 8) for width in PLANE_WIDTHS[bits])
    assert torch.equal(element.unpack(planes, k), codes)
    for name, stored in numpy_reference.pack(codes.numpy(), bits).items():
        assert (planes[name].numpy() == stored).all()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_byte_is_some_row_of_codes(width: int) -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack_bits(unpack_bits(every, width, 8 // width), width), every)


@each_format
def test_every_code_survives_quantizing_again(fmt: Format) -> None:
    """Decoded weights, quantized with the same scales, are the same weights."""
    w = weights("normal", 65, 200)
    planes = fmt.quantize(w)
    once = fmt.dequantize(planes, *w.shape)
    params = {p.name: planes[p.name] for p in fmt.scale_planes}
    assert torch.equal(fmt.dequantize(fmt.quantize(once, params), *w.shape), once)


@each_format
def test_slices_decode_to_slices(fmt: Format) -> None:
    tn, tk = fmt.tile
    n, k = 3 * tn + 1, min(3 * tk + 1, 40_000)
    planes = fmt.quantize(weights("normal", n, k))
    whole = fmt.dequantize(planes, n, k)
    for start, stop in ((0, tn), (tn, 3 * tn), (2 * tn, n)):
        part = fmt.dequantize(fmt.slice_planes(planes, 0, start, stop), stop - start, k)
        assert same_bits(part, whole[start:stop])
    for start, stop in ((0, tk), (tk, 2 * tk), (tk, k)):
        part = fmt.dequantize(fmt.slice_planes(planes, 1, start, stop), n, stop - start)
        assert same_bits(part, whole[:, start:stop])


@each_format
def test_rows_are_quantized_alike_in_chunks(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights("normal", 300, 130)
    at_once = fmt.quantize(w)
    monkeypatch.setattr("lowbit.formats.base.CHUNK_ELEMENTS", 1000)
    in_chunks = fmt.quantize(w)
    for name, plane in at_once.items():
        assert same_bits(plane, in_chunks[name]), name


def test_specs_rebuild_their_formats() -> None:
    for fmt in registered():
        assert parse_format(fmt.spec) == fmt
        assert hash(parse_format(fmt.spec)) == hash(fmt)
    assert len({f.spec for f in registered()}) == len(registered())


@given(
    bits=st.integers(1, 8),
    granularity=st.sampled_from(["tensor", "row", "g1", "g7", "g32", "g256", "b1x1", "b64x32"]),
    asymmetric=st.booleans(),
    scale=st.sampled_from(["", "fp32", "bf16", "fp16"]),
)
def test_integer_specs_round_trip(bits: int, granularity: str, asymmetric: bool, scale: str) -> None:
    words = [f"int{bits}", granularity, "asym" if asymmetric else "", scale]
    fmt = parse_format(":".join(w for w in words if w))
    assert parse_format(fmt.spec) == fmt
    w = weights("normal", 66, 70)
    assert fmt.dequantize(fmt.quantize(w), 66, 70).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("int9:g64", "int8"), ("", "float8_e4m3"), ("int4:g64:sym", "asym"), ("int4:g", "g<size>"),
        ("int4:g0", "at least 1"), ("int4:b0x4", "positive"), ("int4:b4", "b<rows>x<columns>"),
        ("int4:g64:g32", "repeats"), ("int4:asym:asym", "repeats"), ("float8_e4m3:asym", "row"),
        ("float8_e3m4", "float8_e5m2"), ("mxfp4:g16", "32"), ("mxfp4:ceil", "rceil"), ("nvfp4:row", "no options"),
        ("nf4:row", "g64"), ("nf4:g64:asym", "dq"), ("codebook5:g64", "codebook4"), ("codebook4:row", "g64"),
        ("codebook4v2:g63", "multiple"), ("INT4:g64", "int4"), ("int4:g-1", "g<size>"), ("int4:", "row"),
    ],
)  # fmt: skip
def test_bad_specs_name_what_is_possible(spec: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_format(spec)
