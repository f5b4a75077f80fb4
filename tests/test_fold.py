"""Folding rotations and scales: what a float model computes stays, whatever becomes of its weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cases import same_bits
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from torch import Tensor, nn

from lowbit import parse_config, quantize_
from lowbit.algorithms.rotation import random_rotation
from lowbit.calibrate import Moments, moments_of, run_blocks
from lowbit.fold import awq_, rotate_, scale_, smooth_
from lowbit.formats import parse_format
from lowbit.graph import decoder_graph
from lowbit.models import LlamaConfig
from lowbit.models.llama import RMSNorm

CONFIGS = {
    "grouped heads": CONFIG,
    "a head each": replace(CONFIG, num_kv_heads=6),
    "biases": replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk norms": replace(CONFIG, qk_norm=True),
    "tied": replace(CONFIG, tie_embeddings=True),
    "odd size": replace(CONFIG, hidden_size=45),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def change(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_powers_of_two_change_no_bit(config: LlamaConfig, dtype: torch.dtype) -> None:
    model = tiny_llama(config, dtype)
    wanted = model(tiny_ids())
    generator = torch.Generator().manual_seed(0)
    for edge in decoder_graph(model).edges():
        channels = model.get_submodule(edge.source).weight.shape[0]
        before = model.get_submodule(edge.readers[0]).weight
        scale_(model, edge, torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).float()))
        assert not torch.equal(model.get_submodule(edge.readers[0]).weight, before)
    assert same_bits(model(tiny_ids()), wanted)


@each_config
def test_any_scale_changes_rounding_alone(config: LlamaConfig) -> None:
    """Smaller than 1e-5 of the largest logit in fp32."""
    model = tiny_llama(config)
    wanted = model(tiny_ids())
    for edge in decoder_graph(model).edges():
        scale_(model, edge, torch.rand(model.get_submodule(edge.source).weight.shape[0]) + 0.5)
    assert 0 < change(model(tiny_ids()), wanted) < 1e-5


@each_config
def test_rotations_change_rounding_alone(config: LlamaConfig) -> None:
    """Smaller than 1e-5 of the largest logit in fp32, though no weight stays what it was."""
    model = tiny_llama(config)
    old, wanted = dict(model.named_parameters(remove_duplicate=False)), model(tiny_ids())
    stream = model.model.embed_tokens(tiny_ids())
    rotate_(model, decoder_graph(model))
    assert change(model(tiny_ids()), wanted) < 1e-5
    q = random_rotation(config.hidden_size).float()
    assert change(model.model.embed_tokens(tiny_ids()), stream @ q) < 1e-6
    for name, p in model.named_parameters():
        if name.endswith("weight") and "q_norm" not in name and "k_norm" not in name:
            assert not torch.equal(p, old[name]), name
    assert all(bool((m.weight == 1).all()) for n, m in model.named_modules() if n.endswith("layernorm"))


def test_a_tied_projection_gets_its_own_table() -> None:
    model = tiny_llama(CONFIGS["tied"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate_(model, decoder_graph(model))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_embeddings


def test_a_copy_that_shares_weights_keeps_them() -> None:
    model = tiny_llama()
    memo = {id(p): p for p in model.parameters()}
    other = copy.deepcopy(model, memo)
    wanted = model(tiny_ids())
    rotate_(other, graph := decoder_graph(other))
    scale_(other, next(iter(graph.edges())), torch.full((CONFIG.hidden_size,), 2.0))
    assert torch.equal(model(tiny_ids()), wanted)


@pytest.mark.parametrize("step", ["awq", "smoothquant"])
def test_moments_follow_the_scales(step: str) -> None:
    """What a step says about the inputs that it scaled is what a run of the scaled layer finds."""
    model, ids = tiny_llama(CONFIGS["biases"]), tiny_ids()
    model.model.layers[0].input_layernorm.weight[3] *= 30
    model.model.layers[0].self_attn.v_proj.weight[5] *= 30
    model.model.layers[0].mlp.up_proj.weight[7] *= 30
    graph, found, calls = decoder_graph(model), list[dict[str, Moments]](), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args))
    run_blocks(model, [ids], found.append)
    layer = graph.layers[0]
    old = {name: model.get_submodule(name).weight for name in found[0]}
    if step == "smoothquant":
        got = smooth_(model, layer, found[0], dict.fromkeys(found[0], parse_config("int8dq").scheme))
    else:
        got = awq_(model, layer, found[0], dict.fromkeys(found[0], parse_format("int3:g16")))
    again = moments_of(layer.name, model.model.layers[0], [(calls[0], {})])
    changed = {n for n in old if not torch.equal(old[n], model.get_submodule(n).weight)}
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert {layer.at(part) for part in parts} <= changed
    # Rows are shortened after they were scaled; here none are long enough for that to matter much.
    for name, moments in again.items():
        torch.testing.assert_close(got[name].amax, moments.amax, rtol=1e-5, atol=1e-6)


def test_heads_that_share_one_of_v_share_its_scales() -> None:
    model = tiny_llama()
    found = list[dict[str, Moments]]()
    run_blocks(model, [tiny_ids()], found.append)
    layer = decoder_graph(model).layers[0]
    o = model.get_submodule(layer.at("self_attn.o_proj"))
    old = o.weight.clone()
    o.weight[:, 2] *= 40
    old[:, 2] *= 40
    found[0][layer.at("self_attn.o_proj")].square[9, 9] *= 1e4
    awq_(model, layer, found[0], {layer.at("self_attn.o_proj"): parse_format("int2:g16")})
    ratio = (o_new := model.get_submodule(layer.at("self_attn.o_proj")).weight) / old
    assert not torch.equal(o_new, old)
    per_head = ratio[0].view(CONFIG.num_kv_heads, -1, CONFIG.head_dim)
    torch.testing.assert_close(per_head, per_head[:, :1].expand_as(per_head))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_models_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="models of transformers are folded where it is installed")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, family + "Config")(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, tie_word_embeddings=True, **heads
    )
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    wanted = model(tiny_ids()).logits
    for edge in (graph := decoder_graph(model)).edges():
        channels = model.get_submodule(edge.source).weight.shape[0]
        scale_(model, edge, torch.exp2(torch.arange(channels) % 4 - 2.0))
    assert torch.equal(model(tiny_ids()).logits, wanted)
    rotate_(model, graph)
    assert change(model(tiny_ids()).logits, wanted) < 1e-5
    assert not model.config.tie_word_embeddings


# Models whose parts are not known -----------------------------------------------------------------


class OneMore(RMSNorm):
    """Gemma's norm: multiplies by 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)


