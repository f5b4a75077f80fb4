"""Evaluation against its formulas in fp64, and against what the quantities mean."""

import math

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import nn

from lowbit.tools import evaluate as module
from lowbit.tools.evaluate import evaluate, held_out_text, reference_of

VOCAB = 97


class Bigrams(nn.Module):
    """Logits that depend on the last token alone: a table that a test can hold in its hand."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.seen: list[list[int]] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen += ids.tolist()
        return self.table[ids]


def table(seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


IDS = tiny_ids(1, 100)[0]


def test_the_numbers_are_those_of_the_formulas():
    p, q = Bigrams(table(0)), Bigrams(table(0) + table(1, 0.5))
    result = evaluate(q, IDS, p, window=30)
    losses, changes, divergences, same = [], [], [], []
    for t in range(len(IDS) - 1):
        if (t + 1) % 30 == 0:
            continue  # the first token of a window is given, not predicted
        log_p, log_q = (m.table[IDS[t]].double().log_softmax(0) for m in (p, q))
        losses.append(-float(log_q[IDS[t + 1]]))
        changes.append(float(log_p[IDS[t + 1]] - log_q[IDS[t + 1]]))
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum()))
        same.append(bool(log_p.argmax() == log_q.argmax()))
    n = len(losses)

    def mean_and_error(values):
        mean = sum(values) / n
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)

    (loss, loss_error), (change, change_error), (kl, kl_error) = map(mean_and_error, (losses, changes, divergences))
    assert result.tokens == n == 96
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert result.perplexity_stderr == pytest.approx(math.exp(loss) * loss_error, rel=1e-6)
    assert result.perplexity_ratio == pytest.approx(math.exp(change), rel=1e-6)
    assert result.perplexity_ratio_stderr == pytest.approx(math.exp(change) * change_error, rel=1e-6)
    assert result.kl_mean == pytest.approx(kl, rel=1e-3)  # the original's log-probabilities are kept in fp16
    assert result.kl_stderr == pytest.approx(kl_error, rel=1e-3)
    assert result.kl_p99 == pytest.approx(torch.tensor(divergences).quantile(0.99).item(), rel=1e-3)
    assert result.top1_agreement == sum(same) / n
    assert 0 < sum(same) < n


def test_windows_do_not_overlap_and_a_last_single_token_predicts_nothing():
    model = Bigrams(table(0))
    result = evaluate(model, IDS[:61], window=20)
    assert model.seen == [w[:-1].tolist() for w in IDS[:60].split(20)]
    assert result.tokens == 57
    assert evaluate(model, IDS[:62], window=20).tokens == 58


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    result = evaluate(Bigrams(torch.zeros(VOCAB, VOCAB)), IDS)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert result.perplexity_stderr == pytest.approx(0, abs=1e-4)
    assert (result.kl_mean, result.perplexity_ratio, result.top1_agreement) == (None, None, None)


@pytest.mark.parametrize("stored", [True, False])
def test_a_model_compared_with_itself(stored):
    model = tiny_llama()
    result = evaluate(model, IDS, reference_of(model, IDS, 40) if stored else model, window=40)
    assert (result.perplexity_ratio, result.perplexity_ratio_stderr, result.top1_agreement) == (1, 0, 1)
    # Keeping log-probabilities in fp16 must not look like a difference between models.
    assert abs(result.kl_mean) < 1e-6
    assert abs(result.kl_p99) < 1e-5


def test_a_large_vocabulary_compared_with_itself():
    wide = torch.randn(VOCAB, 50000, generator=torch.Generator().manual_seed(0)) * 3
    wide[:, :5] += 12
    model = Bigrams(wide)
    result = evaluate(model, IDS, model)
    assert abs(result.kl_mean) < 2e-6
    exact = wide.double().log_softmax(-1)[IDS[:-1], IDS[1:]]
    assert result.perplexity == pytest.approx(math.exp(-float(exact.mean())), rel=2e-6)


def test_a_stored_reference_gives_what_the_model_itself_gives():
    p, q = tiny_llama(), tiny_llama(dtype=torch.bfloat16)
    stored, live = evaluate(q, IDS, reference_of(p, IDS, 40), window=40), evaluate(q, IDS, p, window=40)
    assert stored.__dict__ | {"seconds": 0} == live.__dict__ | {"seconds": 0}


def test_a_larger_disturbance_is_a_larger_divergence():
    p = Bigrams(table(0))
    reference = reference_of(p, IDS)
    results = [evaluate(Bigrams(table(0) + table(1, noise)), IDS, reference) for noise in (0.01, 0.1, 1.0)]
    assert 0 < results[0].kl_mean < results[1].kl_mean / 50 < results[2].kl_mean / 2500 * 2
    assert results[0].top1_agreement >= results[1].top1_agreement > results[2].top1_agreement


def test_pieces_do_not_change_the_result(monkeypatch):
    p, q = tiny_llama(), tiny_llama(dtype=torch.bfloat16)
    whole = evaluate(q, IDS, p, window=50)
    monkeypatch.setattr(module, "_REDUCED_AT_ONCE", 5 * VOCAB)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 13 * VOCAB)
    pieces = evaluate(q, IDS, p, window=50)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3)


def test_models_that_return_an_object_with_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(Bigrams):
        def forward(self, ids):
            return Output(super().forward(ids))

    assert evaluate(Wrapped(table(0)), IDS).perplexity == evaluate(Bigrams(table(0)), IDS).perplexity


def test_nan_is_reported_and_not_hidden():
    broken = table(0)
    broken[IDS[3]] = math.nan
    result = evaluate(Bigrams(broken), IDS, Bigrams(table(0)))
    assert math.isnan(result.perplexity)
    assert math.isnan(result.kl_mean)


def test_progress_counts_windows():
    calls = []
    evaluate(Bigrams(table(0)), IDS, window=40, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 3), (1, 3), (2, 3)]


def test_errors():
    model = Bigrams(table(0))
    for bad in (IDS[:1], IDS[None]):
        with pytest.raises(ValueError, match="1-D with at least 2 token ids"):
            evaluate(model, bad)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        evaluate(model, IDS, window=1)
    reference = reference_of(model, IDS, 40)
    with pytest.raises(ValueError, match="100 ids in windows of 40, not for these 100 ids in windows of 50"):
        evaluate(model, IDS, reference, window=50)
    with pytest.raises(ValueError, match="same ids and window"):
        evaluate(model, IDS.flip(0), reference, window=40)


def test_the_reference_keeps_two_bytes_per_probability():
    reference = reference_of(Bigrams(table(0)), IDS, 40)
    assert reference.nbytes == 97 * VOCAB * 2


def test_the_held_out_text_is_english_prose():
    text = held_out_text()
    assert 150_000 < len(text.encode()) < 250_000
    paragraphs = text.strip().split("\n\n")
    assert len(paragraphs) > 100
    assert all(len(p) > 100 and "\n" not in p for p in paragraphs)
    assert "\ufffd" not in text
    assert text.count(" the ") > 1000
