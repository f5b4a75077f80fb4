"""Copies that share weights, default rules, and a GGUF file's way into a checkpoint."""

from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from tiny_model_dir import write_model

import lowbit
from lowbit.tools.sources import Source, export, find_source, rules_for, variant, weight_bytes


def test_a_variant_shares_every_weight():
    model = tiny_llama(replace(CONFIG, tie_embeddings=True))
    copy = variant(model)
    assert copy is not model
    pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
    assert pairs
    assert all(a is b for a, b in pairs)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    ids = tiny_ids()
    before = model(ids)
    lowbit.quantize_(copy, rules_for(copy, "int2wo-32-asym"))
    assert torch.equal(model(ids), before)
    assert not torch.equal(copy(ids), before)


def test_bytes_count_shared_weights_once_and_packed_ones_as_stored():
    model = tiny_llama(replace(CONFIG, tie_embeddings=True))
    assert weight_bytes(model) == sum(4 * p.numel() for p in model.parameters())
    report = lowbit.quantize_(model, rules_for(model, "int3wo-64"))
    saved = sum(r.bytes_before - r.bytes_after for r in report.quantized)
    assert weight_bytes(model) == sum(4 * p.numel() for p in tiny_llama(model.config).parameters()) - saved


@pytest.mark.parametrize(
    ("rules", "head"),
    [
        ({}, None),
        ({"lm_head": "int8wo"}, "int8wo"),
        ({"re:lm_.*": "int8wo"}, "int8wo"),
        ({"re:.*_proj": "int8wo"}, None),
    ],
)
def test_the_output_projection_is_left_alone_unless_named(rules, head):
    model = tiny_llama()
    report = lowbit.quantize_(model, rules_for(model, "int4wo-32", rules))
    formats = {r.name: r.format for r in report}
    assert (formats["lm_head"] is None) == (head is None)
    assert formats["model.layers.0.mlp.up_proj"] is not None


def test_rules_alone_leave_the_rest_alone():
    model = tiny_llama()
    assert rules_for(model, None, {"model.layers.0.mlp.up_proj": "int8wo"}) == {"model.layers.0.mlp.up_proj": "int8wo"}


def test_what_comes_from_a_gguf_file_is_a_directory_that_loads(tmp_path):
    """The path that has no config.json and no tokenizer.json to copy."""
    original = find_source(str(write_model(tmp_path / "hf", template=True)))

    class Packed(Source):
        def tokenizer(self):
            return original.tokenizer()

    model = original.model()
    lowbit.quantize_(model, rules_for(model, "nvfp4wo"))
    export(Packed("x", tmp_path / "x.gguf", "gguf"), model, tmp_path / "out")
    again = find_source(str(tmp_path / "out"))
    ids = torch.arange(9).view(1, -1)
    assert again.kind == "checkpoint"
    assert torch.equal(again.model()(ids), model(ids))
    assert again.tokenizer().encode("sky") == original.tokenizer().encode("sky")
    assert again.tokenizer().eos_ids == original.tokenizer().eos_ids
    assert again.tokenizer().chat_template == original.tokenizer().chat_template
