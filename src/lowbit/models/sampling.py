"""How the next token is drawn from a model's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import see


@dataclass(frozen=True)
class Sampling:
    """What the most likely token is replaced by.

    Attributes:
        temperature: 0 takes the most likely token; above, tokens are drawn from `softmax(logits / temperature)`.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest most likely tokens that together have at least this probability (Holtzman et al.,
            "The Curious Case of Neural Text Degeneration", 2019). Applied after `top_k`.

    Raises:
        ValueError: one of them is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}" + see("bad-option"))
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}" + see("bad-option"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}" + see("bad-option"))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """fp32 `(..., V)`: of every token, from logits of the same shape. Not for a temperature of 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            sorted_p, order = probabilities.sort(descending=True)
            before = sorted_p.cumsum(-1) - sorted_p  # a token stays while those before it do not reach top_p
            kept = sorted_p.masked_fill(before >= self.top_p, 0)
            kept /= kept.sum(-1, keepdim=True)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
        return probabilities


def draw(weights: Tensor, random: torch.Generator) -> Tensor:
    """One token `(...)` per row of `weights (..., V)`, each as likely as its weight in the sum.

    The most likely token after each weight was divided by an exponential draw of its own is a token drawn by weight (an
    exponential race); `torch.multinomial` does that too, but waits for the GPU to check its input.
    """
    draws = torch.empty_like(weights).exponential_(1.0, generator=random)
    return (weights / draws).argmax(-1)
