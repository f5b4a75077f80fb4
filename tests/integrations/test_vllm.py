"""The plugin in vLLM itself: its layers, its parameters, its loaders and its engine, none of them imitated.

They run in processes of their own (vllm_ranks.py, vllm_engine.py): vLLM keeps its state in globals, and does not live
with warnings as errors. A build of vLLM for the CPU is enough; where there is a GPU, the engine's tests are of
that.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_processes import finish, notes, run
from proofs import PICKED, WRITTEN

import lowbit
from lowbit import parse_config
from lowbit.specs import EXAMPLES
from lowbit.tools import doctor

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; its CPU build is enough for these tests", allow_module_level=True)

from tiny_transformers import llama, logits, saved
from transformers import PreTrainedModel

DYNAMIC = tuple(s for s in EXAMPLES if (act := parse_config(s).scheme.act) is None or not act.static)
#: K of a row-parallel layer on each of two ranks, in vllm_ranks.py.
HALF = 256
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


def test_the_doctor_sees_that_the_plugin_is_loaded() -> None:
    assert doctor.engine("vllm").endswith(", loads the plugin")


def assert_equal(world: int, directory: Path, name: str, spec: str) -> None:
    tile = parse_config(spec).scheme.weight.tile[1]
    for found in notes("vllm", world, directory):
        note = found[f"{name} {spec}"]
        if world > 1 and HALF % tile:
            assert "cut-inside-tile" in note["error"], note
            assert "attn.o_proj" in note["error"], note
        else:
            assert len(note) == 21, note  # 8 layers, few and one token; the embedding; the planes of 4 layers
            assert set(note.values()) == {"equal"}, note


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spec", EXAMPLES)
def test_our_own_convention_in_vllms_layers(world: int, spec: str, directory: Path) -> None:
    assert_equal(world, directory, "own", spec)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spec", WRITTEN)
def test_compressed_tensors_in_vllms_layers(world: int, spec: str, directory: Path) -> None:
    assert_equal(world, directory, "compressed_tensors", spec)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spec", DYNAMIC)
def test_quantized_while_vllm_loads(world: int, spec: str, directory: Path) -> None:
    assert_equal(world, directory, "online", spec)


@pytest.mark.parametrize("spec", WRITTEN)
def test_vllms_own_reader_takes_the_scheme(spec: str, directory: Path) -> None:
    """The class that it would run on a Hopper GPU, by its own choice."""
    [found] = notes("vllm", 1, directory)
    assert found["picked"][spec] == PICKED[spec][0]


MESSAGES = {
    "a_missing_tensor": ("CheckpointError", "attn.q_proj, attn.k_proj, attn.v_proj", "weight_scale"),
    "another_dtype": ("CheckpointError", "fc: weight is torch.int32", "torch.int8", "lowbit verify"),
    "parts_that_differ": ("attn.q_proj is int8:row", "attn.k_proj is int4:g32:asym", "[lowbit: format-mismatch]"),
    "static_activations_online": ("float8sq", "[lowbit: missing-calibration]"),
    "a_rule_without_a_layer": ("['attn.q']", "attn.q_proj, attn.k_proj", "[lowbit: rule-without-match]"),
    "rules_that_all_miss": ("['re:.*proj[0-9]']", "[lowbit: rule-without-match]"),
    "an_unknown_config": ("int9wo", "[lowbit: unknown-config]"),
    "an_unknown_section": ("CheckpointError", "'format_version': 2"),
    "neither_config_nor_rules": ("CheckpointError", "'config': 4"),
    "an_unknown_format": ("CheckpointError", "int9:g128", "[lowbit: unknown-format]"),
    "another_section_of_compressed_tensors": ("CheckpointError", "kv_cache_scheme"),
    "a_quantized_embedding_with_activations": ("embed_tokens", "int8dq", "[lowbit: layer-not-quantizable]"),
    "weights_that_are_not_finite": ("mlp.up_proj", "1 NaN", "[lowbit: nonfinite-weight]"),
    "a_cut_through_words_of_the_vocabulary": ("lm_head", "500", "tiles of 8", "[lowbit: cut-inside-tile]"),
    "experts_by_name": ("layers.0.experts", "runs no quantized experts", "[lowbit: layer-not-quantizable]"),
    "experts_by_class": ("layers.0.experts", "runs no quantized experts", "[lowbit: layer-not-quantizable]"),
    "no_experts_by_the_manifest": ("nothing",),
    "a_head_tied_to_a_float_embedding": ("tie_word_embeddings", "[lowbit: layer-not-quantizable]"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_does_not_fit_is_refused(name: str, directory: Path) -> None:
    [found] = notes("vllm", 1, directory)
    assert found["refused"].keys() == MESSAGES.keys()
    for words in MESSAGES[name]:
        assert words in found["refused"][name]


# The engine -----------------------------------------------------------------------------------------------------------

PROMPT = [1, 5, 9, 30, 61]
EMBEDDING_TOO = {"_default": "int4wo-32", "model.embed_tokens": "int8wo"}
ONLINE = {"quant_method": "lowbit", "config": {"lm_head": "int8wo", "_default": "int4wo-32"}}
#: What changes in the model, how it is quantized, and how vLLM is started.
ENGINES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "compressed-tensors": ({}, "int4wo-32", {"quantization": "lowbit"}),
    "own": ({}, EMBEDDING_TOO, {}),
    "two ranks": ({"num_key_value_heads": 1}, EMBEDDING_TOO, {"tensor_parallel_size": 2}),
    "tied": ({"tie_word_embeddings": True}, {"model.embed_tokens": "int8wo", "re:model.layers.*": "int4wo-32"}, {}),
    "online": ({}, None, {"hf_overrides": {"quantization_config": ONLINE}}),
    "compiled": ({}, "int4wo-32", {"quantization": "lowbit", "enforce_eager": False}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_finds_the_plugin_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """As transformers does with the same quantized weights; attention and norms are vLLM's, so not to the bit."""
    changes, rules, options = ENGINES[name]
    if torch.cuda.is_available() and torch.cuda.device_count() < options.get("tensor_parallel_size", 1):
        pytest.skip("vLLM for GPUs wants one for each rank")
    model = llama(**changes)
    if rules is None:
        saved(model, tmp_path / "model")
        rules = ONLINE["config"]
        lowbit.quantize_(model, rules)
    else:
        lowbit.quantize_(model, rules)
        if name == "tied":
            model.lm_head.weight = model.model.embed_tokens.weight
        lowbit.save(model, tmp_path / "model")
    # In one process where nothing speaks for several, which is faster.
    several = "1" if name in ("own", "two ranks") else "0"
    out = finish(run(
        "vllm_engine.py", str(tmp_path / "model"), json.dumps(PROMPT), json.dumps({"enforce_eager": True} | options),
        VLLM_CACHE_ROOT=str(tmp_path / "cache"), VLLM_ENABLE_V1_MULTIPROCESSING=several,
        VLLM_CPU_OMP_THREADS_BIND="0|1" if name == "two ranks" else "auto",
    ))  # fmt: skip
    found = json.loads(out.rpartition("LOGPROBS ")[2].splitlines()[0])
    expected, plain = log_probabilities(model), log_probabilities(llama(**changes))
    error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert error < 0.01
    assert error < max(abs(a - b) for a, b in zip(found, plain, strict=True)) / 4, "the float model's are as near"


def log_probabilities(model: PreTrainedModel) -> list[float]:
    """Of the prompt's tokens but the first."""
    rows = logits(model, torch.tensor([PROMPT]))[0].float().log_softmax(-1)
    return [float(rows[i, token]) for i, token in enumerate(PROMPT[1:])]
