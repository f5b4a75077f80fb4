"""Words for algorithms: what they stand for, and what whole models make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from torch import Tensor, nn

from lowbit import Int8StaticActivationInt8WeightConfig, QuantizedTensor, quantize_
from lowbit.calibrate import Moments
from lowbit.graph import decoder_graph
from lowbit.models import Llama, LlamaConfig
from lowbit.recipe import BLIND, ROUNDINGS, STEPS, Recipe, parse_recipe, recipes_of
from lowbit.stages import run_stages

WIDE = replace(CONFIG, hidden_size=96, intermediate_size=160)
LAYERS = "re:model.layers.*"


def batches() -> list[Tensor]:
    return [tiny_ids(4, 60, seed=s) for s in range(12)]


def uneven(config: LlamaConfig = WIDE) -> Llama:
    """Channels differ as those of trained models do: a few are far larger than the others."""
    model = tiny_llama(config)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[::16] *= 8
    return model


def loss(algorithm: str, config: str = "int3wo-32", seen: bool | None = None) -> float:
    """Squared error of the decoder's output for the batches."""
    original, model = uneven(), uneven()
    needs = parse_recipe(algorithm).needs_batches if seen is None else seen
    quantize_(model, {LAYERS: config}, algorithm=algorithm, batches=batches() if needs else None)
    assert all(isinstance(m.weight, QuantizedTensor) for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    # A rotated model has the same last norm, read by a rotated projection: compare logits.
    return float(sum((model(ids) - original(ids)).square().sum() for ids in batches()))


def test_words() -> None:
    assert parse_recipe("gptq") == Recipe((), "gptq")
    assert parse_recipe("awq") == Recipe(("awq",), "mse")
    assert parse_recipe("smoothquant") == Recipe(("smoothquant",), "rtn")
    assert parse_recipe("rotation") == Recipe(("rotation",), "rtn")
    assert str(parse_recipe("rotation+awq+align")) == "rotation+awq+align+gptq"
    for rounding in ROUNDINGS:
        assert parse_recipe(rounding).needs_batches == (rounding == "gptq")
        for step in STEPS:
            recipe = parse_recipe(f"{step}+{rounding}")
            assert recipe == Recipe((step,), rounding)
            assert recipe.needs_batches == (rounding == "gptq" or step not in BLIND)


@pytest.mark.parametrize(
    "word", ["", "best", "gptq+awq", "awq+rotation", "awq+awq", "smoothquant+awq", "rtn+gptq", "+"]
)
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
        parse_recipe(word)


@pytest.mark.parametrize(("better", "than"), [("awq", "rtn"), ("awq", "mse"), ("awq+gptq", "awq"), ("align", "gptq"),
                                              ("align+rtn", "rtn"), ("awq+align", "awq"), ("rotation", "rtn"),
                                              ("rotation+align", "rotation")])  # fmt: skip
def test_what_each_step_is_for(better: str, than: str) -> None:
    assert loss(better) < loss(than)


def test_smoothquant_keeps_more_with_8_bit_activations() -> None:
    assert loss("smoothquant", "int8dq") < 0.5 * loss("rtn", "int8dq")


def test_all_steps_go_together() -> None:
    assert loss("rotation+awq+align+gptq") < loss("gptq")


# By layer -----------------------------------------------------------------------------------------


def test_words_by_layer_are_found_as_rules_are() -> None:
    words = {"a.b": "awq", "re:a.*": "gptq", "re:.*d": "hqq", "_default": "mse"}
    found = recipes_of(words, ["a.b", "a.d", "c.d", "e"])
    assert {n: str(r) for n, r in found.by_layer.items()} == {"a.b": "awq+mse", "a.d": "gptq", "c.d": "hqq", "e": "mse"}
    assert found.steps == ("awq",)
    assert found.needs_batches
    assert not recipes_of({"re:.*": "hqq"}, ["a"]).needs_batches
    assert recipes_of({"a": "gptq"}, ["a", "b"]).by_layer["b"] == Recipe((), "rtn")


def test_each_layer_gets_its_own_algorithm() -> None:
    """Bit by bit what a call with that algorithm for all gives, in the first block, which sees the same inputs."""
    models = {}
    for word in ("gptq", "awq+gptq", "rtn", "mixed"):
        models[word] = uneven()
        by_layer = {"re:.*mlp.(gate|up)_proj": "awq+gptq", "re:.*self_attn.*": "gptq"}
        algorithm = by_layer if word == "mixed" else word
        quantize_(
            models[word], {LAYERS: "int3wo-32"}, algorithm=algorithm, batches=None if word == "rtn" else batches()
        )
    # Not up: with awq for all, the scales of down's input are folded into it.
    for part, word in (("self_attn.q_proj", "gptq"), ("mlp.gate_proj", "awq+gptq"), ("mlp.down_proj", "rtn")):
        codes = {w: m.get_submodule(f"model.layers.0.{part}").weight.qdata_2bit for w, m in models.items()}
        assert [w for w in codes if torch.equal(codes[w], codes["mixed"])] == [word, "mixed"]


def test_words_by_layer_that_do_not_go_together_are_refused() -> None:
    for words, match in (
        ({"nothing": "gptq"}, r"match no layer.*'nothing'"), ({"re:.*q_proj": "rotation"}, "whole blocks"),
        ({"re:.*q_proj": "awq+gptq", "_default": "gptq"}, "read one input"),
        ({"_default": "best"}, "unknown algorithm"),
        ({"_default": "awq", "re:.*down_proj": "smoothquant"}, "whole blocks"),
    ):  # fmt: skip
        model = tiny_llama()
        with pytest.raises(ValueError, match=match):
            quantize_(model, {LAYERS: "int4wo-16"}, algorithm=words, batches=batches())
        assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


# What does not go together ------------------------------------------------------------------------


def test_batches_go_with_steps_that_look_at_inputs() -> None:
    for algorithm, given in (("awq", None), ("align+rtn", None), ("rotation", [tiny_ids()])):
        model = tiny_llama()
        with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
            quantize_(model, "int4wo-16", algorithm=algorithm, batches=given)
        assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


def test_static_scales_are_older_than_the_inputs() -> None:
    config = Int8StaticActivationInt8WeightConfig(scale=0.1)
    with pytest.raises(ValueError, match="static activation scale, measured before smoothquant"):
        quantize_(tiny_llama(), config, algorithm="smoothquant", batches=[tiny_ids()])


def test_values_that_are_not_finite_cannot_be_repaired_on_the_way() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="on_nonfinite"):
        quantize_(model, "int4wo-16", algorithm="rotation", on_nonfinite="zero")


