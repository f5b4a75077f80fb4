"""Tuning: scales move, nothing else does, and the model comes nearer to its original."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import tiny_ids, tiny_llama
from torch import nn
from tuned import LAYERS, batches, changed_planes, weights_of

from lowbit import Int8StaticActivationInt8WeightConfig, QuantizedTensor, quantize_
from lowbit.tools.evaluate import evaluate
from lowbit.tune import ScaledLinear, tune_scales_


@pytest.mark.parametrize("config", ["int4wo-16", "int3wo-16", "nvfp4wo", "nf4wo-64", "int4wo-32-sym"])
def test_text_that_was_not_seen_loses_less_and_only_scales_change(config: str) -> None:
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {LAYERS: config})
    before = weights_of(model)
    ids = tiny_ids(1, 2000, seed=99)[0]
    untuned = evaluate(model, ids, original, 60).kl_mean
    losses = tune_scales_(model, original, batches(16), epochs=2, lr=3e-3)
    assert len(losses) == 32
    tuned = evaluate(model, ids, original, 60).kl_mean
    assert tuned is not None
    assert untuned is not None
    assert tuned < 0.98 * untuned
    planes = list(changed_planes(model, before).values())
    assert all(changed <= {"scale"} for changed in planes)
    changed = sum(map(len, planes))
    assert 0 < changed <= 14  # scales in e4m3 are coarse, and some stay where they are


def test_a_first_loss_is_that_of_the_model_as_it_was() -> None:
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {LAYERS: "int4wo-16"})
    ids = tiny_ids(1, 61)
    wanted = evaluate(model, ids[0], original, 61).kl_mean
    # The last token of a text is followed by nothing, so that it is not evaluated.
    assert tune_scales_(model, original, [ids[:, :-1]])[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("config", ["int3wo-16", "nvfp4wo", "int8wo"])
def test_gradients_are_those_of_the_scale(config: str) -> None:
    """Against autograd through `w exp(g)`, tile by tile."""
    linear = nn.Linear(48, 24)
    quantize_(linear, config, lambda *_: True)
    weight = linear.weight
    assert isinstance(weight, QuantizedTensor)
    layer = ScaledLinear(weight, linear.bias.detach())
    assert torch.equal(layer.dense(), weight.dequantize(torch.float32))
    x = torch.randn(3, 5, 48, requires_grad=True)
    up = torch.randn(3, 5, 24)
    (layer(x) * up).sum().backward()
    by_x, x.grad = x.grad, None
    gain = torch.zeros_like(layer.gain, requires_grad=True)
    dense = weight.dequantize(torch.float32) * gain.exp().repeat_interleave(48 // gain.shape[1], 1)
    (F.linear(x, dense, linear.bias.detach()) * up).sum().backward()
    torch.testing.assert_close(layer.gain.grad, gain.grad)
    torch.testing.assert_close(by_x, x.grad)


def test_shared_weights_stay_shared() -> None:
    original, model = tiny_llama(), tiny_llama()
    for m in (original, model):
        m.model.layers[1].mlp.up_proj.weight = m.model.layers[0].mlp.up_proj.weight
    quantize_(model, {LAYERS: "int4wo-16"})
    tune_scales_(model, original, batches(16))
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in range(2))
    assert torch.equal(first.scale, second.scale)


def test_what_cannot_be_tuned_is_refused() -> None:
    original, ids = tiny_llama(), [tiny_ids()]
    with pytest.raises(ValueError, match="no Linear is quantized"):
        tune_scales_(tiny_llama(), original, ids)
    for config, match in (
        ("mxfp4wo", "too coarse"), ("nf4wo-64-dq", "too coarse"),
        (Int8StaticActivationInt8WeightConfig(scale=0.1), "static activation"),
    ):  # fmt: skip
        model = tiny_llama()
        quantize_(model, {LAYERS: config})
        with pytest.raises(ValueError, match=match):
            tune_scales_(model, original, ids)
    quantize_(model := tiny_llama(), {LAYERS: "int4wo-16"})
    for options in ({"batches": []}, {"epochs": 0}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
            tune_scales_(model, original, **{"batches": ids, **options})
