"""The decoder against a plain, loop-by-loop implementation in fp64, and its cache against itself."""

import cmath
import math
from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

from lowbit.models import KVCache, Llama, LlamaConfig
from lowbit.models.config import ARCHITECTURES

VARIANTS = {
    "plain": CONFIG,
    "all heads own keys": replace(CONFIG, num_kv_heads=6),
    "one key head": replace(CONFIG, num_kv_heads=1),
    "tied": replace(CONFIG, tie_embeddings=True),
    "qwen2": replace(CONFIG, qkv_bias=True),
    "qwen3": replace(CONFIG, qk_norm=True, head_dim=16),
    "every bias": replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True),
    "stretched": replace(CONFIG, rope_divisors=(1.0, 1.5, 4.0, 8.0), rope_theta=500.0),
}


def plain_logits(model: Llama, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) in fp64: one token, one head and one pair of numbers at a time."""
    c, state = model.config, {k: v.double() for k, v in model.state_dict().items()}

    def linear(name, x):
        y = state[f"{name}.weight"] @ x
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    def norm(name, x):
        return x / math.sqrt(float((x * x).mean()) + c.norm_eps) * state[f"{name}.weight"]

    def rotated(x, position):
        out, half = x.clone(), c.head_dim // 2
        for i in range(half):
            divisor = c.rope_divisors[i] if c.rope_divisors else 1.0
            z = complex(x[i], x[half + i]) * cmath.exp(1j * position * c.rope_theta ** (-2 * i / c.head_dim) / divisor)
            out[i], out[half + i] = z.real, z.imag
        return out

    hidden = [state["model.embed_tokens.weight"][i] for i in ids]
    for n in range(c.num_layers):
        layer = f"model.layers.{n}"
        attention, keys, values = f"{layer}.self_attn", [], []
        for t, x in enumerate(hidden):
            x = norm(f"{layer}.input_layernorm", x)
            q, k, v = (linear(f"{attention}.{p}_proj", x).view(-1, c.head_dim) for p in "qkv")
            if c.qk_norm:
                q = torch.stack([norm(f"{attention}.q_norm", h) for h in q])
                k = torch.stack([norm(f"{attention}.k_norm", h) for h in k])
            keys.append([rotated(h, t) for h in k])
            values.append(v)
            heads = []
            for h in range(c.num_heads):
                g = h * c.num_kv_heads // c.num_heads
                turned = rotated(q[h], t)
                scores = torch.stack([turned @ keys[s][g] for s in range(t + 1)]) / math.sqrt(c.head_dim)
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * values[s][g] for s, w in enumerate(weights)))
            hidden[t] = hidden[t] + linear(f"{attention}.o_proj", torch.cat(heads))
        for t, x in enumerate(hidden):
            x = norm(f"{layer}.post_attention_layernorm", x)
            gate = linear(f"{layer}.mlp.gate_proj", x)
            gated = gate / (1 + (-gate).exp()) * linear(f"{layer}.mlp.up_proj", x)
            hidden[t] = hidden[t] + linear(f"{layer}.mlp.down_proj", gated)
    return torch.stack([linear("lm_head", norm("model.norm", x)) for x in hidden])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_plain_implementation(variant):
    model, ids = tiny_llama(VARIANTS[variant], torch.float64), tiny_ids(1, 9)
    expected = plain_logits(model, ids[0].tolist())
    # The angles are fp32 by design; everything else is fp64.
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1,) * 21, (20, 1), (1, 20), (7, 7, 7), (5, 1, 1, 14)])
@pytest.mark.parametrize("variant", ["plain", "qwen3"])
def test_a_cached_run_in_pieces_is_the_whole_run(variant, cuts):
    model, ids = tiny_llama(VARIANTS[variant], torch.float64), tiny_ids(2, 21)
    cache, position, pieces = model.new_cache(2, 30), 0, []
    for part in ids.split(cuts, dim=1):
        pieces.append(model(part, cache, position))
        position += part.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-9, atol=1e-9)


def test_a_token_never_depends_on_later_ones():
    model, ids = tiny_llama(), tiny_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % CONFIG.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_last_only_gives_the_last_row():
    model, ids = tiny_llama(), tiny_ids()
    assert model(ids, last_only=True).shape == (2, 1, CONFIG.vocab_size)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_names_are_those_of_hugging_face():
    names = {
        n.removeprefix("model.layers.0.") for n in tiny_llama(VARIANTS["qwen3"]).state_dict() if "layers.1" not in n
    }
    projections = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {
        f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight", "input_layernorm.weight"}
    norms |= {"post_attention_layernorm.weight", "model.norm.weight"}
    assert names == projections | norms | {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_tied_head_is_one_parameter():
    model = tiny_llama(VARIANTS["tied"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_llama().lm_head.weight is not tiny_llama().model.embed_tokens.weight


def test_rotary_frequencies_stay_fp32_and_survive_the_meta_device():
    exact = tiny_llama().model.rotary_emb.inv_freq.clone()
    assert exact.dtype == torch.float32
    assert torch.equal(tiny_llama().bfloat16().model.rotary_emb.inv_freq, exact)
    with torch.device("meta"):
        model = Llama(CONFIG)
    assert torch.equal(model.to_empty(device="cpu").model.rotary_emb.inv_freq, exact)


def test_compiles_into_one_graph():
    model, ids = tiny_llama(), tiny_ids()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_errors_name_the_limit():
    model, ids = tiny_llama(), tiny_ids()
    with pytest.raises(ValueError, match=r"\(batch, tokens\), got shape \(21,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="64 positions"):
        model(tiny_ids(1, 65))
    with pytest.raises(ValueError, match="10 positions"):
        model(ids, model.new_cache(2, 10))
    with pytest.raises(ValueError, match="position 3 needs the cache"):
        model(ids, position=3)
    with pytest.raises(ValueError, match="1 to 64 positions"):
        KVCache(CONFIG, 1, 65, torch.float32)
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        replace(CONFIG, num_kv_heads=4)
    with pytest.raises(ValueError, match="must be even, got 7"):
        replace(CONFIG, head_dim=7)


HUGGINGFACE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 97,
}


def parsed(**changes) -> LlamaConfig:
    return LlamaConfig.from_huggingface(HUGGINGFACE | changes)


def test_config_json():
    assert parsed() == CONFIG
    assert parsed(num_key_value_heads=None).num_kv_heads == 6
    assert parsed(head_dim=16).head_dim == 16
    assert parsed(attention_bias=True, mlp_bias=True) == replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True)
    assert parsed(architectures=["Qwen2ForCausalLM"]) == replace(CONFIG, qkv_bias=True)
    assert parsed(architectures=["Qwen3ForCausalLM"]) == replace(CONFIG, qk_norm=True)
    assert parsed(architectures=["MistralForCausalLM"], sliding_window=32).max_positions == 32
    assert parsed(sliding_window=32, use_sliding_window=False).max_positions == 64
    assert parsed(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope_theta == 5e5
    assert parsed(rope_scaling={"type": "linear", "factor": 4}).rope_divisors == (4.0,) * 4


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    divisors = parsed(rope_scaling=scaling, rope_theta=500000.0, head_dim=128).rope_divisors
    waves = [2 * math.pi * 500000 ** (i / 64) for i in range(64)]
    assert divisors is not None
    assert all(d == 1 for d, w in zip(divisors, waves, strict=True) if w < 8192 / 4)
    assert all(d == 8 for d, w in zip(divisors, waves, strict=True) if w > 8192)
    between = [(d, w) for d, w in zip(divisors, waves, strict=True) if 8192 / 4 < w < 8192]
    assert len(between) > 2
    for d, w in between:
        share = (8192 / w - 1) / 3
        assert 1 / d == pytest.approx((1 - share) / 8 + share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not one of " + ", ".join(ARCHITECTURES)),
        ({"architectures": None}, "architecture 'none'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not one of 'default', 'linear', 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ],
)
def test_config_json_that_this_model_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        parsed(**changes)
