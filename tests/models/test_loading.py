"""Hugging Face directories and GGUF files, written here and read back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import CONFIG, tiny_ids, tiny_llama

from lowbit.models import load_model

gguf = pytest.importorskip("gguf", reason="GGUF files are written with the package gguf: pip install gguf")

CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"],
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


def write_directory(path, model, shards=1, **changes):
    (path / "config.json").write_text(json.dumps(CONFIG_JSON | changes))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        save_file({name: t for name, t in state.items() if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_gives_the_same_model_back(tmp_path, shards, tied):
    model = tiny_llama(replace(CONFIG, tie_embeddings=tied))
    loaded = load_model(write_directory(tmp_path, model, shards, tie_word_embeddings=tied), torch.float32)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    assert torch.equal(loaded(tiny_ids()), model(tiny_ids()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_once(tmp_path, dtype):
    model = tiny_llama()
    loaded = load_model(str(write_directory(tmp_path, model)), dtype)
    assert all(torch.equal(t.to(dtype), loaded.state_dict()[name]) for name, t in model.state_dict().items())
    assert loaded(tiny_ids()).dtype == dtype


def test_what_a_directory_may_hold_besides(tmp_path):
    """Old files store rotary frequencies, and some store a tied head twice."""
    model = tiny_llama(replace(CONFIG, tie_embeddings=True))
    write_directory(tmp_path, model, tie_word_embeddings=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path, torch.float32)(tiny_ids()), model(tiny_ids()))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model = tiny_llama()
    write_directory(tmp_path, model)
    state = dict(model.state_dict())
    norm = state.pop("model.norm.weight")
    save_file(state | {"model.extra": norm}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight; unknown model\.extra"):
        load_model(tmp_path)
    save_file(state | {"model.norm.weight": norm[:7].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(7,\), its config asks for \(48,\)"):
        load_model(tmp_path)
    write_directory(tmp_path, model, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"missing model\.layers\.2\..* and 6 more; unknown none"):
        load_model(tmp_path)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a Hugging Face model directory nor a \.gguf file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, are not read"):
        load_model(tmp_path)
    write_directory(tmp_path, tiny_llama(), shards=3)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors does not exist"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no GGUF file at"):
        load_model(tmp_path / "nothing.gguf")


# GGUF files

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    layer = ""
    if stem.startswith("model.layers."):
        _, _, number, stem = stem.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{PARTS[stem]}.{kind}"


def interleaved(w, heads):
    """What llama.cpp's converter does to q and k: rows 0, half, 1, half + 1, ... of every head."""
    half = w.shape[0] // heads // 2
    order = [h * 2 * half + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)]
    return w[order]


def write_gguf(path, model, arch="llama", quantize=(), extra=None, **tensors):
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    for key, value in (extra or {}).items():
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    for name, t in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_embeddings:
            continue
        heads = c.num_heads if "q_proj" in name else c.num_kv_heads if "k_proj" in name else None
        w = interleaved(t, heads) if heads and arch == "llama" else t
        if name in quantize:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(w.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), w.numpy())
    for name, t in tensors.items():
        writer.add_tensor(name.replace("__", "."), t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", CONFIG),
        ("llama", replace(CONFIG, tie_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True)),
        ("qwen2", replace(CONFIG, qkv_bias=True)),
        ("qwen3", replace(CONFIG, qk_norm=True, head_dim=16)),
    ],
)
def test_a_gguf_file_gives_the_same_model_back(tmp_path, arch, config):
    model = tiny_llama(config)
    loaded = load_model(write_gguf(tmp_path / "m.gguf", model, arch), torch.float32)
    assert replace(loaded.config, norm_eps=config.norm_eps) == config  # the file keeps the epsilon in fp32
    assert loaded.config.norm_eps == np.float32(config.norm_eps)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(loaded(tiny_ids()), model(tiny_ids()))


def test_a_quantized_gguf_tensor_is_dequantized(tmp_path):
    model = tiny_llama(replace(CONFIG, hidden_size=64))
    name = "model.layers.1.self_attn.q_proj.weight"
    loaded = load_model(write_gguf(tmp_path / "m.gguf", model, quantize=(name,)), torch.float32)
    w = model.state_dict()[name]
    blocks = w.view(w.shape[0], -1, 32)
    # Q8_0: blocks of 32 with an fp16 scale of amax / 127; half a step, and the scale's own rounding, at most.
    bound = blocks.abs().amax(-1, keepdim=True) / 127 * 0.5 * 1.2
    error = (loaded.state_dict()[name].view_as(blocks) - blocks).abs()
    assert bool((error <= bound).all())
    assert bool((error > 0).any())


def test_gguf_rotary_scaling(tmp_path):
    model = tiny_llama(replace(CONFIG, rope_divisors=(1.0, 1.5, 4.0, 8.0)))
    stored = write_gguf(tmp_path / "a.gguf", model, rope_freqs__weight=np.array([1, 1.5, 4, 8], dtype=np.float32))
    assert load_model(stored).config.rope_divisors == (1.0, 1.5, 4.0, 8.0)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    assert load_model(write_gguf(tmp_path / "b.gguf", model, extra=linear)).config.rope_divisors == (2.0,) * 4
    with pytest.raises(ValueError, match="rotary scaling 'yarn' is not one of"):
        load_model(write_gguf(tmp_path / "c.gguf", model, extra={"rope.scaling.type": "yarn"}))


def test_gguf_files_that_this_model_cannot_be(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="architecture 'gpt2' is not one of llama, qwen2, qwen3"):
        load_model(write_gguf(tmp_path / "a.gguf", model, "gpt2"))
    with pytest.raises(ValueError, match="8 experts; only dense"):
        load_model(write_gguf(tmp_path / "b.gguf", model, extra={"expert_count": 8}))
    with pytest.raises(ValueError, match="only 4 of the 8 numbers of a head are rotary"):
        load_model(write_gguf(tmp_path / "c.gguf", model, extra={"rope.dimension_count": 4}))
    with pytest.raises(ValueError, match=r"unknown blk\.0\.strange|unknown model\.layers\.0\.strange"):
        load_model(write_gguf(tmp_path / "d.gguf", model, blk__0__strange__weight=np.ones(3, dtype=np.float32)))


def test_a_gguf_file_that_promises_too_much(tmp_path):
    """The package gguf would read an array of 2**40 numbers for weeks: past the end of the file it goes on with empty
    ones, if what is left is a multiple of their size."""
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), extra={"numbers": [1, 2, 3]})
    content = path.read_bytes()
    at = content.index(b"llama.numbers") + len("llama.numbers") + 8  # behind the types of array and element
    assert content[at : at + 8] == (3).to_bytes(8, "little")
    whole = len(content) - (len(content) - at) % 4
    path.write_bytes(content[:at] + (1 << 40).to_bytes(8, "little") + content[at + 8 : whole])
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read: its metadata has 1099511627776 values of 4 bytes"):
        load_model(path)
    for end in (3, 20, 30, at):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"m\.gguf cannot be read"):
            load_model(path)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"head_dim": 2**40}, {"hidden_size": "48"}, {"num_attention_heads": 0}]
)
def test_configs_that_no_model_has(tmp_path, changes):
    path = write_directory(tmp_path, tiny_llama(), **changes)
    with pytest.raises(ValueError, match=r"config\.json.*\[lowbit: model-not-readable\]"):
        load_model(path)
