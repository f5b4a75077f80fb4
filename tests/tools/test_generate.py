"""Generation against recomputing everything for every token, and sampling against its definition."""

from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

from lowbit.models.sampling import Sampling, draw
from lowbit.tools.generate import generate


def recomputed(model, ids, steps):
    """Greedy continuation without a cache."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_greedy_is_the_most_likely_token_each_time(tokens, warmup):
    model, ids = tiny_llama(), tiny_ids(3, tokens)
    result = generate(model, ids, 12, warmup=warmup)
    assert torch.equal(result.ids, recomputed(model, ids, 12))
    assert (result.prompt_tokens, result.new_tokens) == (tokens, 12)
    assert result.cache_bytes == 2 * CONFIG.num_layers * 3 * CONFIG.num_kv_heads * (tokens + 12) * CONFIG.head_dim * 4


def test_speed_counts_the_steps_after_the_first_token():
    result = generate(tiny_llama(), tiny_ids(3, 9), 5)
    assert result.tokens_per_second == pytest.approx(3 * 4 / result.decode_seconds)
    assert result.prefill_tokens_per_second == pytest.approx(3 * 9 / result.prefill_seconds)
    single = generate(tiny_llama(), tiny_ids(1, 9), 1)
    assert single.tokens_per_second != single.tokens_per_second  # not a number: nothing was decoded


def test_a_sequence_ends_at_its_end_token_and_is_filled_up():
    model, ids = tiny_llama(), tiny_ids(3, 9)
    free = recomputed(model, ids, 12)[:, 9:]
    end = int(free[0, 4])
    result = generate(model, ids, 12, eos_ids=(end,)).ids[:, 9:]
    for row, expected in zip(result, free, strict=True):
        places = (expected == end).nonzero()
        stop = int(places[0]) if len(places) else len(expected)
        stop = min(stop, result.shape[1])
        assert torch.equal(row[:stop], expected[:stop])
        assert bool((row[stop:] == end).all())
    alone = generate(model, ids[:1], 12, eos_ids=(end, 1000))
    first = int((free[0] == end).nonzero()[0])
    assert alone.new_tokens == first + 1
    assert int(alone.ids[0, -1]) == end


def test_tokens_are_streamed_as_they_come():
    seen = []
    result = generate(tiny_llama(), tiny_ids(2, 9), 6, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), result.ids[:, 9:])


def test_a_seed_repeats_a_draw():
    model, ids = tiny_llama(), tiny_ids(2, 9)
    draws = [generate(model, ids, 20, temperature=2.0, seed=seed).ids for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(generate(model, ids, 20, temperature=2.0, top_k=1).ids, generate(model, ids, 20).ids)


def frequencies(logits, draws=20000, **settings):
    rows = logits.expand(draws, -1)
    tokens = draw(Sampling(**{"temperature": 1.0} | settings).probabilities(rows), torch.Generator())
    return torch.bincount(tokens, minlength=logits.numel()) / draws


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = p.log()
    assert torch.allclose(frequencies(logits), p, atol=0.015)
    assert torch.allclose(frequencies(logits, temperature=0.5), p**2 / (p**2).sum(), atol=0.015)
    assert torch.allclose(frequencies(logits, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.015)
    assert torch.allclose(frequencies(logits, top_k=9), p, atol=0.015)
    # 0.5 does not reach 0.7 and 0.5 + 0.25 does: two tokens stay.
    assert torch.allclose(frequencies(logits, top_p=0.7), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.015)
    assert frequencies(logits, top_p=0.01).tolist() == [1, 0, 0, 0]
    assert torch.allclose(frequencies(logits, top_p=1.0), p, atol=0.015)


def test_the_whole_context_can_be_used_and_no_more():
    model, ids = tiny_llama(replace(CONFIG, max_positions=16)), tiny_ids(1, 9)
    assert generate(model, ids, 7).ids.shape == (1, 16)
    with pytest.raises(ValueError, match="9 prompt tokens and 8 new ones make 17, more than the model's context of 16"):
        generate(model, ids, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, r"at least one token, got shape \(1, 0\)"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, r"\(batch, tokens\).* got shape \(4,\)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or above, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(), **{"ids": tiny_ids(1, 4), "max_new_tokens": 2} | changes)
