"""Where models come from and go to: what the command line's MODEL means, and checkpoints that are models again.

MODEL is `demo`, a Hugging Face directory, a GGUF file, or a directory that `lowbit quantize` wrote.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowbit import checkpoint
from lowbit.checkpoints.files import read_json
from lowbit.configs import Config
from lowbit.errors import see
from lowbit.models import Llama, LlamaConfig, load_model
from lowbit.models.hub import demo_model
from lowbit.models.tokenizer import Tokenizer, load_tokenizer
from lowbit.rules import Rule
from lowbit.specs import parse_config

Kind = Literal["huggingface", "gguf", "checkpoint"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPES |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MANIFEST = "lowbit_manifest.json"
#: What a tokenizer consists of in a Hugging Face directory.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A place that holds a language model."""

    name: str
    path: Path
    kind: Kind

    def model(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Llama:
        """The model in eval mode. `dtype` (default bf16) is that of float weights; a checkpoint keeps its own."""
        if self.kind != "checkpoint":
            return load_model(self.path, dtype or torch.bfloat16).to(device)
        if dtype is not None:
            raise ValueError(
                f"{self.path} is quantized already and keeps its dtype; leave --dtype out" + see("already-quantized")
            )
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_huggingface(self.config()))
        checkpoint.load(model, self.path, device=device)
        return model.requires_grad_(False).eval()

    def config(self) -> dict[str, Any]:
        """`config.json` of a directory, without what says how the weights are quantized."""
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return {key: value for key, value in config.items() if key != "quantization_config"}

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)


def find_source(name: str) -> Source:
    """What MODEL on the command line stands for; `demo` downloads its model the first time.

    Raises:
        ValueError: nothing is there, or nothing that can be read.
    """
    if name == "demo":
        return Source(name, demo_model(), "gguf")
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return Source(name, path, "checkpoint")
    if (path / "config.json").is_file():
        quantized = read_json(path / "config.json").get("quantization_config")
        return Source(name, path, "checkpoint" if quantized else "huggingface")
    if path.is_file() and path.suffix == ".gguf":
        return Source(name, path, "gguf")
    what = "exists, but is none of these" if path.exists() else "does not exist"
    raise ValueError(
        f"MODEL {name!r} {what}; give a Hugging Face directory (config.json and safetensors), a .gguf file, "
        "a directory written by `lowbit quantize`, or the word demo" + see("model-not-readable")
    )


def parse_dtype(word: str | None) -> torch.dtype | None:
    if word is None:
        return None
    if word not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {word!r}")
    return DTYPES[word]


# Quantized variants ------------------------------------------------------------------------------


def rules_for(model: nn.Module, config: str | None, rules: Mapping[str, str | None] | None = None) -> dict[str, Rule]:
    """Rules that quantize every Linear to `config`, but leave the output projection alone unless a rule names it.

    The projection to the vocabulary is often tied to the embedding and the layer that suffers most.
    """
    out: dict[str, Rule] = dict(rules or {})
    if config is not None:
        out["_default"] = config
    named = any(r == "lm_head" or (r.startswith("re:") and re.fullmatch(r[3:], "lm_head")) for r in out)
    has_head = isinstance(getattr(model, "lm_head", None), nn.Linear)
    if has_head and config is not None and not named:
        out["lm_head"] = None
    return out


def parse_rules(words: list[str]) -> dict[str, str | None]:
    """`NAME=CONFIG` words to rules; the config `none` leaves a layer alone.

    Raises:
        ValueError: a word without `=`, or an unknown config.
    """
    rules: dict[str, str | None] = {}
    for word in words:
        name, equals, config = word.rpartition("=")
        if not equals or not name:
            raise ValueError(f"--rule is NAME=CONFIG (NAME exact, or re:PATTERN; CONFIG may be none), got {word!r}")
        rules[name] = None if config == "none" else parse_config(config).spec
    return rules


def variant(model: nn.Module) -> nn.Module:
    """A copy of a model that shares all its weights: `quantize_` replaces them in the copy, the original keeps its."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def is_static(config: Config) -> bool:
    """Whether a config needs calibrated activation scales."""
    return config.scheme.act is not None and config.scheme.act.static


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, packed ones as stored, shared ones once."""
    weights = {id(p): p for p in model.parameters()}
    return sum(getattr(p, "nbytes_packed", p.numel() * p.element_size()) for p in weights.values())


# A directory that is a model again ---------------------------------------------------------------


def export(source: Source, model: Llama, directory: Path) -> None:
    """Save a quantized model with its configuration and tokenizer, so that the directory is a MODEL itself.

    Raises:
        CheckpointError: the model cannot be stored, or the directory holds other weights.
        ValueError: a GGUF file whose rotary scaling a config.json has no words for.
    """
    if source.kind == "gguf":
        tokenizer = source.tokenizer()
        checkpoint.save(model, directory, config=huggingface_config(model.config, tokenizer.eos_ids))
        save_tokenizer(tokenizer, directory)
        return
    # A rotation gives the output projection a table of its own.
    checkpoint.save(model, directory, config=source.config() | {"tie_word_embeddings": model.config.tie_embeddings})
    for name in TOKENIZER_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, directory / name)


def huggingface_config(config: LlamaConfig, eos_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """The `config.json` that `LlamaConfig.from_huggingface` reads as `config`.

    Raises:
        ValueError: rotary periods are stretched each by its own factor.
    """
    family = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias and not config.o_bias else "Llama"
    out: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
    }
    if config.rope_divisors is not None:
        if len(set(config.rope_divisors)) != 1:
            raise ValueError(
                "this GGUF file stretches each rotary period by its own factor, which config.json has no words for; "
                "quantize the Hugging Face directory of the same model"
            )
        out["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_divisors[0]}
    if eos_ids:
        out["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    return out


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, from which `load_tokenizer` makes an equal tokenizer."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tokenizer.backend.to_str())
    if tokenizer.bos_id is not None:
        bos = backend.id_to_token(tokenizer.bos_id)
        special = [(bos, tokenizer.bos_id)]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    backend.save(str(directory / "tokenizer.json"))
    settings = dict(tokenizer.special)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
