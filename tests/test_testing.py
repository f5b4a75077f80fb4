"""`assert_no_dequant`, as a test of someone's own would use it."""

import pytest
import torch
from dequantizing import FILE, ChunkedLayer, Float8Layer, line_of
from torch import nn

import lowbit
from lowbit.testing import assert_no_dequant

X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_it_passes_and_says_what_ran():
    model = nn.Sequential(nn.Linear(64, 32), ChunkedLayer(128, 32)).bfloat16()
    lowbit.quantize_(model, {"0": "int4wo-32"})
    verdicts = assert_no_dequant(model, X)
    assert len(verdicts.quantized) == 2
    assert "int4:g32:asym" in str(verdicts)


def test_it_fails_with_the_table():
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), Float8Layer(128, 64))
    with pytest.raises(AssertionError, match="1 of 1 quantized layers") as caught:
        assert_no_dequant(model, X)
    assert f"{FILE.name}:{line_of('float8 dequantized')} in dequantize" in str(caught.value)


def test_it_fails_for_the_reference_kernel():
    model = nn.Linear(64, 64).bfloat16()
    lowbit.quantize_(model, "int8wo")
    with lowbit.use_kernel("reference"), pytest.raises(AssertionError, match="reference kernel"):
        assert_no_dequant(model, X)
    assert_no_dequant(model, X)


def test_it_does_not_pass_for_want_of_something_to_find():
    with pytest.raises(ValueError, match=r"nothing is quantized.*\[lowbit: nothing-quantized\]"):
        assert_no_dequant(nn.Linear(64, 64).bfloat16(), X)
    with pytest.raises(AssertionError, match="none of 1 quantized layers ran"):
        assert_no_dequant(Float8Layer(128, 64), run=lambda: None)


def test_keywords_and_other_entries():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Float8Layer(128, 64)

        def forward(self, *, hidden):
            return self.layer(hidden)

    model = Model()
    for call in (
        lambda: assert_no_dequant(model, hidden=X),
        lambda: assert_no_dequant(model, run=lambda: model(hidden=X)),
    ):
        with pytest.raises(AssertionError, match="float8_e4m3fn tensors"):
            call()
