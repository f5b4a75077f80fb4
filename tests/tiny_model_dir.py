"""A Hugging Face directory with a tiny random Llama and a tiny tokenizer, for tests of tools and commands."""

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tiny_llama import tiny_llama

from lowbit.models import LlamaConfig

#: One token per byte, after the end: every text can be written.
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *ALPHABET]
TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=160,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tie_embeddings=True,
)


def write_model(path: Path, *, template: bool = False, **changes: object) -> Path:
    """The directory, with a tied output projection; `changes` go into its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    model = tiny_llama(CONFIG, torch.bfloat16)
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": CONFIG.max_positions,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": CONFIG.rope_theta,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config | changes))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>"} | ({"chat_template": TEMPLATE} if template else {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
