"""How much a quantized language model differs from its original: perplexity, KL divergence, top-1 agreement.

The text is cut into windows without overlap; every token of a window but its first is predicted from those before it.

    perplexity       exp(mean over tokens of -log q(token)); its error by the delta method
    KL divergence    mean over tokens of sum_v p(v) (log p(v) - log q(v)), p the original's distribution, q the model's
    top-1 agreement  share of tokens where both models hold the same continuation for the most likely

The statistics are those of llama.cpp's `llama-perplexity --kl-divergence` (its tools/perplexity/README.md). Errors are
standard errors of the mean over tokens. A language model's perplexity differs far more from text to text than between
two formats on one text, so `perplexity_ratio` compares both models token by token, which cancels the text's share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.models.llama import Llama

# Logits are made for at most this many (token, vocabulary) pairs at once and reduced in pieces that stay in cache.
_LOGITS_AT_ONCE = 1 << 26
_REDUCED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class EvalResult:
    """Fields about the original are None where there was none to compare with. `kl_*` are in nats."""

    tokens: int
    perplexity: float
    perplexity_stderr: float
    seconds: float
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


@dataclass
class Reference:
    """What an original model says about a text: for each window, log-probabilities, losses and best tokens.

    Log-probabilities `(tokens, V)` are kept in fp16: it holds the likely tokens, near zero, the most precisely. For
    2048 tokens and a vocabulary of 49152 that is 200 MB.
    """

    window: int
    ids: Tensor
    log_probs: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    @property
    def kept(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.log_probs, self.losses, self.best

    @property
    def nbytes(self) -> int:
        """Bytes of the stored log-probabilities."""
        return sum(t.numel() * t.dtype.itemsize for t in self.log_probs)


@torch.inference_mode()
def reference_of(
    model: nn.Module, ids: Tensor, window: int = 1024, progress: Callable[[int, int], None] | None = None
) -> Reference:
    """Run the original once over `ids (tokens,)` and keep what every later `evaluate` compares with."""
    reference = Reference(window, ids.cpu())
    for i, (inputs, targets) in enumerate(cut := _windows(ids, window)):
        if progress is not None:
            progress(i, len(cut))
        _keep(reference, model, inputs, targets)
    return reference


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    ids: Tensor,
    reference: Reference | nn.Module | None = None,
    window: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Measure `model` on a text, and against its original where one is given.

    Args:
        model: in eval mode; maps ids `(1, T)` to logits `(1, T, V)`, or to an object with such `.logits`.
        ids: `(tokens,)` at least two token ids.
        reference: what `reference_of` returned for the same ids and window; or the original model itself, which is
            then run window by window beside `model` and nothing is kept.
        window: tokens per window; a last, shorter window counts too.
        progress: called with (windows done, windows in all) before each window.

    Raises:
        ValueError: `ids` is too short or not 1-D, or `reference` belongs to other ids or another window.
    """
    started = time.perf_counter()
    stored = reference if isinstance(reference, Reference) else None
    if stored is not None and (stored.window != window or not torch.equal(stored.ids, ids.cpu())):
        raise ValueError(
            f"evaluate: the reference was made for {stored.ids.numel()} ids in windows of {stored.window}, not for "
            f"these {ids.numel()} ids in windows of {window}; call reference_of with the same ids and window"
            + see("reference-mismatch")
        )
    losses, changes, divergences, agreements = [], [], [], []
    for i, (inputs, targets) in enumerate(cut := _windows(ids, window)):
        if progress is not None:
            progress(i, len(cut))
        original, at = stored, i
        if isinstance(reference, nn.Module):
            original, at = Reference(window, ids), 0
            _keep(original, reference, inputs, targets)
        for rows, log_q in _log_probs(model, inputs):
            losses.append(_loss(log_q, targets[rows]))
            if original is not None:
                log_p, loss_p, best_p = (t[at][rows].to(log_q.device) for t in original.kept)
                divergences.append(_divergence(log_p.float(), log_q))
                changes.append(losses[-1] - loss_p)
                agreements.append(log_q.argmax(-1) == best_p)
    loss, loss_error = _mean_and_error(losses)
    perplexity = math.exp(min(loss, 700.0))  # beyond the range of a double, a model is no worse for it
    result = EvalResult(
        tokens=sum(len(targets) for _, targets in cut),
        perplexity=perplexity,
        perplexity_stderr=perplexity * loss_error,
        seconds=time.perf_counter() - started,
    )
    if reference is None:
        return result
    change, change_error = _mean_and_error(changes)
    kl, kl_error = _mean_and_error(divergences)
    ratio = math.exp(min(change, 700.0))
    return replace(
        result,
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=ratio * change_error,
        kl_mean=kl,
        kl_stderr=kl_error,
        kl_p99=float(torch.cat(divergences).quantile(0.99)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
    )


def held_out_text() -> str:
    """About 200 kB of public-domain English prose (The World Factbook) to measure models on."""
    return resources.files("lowbit.tools").joinpath("data/factbook.txt").read_text(encoding="utf-8")


def _windows(ids: Tensor, window: int) -> list[tuple[Tensor, Tensor]]:
    """Per window its inputs and the tokens that follow them; a last window of one token predicts nothing."""
    if ids.dim() != 1 or ids.numel() < 2:
        raise ValueError(
            f"a text to measure is 1-D with at least 2 token ids, got shape {tuple(ids.shape)}" + see("input-mismatch")
        )
    if window < 2:
        raise ValueError(f"a window holds at least 2 tokens, got {window}" + see("bad-option"))
    return [(w[:-1], w[1:]) for w in ids.split(window) if w.numel() > 1]


def _keep(reference: Reference, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    pieces = [(p.half(), _loss(p, targets[rows]), p.argmax(-1)) for rows, p in _log_probs(model, inputs)]
    for kept, parts in zip(reference.kept, zip(*pieces), strict=True):
        kept.append(torch.cat(parts))


def _log_probs(model: nn.Module, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The model's fp32 log-probabilities `(rows, V)` after each of `ids (T,)`, some consecutive rows at a time.

    `log_softmax` adds up a vocabulary of 50000 one after the other and loses 1e-5 of the sum, as much as a good
    format's divergence; `logsumexp` adds in pairs.
    """
    done = 0
    for logits in _logits(model, ids.to(next(model.parameters()).device)):
        for piece in logits.split(max(1, _REDUCED_AT_ONCE // logits.shape[-1])):
            piece = piece.float()
            yield slice(done, done + len(piece)), piece - piece.logsumexp(-1, keepdim=True)
            done += len(piece)


def _logits(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Logits `(rows, V)`; our own model multiplies by the vocabulary in parts, so that memory stays bounded."""
    if isinstance(model, Llama):
        hidden = model.model(ids[None], None, 0)[0]
        yield from (model.lm_head(part) for part in hidden.split(max(1, _LOGITS_AT_ONCE // model.config.vocab_size)))
    else:
        output = model(ids[None])
        yield getattr(output, "logits", output)[0]


def _loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    """`-log q(target)` per token, fp64."""
    return -log_probs.gather(-1, targets[:, None].to(log_probs.device)).squeeze(-1).double()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per token, fp64, for p whose logarithms were rounded.

    The rounded p does not sum to one exactly. The form for such measures, `sum p log(p / q) - sum p + sum q`, is the
    plain one where it does, and elsewhere leaves an error of second order in the rounding, not of first.
    """
    p = log_p.exp()
    return (p * (log_p - log_q - 1)).sum(-1).double() + 1


def _mean_and_error(parts: list[Tensor]) -> tuple[float, float]:
    """Mean over tokens and its standard error, in fp64; the error of a single token is unknown (NaN)."""
    values = torch.cat(parts).double()
    n = values.numel()
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), error
