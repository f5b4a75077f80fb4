"""The ops between linear layers: their definitions against the model's plain code, their schemas, their errors."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

import lowbit
from lowbit import decoder_ops as ops
from lowbit.models import fuse_projections_, inference
from lowbit.models.inference import State, forward

B, G, S, D, H = 2, 2, 12, 8, 6


def given(dtype=torch.float32, tokens=5, positions=(0, 3), normed=False):
    """Arguments of `rope_write`; the cache is full of numbers already."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    angles = torch.rand(S, D // 2, generator=g) * 6
    return (
        normal(B, tokens, (H + 2 * G) * D), normal(B, G, S, D), normal(B, G, S, D),
        torch.tensor(positions, dtype=torch.int32), angles.cos(), angles.sin(),
        normal(D) if normed else None, normal(D) if normed else None, 1e-5, H,
    )  # fmt: skip


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("normed", [False, True])
def test_rope_write_turns_and_stores(normed):
    """Pairs are complex numbers turned by an angle; everything else in the cache stays."""
    qkv, keys, values, positions, cos, sin, qw, kw, *rest = given(torch.float64, normed=normed)
    before = keys.clone(), values.clone()
    q = ops.rope_write(qkv, keys, values, positions, cos, sin, qw, kw, *rest)
    turn = torch.complex(cos.double(), sin.double())
    heads = qkv.view(B, 5, -1, D)
    for b in range(B):
        for t in range(5):
            at = int(positions[b]) + t
            for h in range(H + 2 * G):
                x = heads[b, t, h]
                if h < H + G:
                    x = x if not normed else norm(x, qw if h < H else kw)
                    z = torch.complex(x[: D // 2], x[D // 2 :]) * turn[at]
                    x = torch.cat((z.real, z.imag))
                place = q[b, t, h] if h < H else keys[b, h - H, at] if h < H + G else values[b, h - H - G, at]
                torch.testing.assert_close(place, x, rtol=1e-12, atol=1e-12)
        old = [s for s in range(S) if not 0 <= s - int(positions[b]) < 5]
        assert torch.equal(keys[b, :, old], before[0][b, :, old])
        assert torch.equal(values[b, :, old], before[1][b, :, old])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("positions", "tokens"), [((4, 4), 1), ((0, 0), 1), ((11, 2), 1), ((4, 4), 5), ((0, 0), 3), ((7, 2), 5)]
)
def test_decode_attention_looks_at_its_own_sequence_alone(positions, tokens, normed):
    """And at no token behind its own."""
    qkv, keys, values, at, *rest = given(torch.float64, tokens=tokens, positions=positions, normed=normed)
    ours = [keys.clone(), values.clone()]
    arrived = torch.zeros(B * G, dtype=torch.int32)
    y = ops.decode_attention(qkv, *ours, at, *rest, arrived)
    q = ops.rope_write(qkv, keys, values, at, *rest)
    assert torch.equal(ours[0], keys)
    assert torch.equal(ours[1], values)
    for b in range(B):
        for t, h in product(range(tokens), range(H)):
            n, g = positions[b] + t + 1, h // (H // G)
            weights = (keys[b, g, :n] @ q[b, t, h] / D**0.5).softmax(0)
            got = y[b, t, h * D : (h + 1) * D]
            torch.testing.assert_close(got, weights @ values[b, g, :n], rtol=1e-12, atol=1e-12)


def test_norms_and_products():
    g = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(3, 16, generator=g, dtype=torch.float64) for _ in range(3))
    total, normed = ops.add_rms_norm(x, y, w[0], 1e-5)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, norm(x + y, w[0]))
    torch.testing.assert_close(ops.rms_norm(x, w[0], 1e-5), norm(x, w[0]))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(ops.silu_mul(x), gate / (1 + (-gate).exp()) * up)
    assert torch.equal(ops.gemv(x[:1], w, y[0, :3]), torch.nn.functional.linear(x[:1], w, y[0, :3]))


