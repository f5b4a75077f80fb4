"""Quantization-aware training: what is trained is, bit by bit, what is converted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import each_format, same_bits, weights
from tiny_llama import tiny_ids, tiny_llama
from torch import Tensor, nn

import lowbit
from lowbit import QuantizedTensor, convert_qat_, parse_config, prepare_qat_, quantize_
from lowbit.algorithms.qat import fake_quantize
from lowbit.formats import Format
from lowbit.formats.activation import parse_activation


def trained(model: nn.Module, steps: int = 5) -> list[float]:
    """Losses of a few steps towards random targets, with an optimizer that knows the parameters by identity."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 64, generator=generator), torch.randn(64, 16, generator=generator)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_value_is_the_quantized_one(fmt: Format, dtype: torch.dtype) -> None:
    for kind in ("normal", "outlier_channels"):
        w = weights(kind, 24, 140).to(dtype).requires_grad_()
        got = fake_quantize(w, fmt)
        assert same_bits(got.detach(), QuantizedTensor.from_float(w.detach(), fmt).dequantize())
        (got * torch.arange(140)).sum().backward()
        assert w.grad is not None
        assert torch.equal(w.grad, torch.arange(140).to(dtype).expand_as(w))


@pytest.mark.parametrize("spec", ["int8:row", "float8_e4m3:row", "mxfp8_e4m3", "nvfp4", "int8:row:asym"])
def test_inputs_too(spec: str) -> None:
    act = parse_activation(spec)
    assert act is not None
    x = torch.randn(2, 5, 64)
    flat = x.view(-1, 64)
    assert torch.equal(fake_quantize(x, act).view(-1, 64), act.format.dequantize(act.quantize(flat), *flat.shape))


@pytest.mark.parametrize("config", ["int4wo-32", "int2wo-32-asym", "nvfp4wo", "int8dq", "float8dq-row"])
def test_converting_keeps_every_bit_of_training(config: str) -> None:
    model = small()
    names = prepare_qat_(model, config)
    assert names == ["0", "2"]
    losses = trained(model, 30)
    assert losses[-1] < losses[0]
    seen = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    x = torch.randn(8, 64)
    wanted = model(x)
    report = convert_qat_(model)
    assert [layer.format for layer in report.quantized] == [parse_config(config).scheme.spec] * 2
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(weight.dequantize(), seen[name])
        assert not model.get_submodule(name)._forward_pre_hooks
    with torch.no_grad():
        assert (model(x) - wanted).norm() <= 0.01 * wanted.norm()  # kernels add in another order, some in bf16


def test_training_for_the_format_beats_rounding_afterwards() -> None:
    plain, aware = small(), small()
    prepare_qat_(aware, "int2wo-32-asym")
    trained(plain, 200)
    trained(aware, 200)
    quantize_(plain, "int2wo-32-asym")
    convert_qat_(aware)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 64, generator=generator), torch.randn(64, 16, generator=generator)
    with torch.no_grad():
        assert F.mse_loss(aware(x), y) < 0.8 * F.mse_loss(plain(x), y)


def test_an_optimizer_made_before_goes_on() -> None:
    model = small()
    parameters = [id(p) for p in model.parameters()]
    prepare_qat_(model, {"0": "int4wo-32"})
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)


def test_a_prepared_model_is_copied_and_stored() -> None:
    model, ids = tiny_llama(), tiny_ids()
    prepare_qat_(model, {"re:model.layers.*": "int4wo-16"})
    wanted = model(ids)
    other = copy.deepcopy(model)
    assert torch.equal(other(ids), wanted)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), wanted)
    rounded = tiny_llama()
    quantize_(rounded, {"re:model.layers.*": "int4wo-16"})
    convert_qat_(other)
    assert torch.equal(other(ids), rounded(ids))


def test_what_cannot_be_prepared() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"static.*\[lowbit: layer-not-quantizable\]"):
        prepare_qat_(model, lowbit.Int8StaticActivationInt8WeightConfig(scale=0.1))
    with pytest.raises(ValueError, match=r"\[lowbit: no-layer-selected\]"):
        convert_qat_(model)
    prepare_qat_(model, {"0": "int8wo"})
    with pytest.raises(ValueError, match="prepared already"):
        prepare_qat_(model, "int8wo")
    quantize_(other := small(), "int8wo")
    with pytest.raises(ValueError, match="already int8:row"):
        prepare_qat_(other, "int8wo")
    x: Tensor = model(torch.randn(2, 64))
    assert x.shape == (2, 16)
