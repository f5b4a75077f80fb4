"""What a language model does, as phases: it reads a prompt, then generates token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lowbit.models.llama import Llama
from lowbit.tools.profile.session import Phase

#: Tokens generated while every operation is recorded; more would say the same.
RECORDED = 8


def reads_and_generates(prompt_tokens: int, new_tokens: int) -> Callable[[nn.Module, Phase], None]:
    """The work for `profile`: one sequence of random tokens, then the most likely ones; phases prefill and decode."""

    def run(model: nn.Module, phase: Phase) -> None:
        assert isinstance(model, Llama)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator)
        ids = ids.to(model.model.norm.weight.device)
        with torch.inference_mode():
            with phase("prefill"):
                cache = model.new_cache(1, prompt_tokens + new_tokens)
                logits = model(ids, cache, 0, last_only=True)
            with phase("decode"):
                for i in range(new_tokens):
                    logits = model(logits[:, -1].argmax(-1, keepdim=True), cache, prompt_tokens + i)

    return run
