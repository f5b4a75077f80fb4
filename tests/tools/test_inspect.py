"""What `inspect` says about weights, against figures computed by hand."""

import math

import pytest
import torch
from torch import nn

import lowbit
from lowbit.tools.inspect import FloatLayer, QuantizedLayer, inspect_model


def model_of(w):
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w)
    return nn.Sequential(layer)


def test_moments_are_those_of_the_definition():
    w = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    w[5, 7] = 50.0
    (layer,) = inspect_model(model_of(w), ["int8wo"])
    d = w.double()
    centred = d - d.mean()
    variance = float(centred.square().mean())
    assert isinstance(layer, FloatLayer)
    assert layer.std == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert layer.excess_kurtosis == pytest.approx(float((centred**4).mean()) / variance**2 - 3, rel=1e-9)
    assert layer.outlier_ratio == 1 / w.numel()
    assert (layer.lowest, layer.highest) == (float(w.min()), 50.0)


def test_sqnr_is_what_quantize_reports():
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    (layer,) = inspect_model(model_of(w), ["int4wo-32", "mxfp4wo"])
    assert isinstance(layer, FloatLayer)
    for spec, sqnr in layer.sqnr_db.items():
        report = lowbit.quantize_(model_of(w.clone()), spec)
        assert report.layers[0].sqnr_db == sqnr


def test_constant_and_broken_weights_are_described_too():
    (zeros,) = inspect_model(model_of(torch.zeros(4, 8)), ["int8wo"])
    assert isinstance(zeros, FloatLayer)
    assert (zeros.std, zeros.excess_kurtosis, zeros.outlier_ratio) == (0.0, 0.0, 0.0)
    w = torch.ones(4, 8)
    w[0, 0] = torch.inf
    (broken,) = inspect_model(model_of(w), ["int8wo"])
    assert isinstance(broken, FloatLayer)
    assert broken.highest == math.inf
    assert broken.sqnr_db == {}


def test_code_use_of_quantized_layers():
    """A ramp over all sixteen codes uses each equally often: four bits of entropy."""
    w = torch.arange(-8, 8).float().repeat(4, 2)
    model = model_of(w)
    lowbit.quantize_(model, "int4:g16:asym")
    (layer,) = inspect_model(model)
    assert isinstance(layer, QuantizedLayer)
    assert (layer.codes, layer.codes_used) == (16, 16)
    assert layer.entropy_bits == pytest.approx(4.0)
    assert layer.bytes == model[0].weight.nbytes_packed
    assert layer.bits_per_weight == 8 * layer.bytes / w.numel()
    assert layer.scale_range == (1.0, 1.0)


def test_a_shared_weight_is_listed_once():
    a, b = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    b.weight = a.weight
    (layer,) = inspect_model(nn.Sequential(a, b), ["int8wo"])
    assert (layer.name, layer.kind) == ("0", "Embedding")


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match="no Linear"):
        inspect_model(nn.Sequential(nn.ReLU()))