def test_bf16_is_rounded_once():
    """Equal to the fp32 result rounded: nothing in between is."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, generator=g).bfloat16()
    assert torch.equal(ops.silu_mul(x), ops.silu_mul(x.float()).bfloat16())
    wide = given(torch.bfloat16, normed=True)
    q = ops.rope_write(*wide)
    qkv, keys, values, positions, cos, sin, qw, kw, *rest = given(torch.bfloat16, normed=True)
    again = (t.float() for t in (qkv, keys, values))
    exact = ops.rope_write(*again, positions, cos, sin, qw.float(), kw.float(), *rest)
    assert torch.equal(q, exact.bfloat16())


def test_schemas_say_what_is_written():
    arrived = torch.zeros(B * G, dtype=torch.int32)
    for op, args in (
        (ops.rms_norm, (torch.randn(3, 8), torch.ones(8), 1e-5)),
        (ops.add_rms_norm, (torch.randn(3, 8), torch.randn(3, 8), torch.ones(8), 1e-5)),
        (ops.silu_mul, (torch.randn(3, 8),)),
        (ops.gemv, (torch.randn(1, 8), torch.randn(5, 8), None)),
        (ops.rope_write, given()),
        (ops.decode_attention, (*given(), arrived)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_errors_name_the_sizes():
    qkv, *rest = given()
    with pytest.raises(ValueError, match="6 query and 2 key heads of 8 make 80 numbers per token, got 79"):
        ops.rope_write(qkv[..., :-1], *rest)
    with pytest.raises(ValueError, match=r"2 sequences in torch.float64 .* a cache of 2 in torch.float32"):
        ops.rope_write(qkv.double(), *rest)
    with pytest.raises(ValueError, match="1 sequences"):
        ops.rope_write(qkv[:1], *rest)


VARIANTS = {
    "plain": CONFIG, "one key head": replace(CONFIG, num_kv_heads=1), "tied": replace(CONFIG, tie_embeddings=True),
    "every bias": replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qwen3": replace(CONFIG, qk_norm=True, head_dim=16),
}  # fmt: skip


def test_long_prompts_pass_the_mlp_in_parts(monkeypatch):
    model, ids = tiny_llama(), tiny_ids(3, 11)
    whole = forward(model, ids, State(model, 3, 20))
    monkeypatch.setattr(inference, "TOKENS", 7)
    torch.testing.assert_close(forward(model, ids, State(model, 3, 20)), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_in_ops_is_the_model(variant, dtype):
    """A prompt and the tokens behind it give the logits of the plain code, up to rounding."""
    model, ids = tiny_llama(VARIANTS[variant], dtype), tiny_ids(2, 14)
    state, cache = State(model, 2, 20), model.new_cache(2, 20)
    limit = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    at = 0
    with torch.inference_mode():
        for part in ids.split([9, 1, 1, 1, 1, 1], dim=1):
            got = forward(model, part, state)
            expected = model(part, cache, at, last_only=True)[:, -1]
            torch.testing.assert_close(got, expected, rtol=limit, atol=limit)
            at += part.shape[1]
            state.positions.fill_(at)
    torch.testing.assert_close(state.cache.keys, cache.keys, rtol=limit, atol=limit)


QUANTIZED = (
    "float8dq-row",
    "int8dq",
    "int8dq-asym",
    "int8dq-int4-32",
    "mxfp8dq",
    "float8dq",
    "float8dq-block",
    "nvfp4dq",
)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("spec", QUANTIZED)
def test_codes_go_straight_to_the_layers(spec, joint, monkeypatch):
    """With quantized activations the logits keep every bit, and layers that can take codes are given codes."""
    model, ids = tiny_llama(CONFIG, torch.bfloat16), tiny_ids(2, 9)
    if joint:
        fuse_projections_(model)
    lowbit.quantize_(model, spec)
    given, plain = [], inference._wanted

    def wanted(readers, x):
        given.append(plain(readers, x))
        return given[-1]

    def logits():
        state = State(model, 2, 20)
        with torch.inference_mode():
            first = forward(model, ids, state)
            state.positions.fill_(9)
            return torch.stack((first, forward(model, ids[:, :1], state)))

    monkeypatch.setattr(inference, "_wanted", wanted)
    got = logits()
    monkeypatch.setattr(inference, "_wanted", lambda readers, x: None)
    assert torch.equal(got, logits())
    takes = spec not in ("float8dq", "float8dq-block", "nvfp4dq")  # scales of the whole input, or along K
    assert len(given) == 2 * (3 * CONFIG.num_layers + 1)
    assert all((how is not None) == takes for how in given)


def test_watched_layers_see_what_they_are_given(monkeypatch):
    """A hook must meet the layer's input, not codes of it."""
    model, ids, seen = tiny_llama(CONFIG, torch.bfloat16), tiny_ids(1, 4), []
    lowbit.quantize_(model, "int8dq")
    first = model.model.layers[0]
    first.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    first.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        forward(model, ids, State(model, 1, 8))
    assert [(x.dtype, x.shape[-1]) for x in seen] == [
        (torch.bfloat16, CONFIG.hidden_size), (torch.bfloat16, CONFIG.intermediate_size)
    ]  # fmt: skip
