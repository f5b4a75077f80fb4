"""Reads a GGUF file, the format of llama.cpp: metadata, weights (dequantized) and their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.models.config import LlamaConfig, checked_size
from lowbit.models.gguf_header import check_header
from lowbit.models.llama import Llama
from lowbit.models.loading import assign_weights, reading

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # llama.cpp files Mistral and SmolLM under "llama" too

_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_gguf(path: Path, dtype: torch.dtype) -> Llama:
    """The model of a GGUF file with its weights dequantized to `dtype`, one tensor at a time.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the file is damaged, or holds an architecture or a kind of rotary scaling that is not supported.
    """
    with reading(path):
        reader = open_gguf(path)
        config = config_of(reader)
        return assign_weights(config, _tensors(reader, config), dtype, source=str(path))


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader`, which maps the file into memory."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "reading a GGUF file needs the package gguf; pip install 'lowbit[cli]'" + see("missing-package")
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file at {path}" + see("model-not-readable"))
    check_header(path)
    return gguf.GGUFReader(path)


def metadata(reader: Any, key: str, default: Any = None) -> Any:
    """The value of one metadata field, or `default` where the file lacks it."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def config_of(reader: Any) -> LlamaConfig:
    """The configuration that the file's metadata and its list of tensors describe."""
    arch = metadata(reader, "general.architecture", "none")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"GGUF: architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}" + see("model-not-readable")
        )
    get = partial(_field, reader, arch)
    if get("expert_count", 0):
        raise ValueError(
            f"GGUF: {arch} with {get('expert_count')} experts; only dense models are supported"
            + see("model-not-readable")
        )
    tensors = {t.name: t for t in reader.tensors}
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = checked_size("head_dim", get("attention.key_length", hidden // heads), 1 << 12)
    if (rotary := get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(
            f"GGUF: only {rotary} of the {head_dim} numbers of a head are rotary; all must be"
            + see("model-not-readable")
        )
    context = get("context_length")
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),  # GGUF lists the fastest dimension first
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        # As for Hugging Face files: up to its window, windowed attention is plain attention.
        max_positions=min(context, get("attention.sliding_window", 0) or context),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_divisors=_rope_divisors(reader, tensors, arch, head_dim),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )


def _field(reader: Any, arch: str, key: str, default: Any = None) -> Any:
    value = metadata(reader, f"{arch}.{key}", default)
    if value is None:
        raise ValueError(f"GGUF: the file has no field {arch}.{key}" + see("model-not-readable"))
    return value


def _rope_divisors(reader: Any, tensors: dict[str, Any], arch: str, head_dim: int) -> tuple[float, ...] | None:
    if "rope_freqs.weight" in tensors:  # Llama 3.1 and later
        return tuple(float(f) for f in tensors["rope_freqs.weight"].data)
    kind = metadata(reader, f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(
            f"GGUF: rotary scaling {kind!r} is not one of 'none', 'linear' and stored factors"
            + see("model-not-readable")
        )
    return (float(_field(reader, arch, "rope.scaling.factor")),) * (head_dim // 2)


def _tensors(reader: Any, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    interleaved = metadata(reader, "general.architecture") == "llama"
    for t in reader.tensors:
        if t.name == "rope_freqs.weight":
            continue
        # The package works on memory of the mapped file, which is read-only: torch wants a copy of unquantized data.
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).view(*(int(n) for n in reversed(t.shape)))
        if interleaved and ".attn_q." in t.name:
            w = split_halves(w, config.num_heads)
        elif interleaved and ".attn_k." in t.name:
            w = split_halves(w, config.num_kv_heads)
        yield huggingface_name(t.name), w


def huggingface_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{kind}"
    return f"{_GLOBAL_NAMES.get(stem, stem)}.{kind}"


def split_halves(w: Tensor, heads: int) -> Tensor:
    """Rows of `w (heads * head_dim, ...)` from llama.cpp's rotary order to Hugging Face's.

    llama.cpp rotates neighbours `(2 i, 2 i + 1)`, Hugging Face `(i, i + head_dim / 2)`; converting to GGUF
    interleaves the two halves of every head of q and k, and this undoes it.
    """
    half = w.shape[0] // heads // 2
    return w.view(heads, half, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
