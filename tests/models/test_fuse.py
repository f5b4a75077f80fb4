"""Joined projections: every bit of every plane, the same text, and a reason wherever they stay apart."""

from dataclasses import replace

import pytest
import torch
from cases import each_format, weights
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from torch import nn

import lowbit
from lowbit.formats import parse_format
from lowbit.models import Llama
from lowbit.models.fuse import fuse_projections_, join_weights, unfuse_projections_
from lowbit.models.random import joins
from lowbit.tensor import QuantizedTensor
from lowbit.tools.generate import generate

#: K of every projection is a multiple of 32.
WIDE = replace(CONFIG, hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16)


def differ_as_a_whole(fmt, parts):
    """Whether parts have different scales or tables where the format has one for a tensor."""
    once = [p.name for p in fmt.planes if p.shape is not None or p.n is None]
    return any(not torch.equal(parts[0].planes[name], part.planes[name]) for name in once for part in parts[1:])


def bits(planes):
    return {name: t.contiguous().view(torch.uint8).tolist() for name, t in planes.items()}


@each_format
def test_joining_keeps_every_bit(fmt):
    """A weight taken apart by rows and joined again has the planes it had; rows of each part have their own."""
    tile = fmt.tile[0]
    rows = [2 * tile, tile, 3 * tile]
    whole = QuantizedTensor.from_float(weights("normal", sum(rows), 96), fmt)
    assert bits(join_weights(list(whole.split(rows))).planes) == bits(whole.planes)
    parts = [QuantizedTensor.from_float(weights("normal", n, 96, seed=n) * n, fmt) for n in rows]
    assert differ_as_a_whole(fmt, parts) != joins(fmt)
    if not joins(fmt):
        with pytest.raises(ValueError, match="for a whole tensor, and the parts have different ones"):
            join_weights(parts)
        return
    joint = join_weights(parts)
    for part, taken in zip(parts, joint.split(rows), strict=True):
        assert bits(taken.planes) == bits(part.planes)


def test_parts_that_end_inside_a_tile_stay_apart():
    fmt = parse_format("int8:b128x128")
    parts = [QuantizedTensor.from_float(weights("normal", n, 128, seed=n), fmt) for n in (128, 64, 128)]
    with pytest.raises(ValueError, match="tiles of 128 rows, and parts of 128, 64, 128 rows do not end with one"):
        join_weights(parts)
    assert join_weights([parts[0], parts[2], parts[1]]).shape == (320, 128)


def names(model):
    return {n.removeprefix("model.layers.1.") for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and ".1." in n}  # fmt: skip


@pytest.mark.parametrize("config", [None, "int8wo", "int4wo-32", "float8wo", "nf4wo-64", "mxfp4wo", "int8dq"])
def test_the_text_is_the_same(config):
    model = tiny_llama(replace(WIDE, qkv_bias=True))
    if config is not None:
        lowbit.quantize_(model, config)
    ids = tiny_ids(2, 9)
    before, said = model(ids), generate(model, ids, 16).ids
    done = fuse_projections_(model)
    assert [f.reason for f in done] == [""] * 4
    assert names(model) == {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    assert torch.equal(generate(model, ids, 16).ids, said)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
    assert fuse_projections_(model) == []


@pytest.mark.parametrize("config", [None, "int4wo-32", "float8wo"])
def test_taking_apart_gives_the_model_back(config):
    model = tiny_llama(replace(WIDE, qkv_bias=True, mlp_bias=True))
    if config is not None:
        lowbit.quantize_(model, config)
    before, logits = dict(model.named_parameters()), model(tiny_ids())
    fuse_projections_(model)
    unfuse_projections_(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(tiny_ids()), logits)
    unfuse_projections_(model)
    assert dict(model.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("float8wo-tensor", "float8_e4m3:tensor holds one scale for a whole tensor"),
        ("nvfp4wo", "nvfp4 holds one outer_scale for a whole tensor"),
        ("codebook4wo-64", "codebook4:g64 holds one codebook for a whole tensor"),
        ({"re:.*q_proj": "int8wo", "re:.*gate_proj": None, "_default": "int4wo-32"}, "they have different formats"),
    ],
)
def test_what_cannot_be_joined_says_why_and_runs(config, reason):
    model, ids = tiny_llama(WIDE), tiny_ids(2, 9)
    lowbit.quantize_(model, config)
    before, said = model(ids), generate(model, ids, 12).ids
    done = fuse_projections_(model)
    assert all(reason in f.reason for f in done), done
    assert done[0].name == "model.layers.0.self_attn.qkv_proj"
    assert done[0].parts == ("q_proj", "k_proj", "v_proj")
    assert torch.equal(model(ids), before)
    assert torch.equal(generate(model, ids, 12).ids, said)
    assert "self_attn.q_proj" in names(model)


def test_a_model_fused_first_takes_every_config():
    """One scale for the joint weight is the format's own choice then."""
    model = tiny_llama(WIDE)
    fuse_projections_(model)
    lowbit.quantize_(model, "float8wo-tensor")
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    assert weight.format.spec == "float8_e4m3:tensor"
    assert weight.shape == (64 + 2 * 2 * 16, 64)


def test_a_layer_that_is_more_than_a_linear_stays():
    model = tiny_llama(WIDE)
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    done = fuse_projections_(model)
    assert [f.name for f in done if f.reason] == ["model.layers.1.mlp.gate_up_proj"]
    assert "Sequential is more than a Linear" in done[3].reason


def test_names_on_disk_are_the_separate_ones(tmp_path):
    model = tiny_llama(WIDE)
    lowbit.quantize_(model, {"lm_head": None, "_default": "int4wo-32"})
    logits = model(tiny_ids())
    fuse_projections_(model)
    unfuse_projections_(model)
    lowbit.save(model, tmp_path)
    again = lowbit.load(Llama(WIDE), tmp_path)
    assert torch.equal(again(tiny_ids()), logits)
