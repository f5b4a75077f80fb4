"""Text generation, and honest times for it. `Session` does the work; on a GPU its steps are a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.models.llama import Llama
from lowbit.models.sampling import Sampling
from lowbit.models.session import Session, session_for
from lowbit.models.speculative import Speculation, Speculative

#: Called with the new tokens `(B,)` of a step; may say which sequences shall end with them.
OnToken = Callable[[Tensor], Sequence[bool] | None]


@dataclass(frozen=True)
class GenerateResult:
    """What was generated and how long it took.

    Attributes:
        ids: `(B, prompt + new)` prompt and generated tokens; a sequence that ended early is filled up with its end
            token.
        prompt_tokens: length of the prompt.
        new_tokens: of each sequence, the same for all.
        prefill_seconds: until the logits of the first new token.
        decode_seconds: all tokens after the first.
        cache_bytes: size of the KV cache, and of the draft's.
        graph_bytes: GPU memory that CUDA graphs hold beside it; 0 where there are none.
        speculation: what came of a draft's proposals; None without a draft.
    """

    ids: Tensor
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    graph_bytes: int = 0
    speculation: Speculation | None = None

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
    on_token: OnToken | None = None,
    warmup: bool = False,
    draft: Llama | None = None,
    draft_tokens: int = 4,
) -> GenerateResult:
    """Continue the prompts `ids (B, T)`, all of the same length, until all have ended or the limit is reached.

    On a GPU a step is a CUDA graph, captured at the first call for a batch size and a range of lengths and kept, with
    its cache, until another one is needed (`lowbit.models.session.forget_session` frees it). Nothing waits for the GPU
    between tokens unless `eos_ids` or `on_token` ask to look at them, or there is a draft.

    Args:
        temperature, top_k, top_p: see `lowbit.models.Sampling`; the default is the most likely token.
        seed: of the random draws; the same seed on the same device gives the same text.
        eos_ids: tokens that end a sequence; a `Tokenizer` knows them.
        on_token: called after each step with the new tokens `(B,)`, for streaming; its time counts. With a draft they
            come on the CPU, several at a time. It may return `(B,)` booleans: which sequences end with this token.
        warmup: run the prompt and one step before the clock starts, so that one-time costs (loading kernels, packing)
            are not counted as speed. On a GPU the prompt, too, is a CUDA graph then.
        draft: a faster model with the same vocabulary, such as the same one in fewer bits or a smaller one. It proposes
            tokens, and `model` reads them in one pass (`lowbit.models.speculative`). The result is that of `model`.
        draft_tokens: that it proposes at a time, 1 to 15.

    Raises:
        ValueError: an empty prompt, a sampling argument out of range, prompt and limit exceed the model's context, or
            a draft that does not fit.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, ids, max_new_tokens, draft)
    device = model.model.norm.weight.device
    ids = ids.to(device)
    batch, length = ids.shape
    capacity = length + max_new_tokens
    random = torch.Generator(device).manual_seed(seed)
    out = _Output(eos_ids, on_token)
    source: _Steps | _Rounds
    if draft is None:
        source = _Steps(session_for(model, batch, capacity))
    else:
        # A last pass may read more tokens than are asked for.
        target, fast = (
            session_for(m, batch, min(capacity + draft_tokens, m.config.max_positions)) for m in (model, draft)
        )
        source = _Rounds(Speculative(target, fast, draft_tokens))
    if warmup:
        source.warm_up(ids, sampling, random)
        random.manual_seed(seed)

    started = _now(device)
    logits = source.prefill(ids)
    prefilled = _now(device)
    session = source.session
    session.sample(logits, sampling, random)
    new = 0
    for token in (t for tokens in source.tokens(sampling, random, out) for t in tokens.unbind(1)):
        new += 1
        if out.take(token) or new == max_new_tokens:
            break
    decoded = _now(device)
    made = session.ids[:, : length + new]
    if out.watches:
        made[:, length:] = torch.stack(out.taken, dim=1)
    return GenerateResult(
        ids=made.to(ids.dtype),
        prompt_tokens=length,
        new_tokens=new,
        prefill_seconds=prefilled - started,
        decode_seconds=decoded - prefilled,
        cache_bytes=sum(s.state.cache.nbytes for s in source.sessions),
        graph_bytes=sum(s.graph_bytes for s in source.sessions),
        speculation=source.speculation,
    )


