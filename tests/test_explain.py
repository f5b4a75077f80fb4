"""`explain`: the kernel of every range of tokens, with the reasons against the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import KERNELS, select


@pytest.fixture
def model() -> nn.Module:
    m = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, dtype=torch.float32)).bfloat16()
    lowbit.quantize_(m, "int8wo")
    return m


def test_says_what_select_says(model: nn.Module) -> None:
    explanation = lowbit.explain(model, tokens=(1, 8, 64))
    assert [layer.name for layer in explanation.layers] == ["0", "2"]
    for layer in explanation.layers:
        assert layer.bytes == model.get_submodule(layer.name).weight.nbytes_packed  # type: ignore[union-attr, operator]
        for r in layer.ranges:
            for m in (r.first, r.last):
                problem = Problem(m, layer.n, layer.k, "int8:row", "", torch.bfloat16, "cpu")
                assert select(problem).kernel.name == r.kernel
    assert explanation.layers[0].ranges[0].first == 1
    assert explanation.layers[0].ranges[-1].last == 64


def test_text_names_kernels_and_reasons(model: nn.Module) -> None:
    text = str(lowbit.explain(model))
    assert "int8:row" in text
    assert "not cublas_scaled_mm: runs on cuda, not cpu" in text
    assert any(k.name in text for k in KERNELS if k.device == "cpu")


def test_nothing_quantized_is_an_error() -> None:
    with pytest.raises(ValueError, match="no quantized Linear"):
        lowbit.explain(nn.Linear(2, 2))
