"""Text generation, and honest times for it. `Session` does the work; on a GPU its steps are a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.models.llama import Llama
from lowbit.models.session import Session, session_for


@dataclass(frozen=True)
class GenerateResult:
    """What was generated and how long it took.

    Attributes:
        ids: `(B, prompt + new)` prompt and generated tokens; a sequence that ended early is filled up with its end
            token.
        prompt_tokens: length of the prompt.
        new_tokens: steps taken, the same for all sequences.
        prefill_seconds: until the logits of the first new token.
        decode_seconds: all steps after the first token.
        cache_bytes: size of the KV cache.
        graph_bytes: GPU memory that CUDA graphs hold beside it; 0 where there are none.
    """

    ids: Tensor
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    graph_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over the whole batch; NaN where a single token was generated."""
        steps = self.new_tokens - 1
        return self.ids.shape[0] * steps / self.decode_seconds if steps > 0 else float("nan")

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of reading the prompts, over the whole batch."""
        return self.ids.shape[0] * self.prompt_tokens / self.prefill_seconds


@torch.inference_mode()
def generate(
    model: Llama,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    on_token: Callable[[Tensor], None] | None = None,
    warmup: bool = False,
) -> GenerateResult:
    """Continue the prompts `ids (B, T)`, all of the same length, until all have ended or the limit is reached.

    On a GPU a step is a CUDA graph, captured at the first call for a batch size and a range of lengths and kept, with
    its cache, until another one is needed (`lowbit.models.session.forget_session` frees it). Nothing waits for the GPU
    between tokens unless `eos_ids` or `on_token` ask to look at them.

    Args:
        temperature: 0 takes the most likely token; above, tokens are drawn from `softmax(logits / temperature)`.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest most likely tokens that together have at least this probability (Holtzman et al.,
            "The Curious Case of Neural Text Degeneration", 2019). Applied after `top_k`.
        seed: of the random draws; the same seed on the same device gives the same text.
        eos_ids: tokens that end a sequence; a `Tokenizer` knows them.
        on_token: called after each step with the new tokens `(B,)`, for streaming; its time counts.
        warmup: run the prompt and one step before the clock starts, so that one-time costs (loading kernels, packing)
            are not counted as speed. On a GPU the prompt, too, is a CUDA graph then.

    Raises:
        ValueError: an empty prompt, a sampling argument out of range, or prompt and limit exceed the model's context.
    """
    _check(model, ids, max_new_tokens, temperature, top_k, top_p)
    device = model.model.norm.weight.device
    ids = ids.to(device)
    batch, length = ids.shape
    session = session_for(model, batch, length + max_new_tokens)
    random = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    if warmup:
        _warm_up(session, ids)

    started = _now(device)
    logits = session.prefill(ids)
    prefilled = _now(device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    while True:
        if temperature > 0:
            session.put(choose(logits.float(), temperature, top_k, top_p, random))
        if len(ends):
            session.put(torch.where(ended, ends[0], session.token))
            ended |= torch.isin(session.token, ends)
        if on_token is not None:
            on_token(session.token.to(ids.dtype, copy=True))
        new = session.length - length
        if new == max_new_tokens or (len(ends) and bool(ended.all())):
            break
        logits = session.step()
    decoded = _now(device)
    return GenerateResult(
        ids=session.ids.to(ids.dtype),
        prompt_tokens=length,
        new_tokens=new,
        prefill_seconds=prefilled - started,
        decode_seconds=decoded - prefilled,
        cache_bytes=session.state.cache.nbytes,
        graph_bytes=session.graph_bytes,
    )


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
) -> Tensor:
    """One token `(B,)` per row of fp32 `logits (B, V)`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_p, order = probabilities.sort(descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # a token stays while those before it do not reach top_p
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, sorted_p.masked_fill(before >= top_p, 0))
    # The most likely token after each probability was divided by an exponential draw of its own is a token drawn by
    # probability (an exponential race); `torch.multinomial` does that too, but waits for the GPU to check its input.
    draws = torch.empty_like(probabilities).exponential_(1.0, generator=random)
    return (probabilities / draws).argmax(-1)


def _warm_up(session: Session, ids: Tensor) -> None:
    """The run that follows overwrites what this leaves in the cache."""
    session.capture_prompt(ids.shape[1])
    session.prefill(ids)
    session.step()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check(
    model: Llama, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(
            f"generate: ids must be (batch, tokens) with at least one token, got shape {tuple(ids.shape)}"
            + see("input-mismatch")
        )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}" + see("bad-option"))
    if (total := ids.shape[1] + max_new_tokens) > (limit := model.config.max_positions):
        raise ValueError(
            f"generate: {ids.shape[1]} prompt tokens and {max_new_tokens} new ones make {total}, more than the model's "
            f"context of {limit}; shorten the prompt or lower max_new_tokens" + see("context-exceeded")
        )
    if temperature < 0:
        raise ValueError(f"generate: temperature must be 0 (greedy) or above, got {temperature}" + see("bad-option"))
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}" + see("bad-option"))
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}" + see("bad-option"))