class _Output:
    """What comes out, if anybody looks at it: behind its end, a sequence repeats its last token.

    Attributes:
        taken: tokens `(B,)` so far.
        ended: `(B,)` bool, or None before the first token.
    """

    def __init__(self, eos_ids: Sequence[int], on_token: OnToken | None) -> None:
        self.eos_ids, self.on_token = list(eos_ids), on_token
        self.watches = bool(self.eos_ids) or on_token is not None
        self.taken: list[Tensor] = []
        self.ended: Tensor | None = None

    def take(self, token: Tensor) -> bool:
        """Whether all sequences have ended with `token (B,)`."""
        if not self.watches:
            return False
        if self.ended is None:
            self.ends = torch.tensor(self.eos_ids, dtype=torch.int64, device=token.device)
            self.ended = torch.zeros(len(token), dtype=torch.bool, device=token.device)
            token = token.clone()
        else:
            token = torch.where(self.ended, self.taken[-1], token)
        self.taken.append(token)
        asked = None if self.on_token is None else self.on_token(token)
        if asked is not None:
            self.ended |= torch.tensor(asked, dtype=torch.bool, device=token.device)
        if self.eos_ids:
            self.ended |= torch.isin(token, self.ends)
        return (bool(self.eos_ids) or asked is not None) and bool(self.ended.all())


class _Steps:
    """A model by itself: one token at a time."""

    speculation = None

    def __init__(self, session: Session) -> None:
        self.session, self.sessions = session, [session]

    def prefill(self, ids: Tensor) -> Tensor:
        return self.session.prefill(ids)

    def warm_up(self, ids: Tensor, sampling: Sampling, random: torch.Generator) -> None:
        """The run that follows overwrites what this leaves in the cache."""
        self.session.capture_prompt(ids.shape[1])
        self.session.prefill(ids)
        self.session.step()

    def tokens(self, sampling: Sampling, random: torch.Generator, out: _Output) -> Iterator[Tensor]:
        """`(B, 1)`, beginning with the one that is chosen already; valid until the next."""
        while True:
            yield self.session.token[:, None]
            self.session.sample(self.session.step(), sampling, random)


class _Rounds:
    """A model with a draft: some tokens at a time."""

    def __init__(self, speculative: Speculative) -> None:
        self.speculative, self.session = speculative, speculative.target
        self.sessions = [speculative.target, speculative.draft]

    @property
    def speculation(self) -> Speculation:
        return self.speculative.done

    def prefill(self, ids: Tensor) -> Tensor:
        return self.speculative.prefill(ids)

    def warm_up(self, ids: Tensor, sampling: Sampling, random: torch.Generator) -> None:
        for session in self.sessions:
            session.capture_prompt(ids.shape[1])
        self.speculative.prefill(ids)
        self.speculative.round(sampling, random)

    def tokens(self, sampling: Sampling, random: torch.Generator, out: _Output) -> Iterator[Tensor]:
        """`(B, n)` on the CPU, beginning with the one that is chosen already."""
        yield self.session.token[:, None].cpu()
        while True:
            yield self.speculative.round(sampling, random, out.ended)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check(model: Llama, ids: Tensor, max_new_tokens: int, draft: Llama | None) -> None:
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
    if draft is None:
        return
    if draft is model:
        raise ValueError("generate: a model is no draft of itself; give a copy in fewer bits" + see("bad-option"))
    if ids.shape[1] > (limit := draft.config.max_positions):
        raise ValueError(
            f"generate: {ids.shape[1]} prompt tokens are more than the draft's context of {limit}"
            + see("context-exceeded")
        )
    where = model.model.norm.weight.device
    if where != (other := draft.model.norm.weight.device):
        raise ValueError(f"generate: the model is on {where}, its draft on {other}" + see("bad-option"))
