"""Tiny models of transformers with random weights, for the tests that meet it; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lowbit import QuantizedTensor

IDS = torch.arange(24).view(1, -1) % 64


def llama_config(**changes: Any) -> LlamaConfig:
    """Sizes that every scheme divides, and that differ where a mix-up would go unseen."""
    sizes = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**(sizes | changes))


def llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(**changes), dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


def saved(model: PreTrainedModel, directory: Path) -> Path:
    """The float model as transformers writes it."""
    model.save_pretrained(directory)
    return directory


def quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: w for name, w in model.named_parameters() if isinstance(w, QuantizedTensor)}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits  # type: ignore[no-any-return]


@torch.no_grad()
def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with plain weights, those that the quantized ones stand for."""
    plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    state = {n: w.dequantize() if isinstance(w, QuantizedTensor) else w for n, w in model.state_dict().items()}
    plain.load_state_dict(state)
    return plain.eval()  # type: ignore[no-any-return]
