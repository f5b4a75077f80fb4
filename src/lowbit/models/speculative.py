"""Speculative decoding (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023): a fast
model proposes some tokens, and the target reads all of them in one pass.

A pass over some tokens reads the target's weights once, as a step does. What it says behind every proposal decides how
many of them it would have said itself, and gives one more token. The output is the target's: greedy, the tokens that
are most likely to it; drawn, tokens of its distribution. The draft decides about speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.models.inference import MOST_NEW
from lowbit.models.sampling import Sampling, draw
from lowbit.models.session import Session


def accept_most_likely(proposed: Tensor, chosen: Tensor) -> Tensor:
    """How many of the tokens `proposed (B, k)` are those of `chosen (B, k + 1)`, before the first other one: `(B,)`."""
    return (proposed == chosen[:, :-1]).long().cumprod(1).sum(1)


def accept_drawn(proposed: Tensor, p: Tensor, q: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Leviathan et al.: tokens distributed as the target's, whatever the draft's distribution is.

    Proposal x is accepted with probability `min(1, p(x) / q(x))`. The first that is not is replaced by a draw from
    `max(0, p - q)`; behind the last one comes a draw from p.

    Args:
        proposed: `(B, k)`, proposal i drawn from `q[:, i]`.
        p: `(B, k + 1, V)`, the target's probabilities before each proposal and behind the last.
        q: `(B, k, V)`, the draft's.

    Returns:
        tokens `(B, k + 1)`, of which the first `n + 1` are good, and n `(B,)`, the number of accepted proposals.
    """
    at = proposed[:, :, None]
    p_at, q_at = p[:, :-1].gather(2, at)[:, :, 0], q.gather(2, at)[:, :, 0]
    uniform = torch.rand(proposed.shape, generator=random, device=proposed.device)
    # `<=`: equal probabilities are accepted for certain, and no remainder is asked for that is zero everywhere.
    accepted = (uniform * q_at <= p_at) & (p_at > 0)
    n = accepted.long().cumprod(1).sum(1)
    q = torch.cat((q, torch.zeros_like(q[:, :1])), dim=1)
    there = n[:, None, None].expand(-1, 1, p.shape[2])
    p_there, q_there = p.gather(1, there)[:, 0], q.gather(1, there)[:, 0]
    remainder = (p_there - q_there).clamp(min=0)
    # Rounding may leave none of it where p and q are all but equal.
    remainder = torch.where(remainder.sum(-1, keepdim=True) > 0, remainder, p_there)
    tokens = torch.cat((proposed, proposed[:, :1]), dim=1).scatter(1, n[:, None], draw(remainder, random)[:, None])
    return tokens, n


@dataclass
class Speculation:
    """What came of it.

    Attributes:
        passes: of the target over proposals.
        proposed: tokens of each sequence that the draft proposed.
        accepted: of these, how many were taken.
        single: steps of the target alone, where the context had no room for proposals.
    """

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    single: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that was taken; NaN before the first."""
        return self.accepted / self.proposed if self.proposed else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of each sequence for a pass or a step of the target: between 1 and the proposals of a pass plus 1."""
        steps = self.passes + self.single
        return (self.accepted + steps) / steps if steps else float("nan")


class Speculative:
    """Two sessions of which one proposes what the other reads.

        speculative = Speculative(target, draft, tokens=4)
        speculative.prefill(ids)
        while target.length < 100:
            speculative.round(Sampling(), random)

    All sequences of a batch go on equally far, as far as the one with the fewest accepted proposals: what that drops
    depends on the others alone, so it changes no distribution.
    """

    def __init__(self, target: Session, draft: Session, tokens: int) -> None:
        """On a GPU, graphs are captured for passes over two tokens (draft) and `tokens + 1` (target).

        Args:
            tokens: that the draft proposes at a time, 1 to 15.

        Raises:
            ValueError: another number, or sessions that do not go together.
        """
        if not 1 <= tokens < MOST_NEW:
            raise ValueError(f"a draft proposes 1 to {MOST_NEW - 1} tokens at a time, got {tokens}" + see("bad-option"))
        words = target.model.config.vocab_size, draft.model.config.vocab_size
        if words[0] != words[1]:
            raise ValueError(
                f"the target has a vocabulary of {words[0]} tokens and the draft one of {words[1]}; take a draft with "
                "the same tokenizer" + see("input-mismatch")
            )
        if target.batch != draft.batch:
            raise ValueError(
                f"the target has {target.batch} sequences and the draft {draft.batch}" + see("input-mismatch")
            )
        self.target, self.draft, self.tokens = target, draft, tokens
        self.done = Speculation()
        target.capture_read(tokens + 1)
        draft.capture_read(2)

    def prefill(self, ids: Tensor) -> Tensor:
        """Both models begin anew with the prompts `ids (B, T)`; the target's logits `(B, V)` behind them."""
        self.done = Speculation()
        self.draft.prefill(ids)
        return self.target.prefill(ids)

    @torch.inference_mode()
    def round(self, sampling: Sampling, random: torch.Generator, ended: Tensor | None = None) -> Tensor:
        """Some more tokens for every sequence, at least one: `(B, n)` int64 on the CPU.

        The host waits for the GPU once, for how many there are.

        Args:
            ended: `(B,)` bool: sequences whose tokens do not matter any more.
        """
        target, length = self.target, self.target.length
        if length + self.tokens > min(target.capacity, self.draft.capacity):
            return self._single(sampling, random)
        # The place before the newest may hold a proposal that the draft has not read itself: it reads both.
        logits = self.draft.read(target.state.ids[:, length - 2 : length], length - 2)
        q = [self._propose(logits[:, -1], sampling, random)]
        while len(q) < self.tokens:
            q.append(self._propose(self.draft.step(), sampling, random))
        newest = target.state.ids[:, length - 1 : length]
        proposed = self.draft.state.ids[:, length : length + self.tokens]
        logits = target.read(torch.cat((newest, proposed), dim=1), length - 1)
        if sampling.greedy:
            tokens = logits.argmax(-1)
            n = accept_most_likely(proposed, tokens)
        else:
            tokens, n = accept_drawn(proposed, sampling.probabilities(logits), torch.stack(q, dim=1), random)
        if ended is not None and bool(ended.any()):
            n = n.masked_fill(ended.to(n.device), self.tokens)
        found = torch.cat((n[:, None], tokens), dim=1).cpu()
        fewest = int(found[:, 0].min())
        target.rewind(length + fewest + 1, tokens[:, fewest])
        self.done.passes += 1
        self.done.proposed += self.tokens
        self.done.accepted += fewest
        return found[:, 1 : fewest + 2]

    def _propose(self, logits: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
        """Choose the draft's newest token; the probabilities that it was drawn from, or the logits if it was not."""
        if sampling.greedy:
            return logits
        q = sampling.probabilities(logits)
        self.draft.put(draw(q, random))
        return q

    def _single(self, sampling: Sampling, random: torch.Generator) -> Tensor:
        """A step of the target."""
        self.target.sample(self.target.step(), sampling, random)
        self.done.single += 1
        return self.target.token[:, None].cpu()