# Side by side -------------------------------------------------------------------------------------


def test_stages_see_both_models() -> None:
    """X and X0 are the inputs of the model as it is by then and of the original; nothing drifts before the first
    change, and a layer that was not asked for is not looked at."""
    model, original, ids = tiny_llama(), tiny_llama(), tiny_ids(1, 30)
    inputs: dict[str, Tensor] = {}
    for name, m in original.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][0].clone()}))
    original(ids)
    order, wanted = list[str](), [n for n in inputs if n not in ("lm_head", "model.layers.0.self_attn.o_proj")]

    def visit(moments: dict[str, Moments]) -> None:
        order.extend(moments)
        for name, m in moments.items():
            assert m.drift is not None
            x: list[Tensor] = []
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, x=x: x.append(args[0][0]))
            model(ids)
            hook.remove()
            share = (2 * x[0].norm(dim=1).median() / x[0].norm(dim=1)).clamp(max=1)[:, None]
            torch.testing.assert_close(m.square, (share * x[0]).T @ (share * x[0]), rtol=1e-4, atol=1e-4)
            drift = (share * (inputs[name] - x[0])).T @ (share * x[0])
            torch.testing.assert_close(m.drift, drift, rtol=1e-4, atol=1e-4)
            assert bool(m.drift.any()) == (name.split(".")[2] == "1" or "down" in name)
        for name in moments:
            if "gate" in name:
                model.get_submodule(name).weight *= 0.9

    run_stages(model, decoder_graph(model), [ids], visit, wanted=dict.fromkeys(wanted).keys())
    assert order == wanted
