"""Tuning block by block: codes and scales move, formats stay, and every block comes nearer to its original."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import tiny_ids, tiny_llama
from torch import Tensor, nn
from tuned import LAYERS, batches, changed_planes, weights_of

from lowbit import Int8StaticActivationInt8WeightConfig, QuantizedTensor, quantize_
from lowbit.linear import beside
from lowbit.tools.evaluate import evaluate
from lowbit.tune_blocks import RoundedLinear, tune_blocks_


def codes_of(weight: QuantizedTensor) -> dict[str, Tensor]:
    return {p.name: weight.planes[p.name].view(torch.uint8) for p in weight.format.code_planes}


@pytest.mark.parametrize("config", ["int3wo-16", "mxfp4wo", "nvfp4wo", "codebook4wo-64", "float8wo"])
def test_text_that_was_not_seen_loses_less(config: str) -> None:
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {LAYERS: config})
    before = weights_of(model)
    ids = tiny_ids(1, 2000, seed=99)[0]
    untuned = evaluate(model, ids, original, 60).kl_mean
    asked: list[tuple[int, int, str]] = []
    fits = tune_blocks_(model, original, batches(12), lr=0.04, progress=lambda *at: asked.append(at))
    assert asked == [(i, 2, f"model.layers.{i}") for i in range(2)]
    assert [f.name for f in fits] == ["model.layers.0", "model.layers.1"]
    assert all(f.after < f.before for f in fits)
    tuned = evaluate(model, ids, original, 60).kl_mean
    assert tuned is not None
    assert untuned is not None
    assert tuned < 0.97 * untuned
    for name, changed in changed_planes(model, before).items():
        old = before[name]
        assert isinstance(old, QuantizedTensor)
        assert changed & {*codes_of(old)}
        assert changed <= {*codes_of(old), "scale"}
        assert ("scale" in changed) != (config == "mxfp4wo")  # powers of two stay


def test_a_block_that_training_makes_worse_stays() -> None:
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {LAYERS: "int4wo-16"})
    before = weights_of(model)
    fits = tune_blocks_(model, original, batches(2), epochs=1, lr=3.0)
    assert all(f.after == f.before for f in fits)
    assert all(model.get_submodule(name).weight is weight for name, weight in before.items())


def test_what_a_block_gives_is_what_was_trained() -> None:
    """The error after training is that of the quantized model itself."""
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {LAYERS: "int3wo-16"})
    model.float(), original.float()
    ids = batches(4)
    *_, last = tune_blocks_(model, original, ids, lr=0.04)
    seen: list[Tensor] = []
    hook = [
        m.model.layers[1].register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
        for m in (model, original)
    ]
    with torch.no_grad():
        errors = sizes = 0.0
        for batch in ids:
            model(batch), original(batch)
            _, y, x0, y0 = seen
            seen.clear()
            added = (y0 - x0).flatten(0, -2)
            length = added.norm(dim=1, keepdim=True)
            share = (2 * length.median() / length).clamp(max=1)
            errors += float(((y - y0).flatten(0, -2) * share).square().sum())
            sizes += float((added * share).square().sum())
    for h in hook:
        h.remove()
    assert last.after == pytest.approx(errors / sizes, rel=1e-3)


@pytest.mark.parametrize("config", ["int3wo-16", "int2wo-16-asym", "nf4wo-64", "int8dq-int4-16"])
def test_gradients_are_those_of_the_rounded_weight(config: str) -> None:
    linear = nn.Linear(64, 24)
    quantize_(linear, config, lambda *_: True)
    weight = linear.weight
    assert isinstance(weight, QuantizedTensor)
    layer = RoundedLinear(weight, linear.bias.detach())
    layer.train_()
    assert torch.equal(layer.dense(), weight.dequantize(torch.float32))
    assert all(torch.equal(layer.planes[p].view(torch.uint8), t) for p, t in codes_of(weight).items())
    x, up = torch.randn(3, 5, 64), torch.randn(3, 5, 24)
    (layer(x) * up).sum().backward()
    dense = weight.dequantize(torch.float32).requires_grad_(True)
    (F.linear(layer.quantized_input(x), dense, linear.bias.detach()) * up).sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(layer.shift.grad, dense.grad * layer.unit)
    by_tile = (dense.grad * dense.detach()).unflatten(1, (layer.gain.shape[1], -1)).sum(-1)
    torch.testing.assert_close(layer.gain.grad, by_tile)


def test_a_weight_that_goes_half_a_level_changes_its_code() -> None:
    linear = nn.Linear(32, 8, bias=False)
    quantize_(linear, "int4wo-32-sym", lambda *_: True)
    weight = linear.weight
    assert isinstance(weight, QuantizedTensor)
    layer, levels = RoundedLinear(weight, None), (weight.dequantize(torch.float32) / weight.planes["scale"].float())
    with torch.no_grad():
        layer.shift.fill_(-0.4)
        assert torch.equal(layer.dense(), weight.dequantize(torch.float32))
        layer.shift.fill_(-0.6)
        moved = layer.dense() / weight.planes["scale"].float()
    torch.testing.assert_close(moved, (levels - 1).clamp(min=-8))


def test_what_lies_beside_a_weight_stays() -> None:
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {LAYERS: "int3wo-16"}, algorithm="incoherence+rtn+lowrank-2", batches=batches(2))
    name = "model.layers.0.mlp.down_proj"
    kept = {k: t.clone() for k, t in beside(model.get_submodule(name)).items()}
    fits = tune_blocks_(model, original, batches(12), lr=0.04)
    assert all(f.after < f.before for f in fits)
    assert kept
    assert all(torch.equal(t, kept[k]) for k, t in beside(model.get_submodule(name)).items())


def test_blocks_without_quantized_layers_are_passed() -> None:
    original, model = tiny_llama(), tiny_llama()
    quantize_(model, {"re:model.layers.1.*": "int3wo-16"})
    first, second = tune_blocks_(model, original, batches(8), lr=0.04)
    assert first.before == first.after < 1e-9
    assert second.after < second.before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "needs a batch"), ({"epochs": 0}, "epochs=0"), ({"lr": 0.0}, "lr=0"),
        ({"scale_lr": -1.0}, "scale_lr=-1"),
    ],
)  # fmt: skip
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    model = tiny_llama()
    quantize_(model, {LAYERS: "int3wo-16"})
    with pytest.raises(ValueError, match=message):
        tune_blocks_(model, tiny_llama(), **({"batches": batches(1)} | options))  # type: ignore[arg-type]


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing in model\.layers is quantized"):
        tune_blocks_(tiny_llama(), tiny_llama(), batches(1))
    rotated = tiny_llama()
    quantize_(rotated, {LAYERS: "int3wo-16"}, algorithm="rotation")
    with pytest.raises(ValueError, match="rotated"):
        tune_blocks_(rotated, tiny_llama(), batches(1))
    static = tiny_llama()
    quantize_(static, {LAYERS: Int8StaticActivationInt8WeightConfig(scale=0.1)})
    with pytest.raises(ValueError, match="static activation scale"):
        tune_blocks_(static, tiny_llama(), batches(1))
    shared = tied_llama()
    quantize_(shared, {LAYERS: "int3wo-16"})
    with pytest.raises(ValueError, match=r"blocks 0 and 1 share the weight of mlp\.up_proj"):
        tune_blocks_(shared, tied_llama(), batches(1))


def tied_llama() -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model
