"""The shape of a Llama-family model, as a Hugging Face `config.json` gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import see

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Sizes far beyond any model: what a damaged file says must not keep a machine busy for hours.
_LARGEST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_layers": 1024,
    "num_heads": 1 << 12, "num_kv_heads": 1 << 12, "head_dim": 1 << 12, "max_positions": 1 << 28,
}  # fmt: skip


def checked_size(name: str, value: Any, most: int) -> int:
    """A size of a model.

    Raises:
        ValueError: it is no number from 1 to `most`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, found {value!r}")
    return value


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. `rope_divisors` (one per rotary pair) stretch the rotary periods for long contexts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_divisors: tuple[float, ...] | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            checked_size(name, getattr(self, name), most)
        if not (self.rope_theta > 0 and math.isfinite(self.rope_theta) and 0 <= self.norm_eps < 1):
            raise ValueError(f"a model cannot have rope_theta {self.rope_theta} and norm_eps {self.norm_eps}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"rotary embeddings pair numbers up: head_dim must be even, got {self.head_dim}")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """The configuration that a Hugging Face `config.json` describes.

        Raises:
            ValueError: another architecture, activation or kind of rotary embedding than this model implements.
        """
        names = config.get("architectures") or ["none"]
        if names[0] not in ARCHITECTURES:
            raise ValueError(
                f"config.json: architecture {names[0]!r} is not one of {', '.join(ARCHITECTURES)}"
                + see("model-not-readable")
            )
        if config.get("quantization_config"):
            raise ValueError(
                "config.json: these weights are quantized already; give the directory of the original"
                + see("already-quantized")
            )
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"config.json: hidden_act must be 'silu', got {config['hidden_act']!r}" + see("model-not-readable")
            )
        rope = config.get("rope_parameters") or {}  # newer files hold rope_theta here too
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        checked_size("head_dim", head_dim, _LARGEST["head_dim"])
        qwen2, qwen3 = names[0].startswith("Qwen2"), names[0].startswith("Qwen3")
        positions = config.get("max_position_embeddings", 2048)
        # Up to the size of its window, windowed attention is plain attention; longer inputs are refused.
        if config.get("sliding_window") and config.get("use_sliding_window", True):
            positions = min(positions, config["sliding_window"])
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_positions=positions,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
            rope_divisors=_rope_divisors(rope or config.get("rope_scaling") or {}, head_dim, config),
            tie_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=qwen2 or config.get("attention_bias", False),
            o_bias=not qwen2 and config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            qk_norm=qwen3,
        )


def _rope_divisors(scaling: Mapping[str, Any], head_dim: int, config: Mapping[str, Any]) -> tuple[float, ...] | None:
    """How much each rotary frequency is lowered: not at all, by one factor, or Llama 3.1's way.

    Llama 3.1 ("The Llama 3 Herd of Models", 2024, and Meta's reference code) keeps wavelengths below
    `context / high_freq_factor`, divides the frequency of those above `context / low_freq_factor` by `factor`, and
    interpolates in between.
    """
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor must be 1, got {config['partial_rotary_factor']}"
            + see("model-not-readable")
        )
    if kind == "default":
        return None
    if kind == "linear":
        return (float(scaling["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise ValueError(
            f"config.json: rotary scaling {kind!r} is not one of 'default', 'linear', 'llama3'"
            + see("model-not-readable")
        )
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    theta = float(scaling.get("rope_theta") or config.get("rope_theta", 10000.0))
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        share = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return tuple(divisors)
