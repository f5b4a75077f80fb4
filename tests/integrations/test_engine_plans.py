"""What engines are told of layers, without an engine; test_vllm.py and test_sglang.py have the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import lowbit
from lowbit import parse_config
from lowbit.checkpoints.files import CheckpointError
from lowbit.integrations.engine_plans import Asked, Own, Standard, has_experts, layers_of, one_scheme, plan_of_section

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def asked(rules: dict[str, str | None]) -> Asked:
    plan = plan_of_section({"quant_method": "lowbit", "config": rules})
    assert isinstance(plan, Asked)
    return plan


def standard(directory: Path, rules: dict[str, str | None]) -> Standard:
    model = nn.ModuleDict({"body": nn.ModuleDict({f"{p}_proj": nn.Linear(128, 64) for p in "qkv"})})
    model["head"] = nn.Linear(128, 64)
    lowbit.quantize_(model.bfloat16(), rules)
    lowbit.save(model, directory)
    plan = plan_of_section(
        json.loads((directory / "config.json").read_text())["quantization_config"] | {"added": 1}, ["added"]
    )
    assert isinstance(plan, Standard)
    return plan


def test_rules_are_those_of_quantize_() -> None:
    plan = asked({"a.up": "int8wo", "re:a\\..*": "int4wo-32", "b": None, "_default": "float8wo"})
    found = {name: plan.scheme(name, "linear") for name in ("a.up", "a.down", "b", "c")}
    specs = {name: scheme and scheme.weight.spec for name, scheme in found.items()}
    expected = {"a.up": "int8wo", "a.down": "int4wo-32", "c": "float8wo"}
    assert specs == {name: parse_config(spec).scheme.weight.spec for name, spec in expected.items()} | {"b": None}
    assert plan.scheme("c", "embedding") is None
    plan.check_used()


def test_one_config_is_for_linear_layers() -> None:
    plan = plan_of_section({"quant_method": "lowbit", "config": "int8wo"})
    assert plan.scheme("any", "linear") == parse_config("int8wo").scheme
    assert plan.scheme("lm_head", "head") is None
    assert plan.scheme("embed", "embedding") is None
    assert plan.stored(["any"], {}) is None


@pytest.mark.parametrize("rule", ["a.gone", "re:a\\.gone.*", "re:.*late"])
def test_a_rule_that_reaches_no_layer_is_named(rule: str) -> None:
    """Also one that others have left nothing for."""
    plan = asked({"re:a\\..*": "int8wo", rule: "int4wo-32"})
    for name in ("a.up", "a.late"):
        plan.scheme(name, "linear")
    with pytest.raises(ValueError, match=r"\[lowbit: rule-without-match\]") as error:
        plan.check_used()
    assert f"rules that match no layer: {[rule]}; layers are named a.up, a.late" in str(error.value)


def test_names_become_those_of_the_engine() -> None:
    plan = asked({"a.up": "int8wo", "re:b.*": None, "_default": "int4wo-32"}).renamed(lambda name: f"model.{name}")
    assert list(plan.rules) == ["model.a.up", "re:b.*", "_default"]
    assert plan.named == ["model.a.up"]
    plan.scheme("model.a.up", "linear"), plan.scheme("b", "linear")
    plan.check_used()
    own = Own({"a.up.weight": "int8:row"}).renamed(lambda name: f"model.{name}")
    assert own.named == ["model.a.up"]
    assert own.scheme("model.a.up", "linear") is not None


def test_a_section_is_renamed_as_a_whole(tmp_path: Path) -> None:
    plan = standard(tmp_path, {"head": "int8wo", "body.k_proj": None, "_default": "int4wo-32"})
    other = plan.renamed(lambda name: f"model.{name}")
    for name in ("body.q_proj", "body.k_proj", "head"):
        assert other.scheme(f"model.{name}", "linear") == plan.scheme(name, "linear")
        assert other.scheme(name, "linear") is None
    assert plan.scheme("head", "linear") is not None, "the plan itself is as it was"
    assert [stored.any_scale for stored in [plan.stored(["head"], {})] if stored] == [True]


def test_merged_layers_and_embeddings_without_a_name() -> None:
    plan = Own({"model.embed_tokens.weight": "int8:row", "a.q_proj.weight": "int8:row", "a.k_proj.weight": "int4:g32"})
    assert layers_of(plan, "a.qkv_proj", "linear", MERGED, "X") == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert layers_of(plan, "a.o_proj", "linear", MERGED, "X") == ["a.o_proj"]
    assert layers_of(plan, "", "embedding", MERGED, "X") == ["model.embed_tokens"]
    assert layers_of(Own({"a.qkv_proj.weight": "int8:row"}), "a.qkv_proj", "linear", MERGED, "X") == ["a.qkv_proj"]
    with pytest.raises(ValueError, match=r"X holds these in one layer.*a.q_proj is int8:row.*a.v_proj is float"):
        one_scheme(plan, "a.qkv_proj", ["a.q_proj", "a.k_proj", "a.v_proj"], "linear", "X")
    two = Own({"x.embed_tokens.weight": "int8:row", "y.embed_tokens.weight": "int8:row"})
    with pytest.raises(ValueError, match=r"X's model does not name its embedding"):
        layers_of(two, "", "embedding", MERGED, "X")


def test_experts_are_seen(tmp_path: Path) -> None:
    assert has_experts(Own({"a.experts.0.up.weight": "int8:row"}), "a.experts", None)
    assert not has_experts(Own({"a.up.weight": "int8:row"}), "a.experts", None)
    plan = standard(tmp_path, {"_default": "int8wo"})
    assert has_experts(plan, "a.experts", None), "a group for the class Linear"
    assert not has_experts(plan, "a.experts", {"head.weight": {}}), "the manifest has none"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"quant_method": "lowbit", "format_version": 2, "weights": {}}, "'format_version': 2"),
        ({"quant_method": "lowbit", "config": 4}, "'config': 4"),
        ({"quant_method": "gptq", "bits": 4}, "'quant_method': 'gptq'"),
        ({"quant_method": "lowbit", "format_version": 1, "weights": {"a.weight": "int9:row"}}, "int9:row"),
        ({"quant_method": "compressed-tensors", "quantization_status": "frozen"}, "quantization_status"),
    ],
)
def test_other_sections_are_refused(section: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config: ") as error:
        plan_of_section(section)
    assert named in str(error.value)


def test_what_needs_calibration_or_has_no_activations() -> None:
    with pytest.raises(ValueError, match=r"float8sq.*\[lowbit: missing-calibration\]"):
        asked({"_default": "float8sq"})
    with pytest.raises(ValueError, match=r"embed.*int8dq.*\[lowbit: layer-not-quantizable\]"):
        asked({"embed": "int8dq"}).scheme("embed", "embedding")