def strange(what: str) -> nn.Module:
    model = tiny_llama()
    layer = model.model.layers[1]
    if what == "LayerNorm":
        layer.input_layernorm = nn.LayerNorm(CONFIG.hidden_size)
    elif what == "OneMore":
        model.model.norm = OneMore(CONFIG.hidden_size, 1e-5)
    elif what == "post_feedforward_layernorm":
        layer.post_feedforward_layernorm = RMSNorm(CONFIG.hidden_size, 1e-5)
    elif what == "lacks self_attn.q_proj":
        layer.self_attn.q_proj = nn.Identity()
    elif what == "shares its weight":
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    elif what == "no Linear named 'lm_head'":
        model.lm_head = nn.Identity()  # type: ignore[assignment]
    elif what == "most of its weights are in 'tower'":
        model.tower = nn.ModuleList([nn.Linear(512, 512)])
    elif what == "0 lists":
        return nn.Sequential(nn.Linear(4, 4))
    return model


@pytest.mark.parametrize(
    "what",
    ["LayerNorm", "OneMore", "post_feedforward_layernorm", "lacks self_attn.q_proj", "shares its weight",
     "no Linear named 'lm_head'", "most of its weights are in 'tower'", "0 lists"],
)  # fmt: skip
def test_unknown_models_are_refused_before_anything_changes(what: str) -> None:
    model = strange(what)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"(?s){what}.*\[lowbit: unknown-architecture\]"):
        quantize_(model, "int4wo-16", algorithm="rotation+mse")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_quantized_models_are_refused() -> None:
    model = tiny_llama()
    quantize_(model, {"model.layers.0.mlp.up_proj": "int8wo"})
    with pytest.raises(ValueError, match=r"\[lowbit: already-quantized\]"):
        decoder_graph(model)
