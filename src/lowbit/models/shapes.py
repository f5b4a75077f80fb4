"""Shapes of known models by name, from the `config.json` files that their makers published."""

from __future__ import annotations

from typing import Any

from lowbit.errors import see
from lowbit.models.config import LlamaConfig


def _llama3(hidden: int, inner: int, layers: int, heads: int, head_dim: int, stretch: float, tied: bool) -> LlamaConfig:
    """Llama 3.1 and 3.2."""
    scaling = {
        "rope_type": "llama3", "factor": stretch, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaConfig.from_huggingface({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": scaling,
        "tie_word_embeddings": tied,
    })  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> LlamaConfig:
    return LlamaConfig.from_huggingface({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": tied,
    })  # fmt: skip


def _plain(**sizes: Any) -> LlamaConfig:
    return LlamaConfig.from_huggingface({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **sizes})


SHAPES: dict[str, LlamaConfig] = {
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, 8.0, tied=False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, 32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, 32.0, tied=True),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "mistral-7b-v0.3": _plain(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, rope_theta=1000000.0,
    ),
    "smollm2-135m": _plain(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    ),
    # Nobody's model: small enough to try everything on a CPU.
    "tiny": _plain(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, rope_theta=10000.0,
    ),
}  # fmt: skip


def shape_of(name: str) -> LlamaConfig:
    """The shape called `name`.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}" + see("bad-option"))
    return SHAPES[name]
