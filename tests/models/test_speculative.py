"""Speculative decoding: the text is the target's, whatever the draft says, and so is the distribution of draws."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

import lowbit
from lowbit.models import Llama
from lowbit.models.sampling import Sampling, draw
from lowbit.models.session import Session
from lowbit.models.speculative import Speculative, accept_drawn, accept_most_likely
from lowbit.tools.generate import generate

WIDE = replace(CONFIG, hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16)


def quantized(model: Llama, spec: str = "int4wo-32") -> Llama:
    copy = tiny_llama(model.config)
    copy.load_state_dict(model.state_dict())
    lowbit.quantize_(copy, spec)
    return copy


DRAFTS = {
    "the same in 4 bits": lambda model: quantized(model),
    "the same in 2 bits": lambda model: quantized(model, "int2wo-32-asym"),
    "another and smaller one": lambda model: tiny_llama(replace(WIDE, num_layers=1, hidden_size=32), seed=5),
    "an equal one": lambda model: tiny_llama(model.config),
}


# Greedy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 15])
@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize(("batch", "prompt"), [(1, 1), (1, 9), (3, 9)])
def test_the_text_is_that_of_the_target(batch, prompt, name, tokens):
    """From the first token to the last place of the context."""
    model, ids = tiny_llama(WIDE), tiny_ids(batch, prompt)
    draft = DRAFTS[name](model)
    new = WIDE.max_positions - prompt
    said = generate(model, ids, new, draft=draft, draft_tokens=tokens)
    assert torch.equal(said.ids, generate(model, ids, new).ids)
    s = said.speculation
    assert s.proposed == tokens * s.passes
    assert new - 1 <= s.accepted + s.passes + s.single < new + tokens
    assert s.tokens_per_pass == (s.accepted + s.passes + s.single) / (s.passes + s.single)
    if name == "an equal one":
        assert s.acceptance == 1
        assert s.single < tokens + 1
    else:
        assert 0 <= s.acceptance < 1


def test_a_better_draft_is_accepted_more_often():
    model, ids = tiny_llama(WIDE), tiny_ids(1, 9)
    rates = [generate(model, ids, 50, draft=quantized(model, spec)).speculation.acceptance
             for spec in ("int8wo", "int4wo-32", "int2wo-32-asym")]  # fmt: skip
    assert 1 >= rates[0] > rates[1] > rates[2]


def test_rounds_leave_both_caches_as_steps_would():
    """Behind every round: what a model of its own would have there, for all tokens but the newest."""
    model, ids = tiny_llama(WIDE), tiny_ids(2, 9)
    draft = quantized(model)
    sessions = Session(model, 2, 60), Session(draft, 2, 60)
    speculative, random = Speculative(*sessions, 3), torch.Generator()
    speculative.prefill(ids)
    for _ in range(12):
        length = sessions[0].length
        tokens = speculative.round(Sampling(), random)
        assert torch.equal(sessions[0].ids[:, length:], tokens)
    assert 0 < speculative.done.accepted < speculative.done.proposed, "nothing was shown"
    for session, cached in zip(sessions, (sessions[0].length - 1, sessions[0].length - 2), strict=True):
        cache = session.model.new_cache(2, 60)
        with torch.inference_mode():
            session.model(sessions[0].ids[:, :cached], cache)
        got, expected = (c.keys[:, :, :, :cached] for c in (session.state.cache, cache))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_to_the_bit_where_batches_change_nothing():
    """Even where rounding decides: all rows of the output projection are one, up to the last bit of each weight."""
    model, ids = tiny_llama(WIDE), tiny_ids(2, 9)
    row = model.lm_head.weight[:1].repeat(WIDE.vocab_size, 1)
    model.lm_head.weight.data = row.nextafter(torch.rand(row.shape, generator=torch.Generator().manual_seed(0)))
    equal = tiny_llama(WIDE)
    equal.load_state_dict(model.state_dict())
    with lowbit.batch_invariant():
        plain = generate(model, ids, 40).ids
        said = generate(model, ids, 40, draft=equal)
        assert torch.equal(said.ids, plain)
        assert said.speculation.accepted > 0
        assert torch.equal(generate(model, ids, 40, draft=tiny_llama(WIDE, seed=5)).ids, plain)
        assert plain[:, 9:].unique().numel() > 3, "nothing was shown"


def test_ends_and_streams_are_those_of_the_target():
    model, ids = tiny_llama(WIDE), tiny_ids(3, 9)
    draft, free = quantized(model), generate(model, ids, 30).ids
    seen = []
    for row, place in ((0, 15), (1, 20), (2, 10)):
        ends = (int(free[row, place]),)
        expected = generate(model, ids, 30, eos_ids=ends)
        said = generate(model, ids, 30, eos_ids=ends, draft=draft, on_token=seen.append)
        assert torch.equal(said.ids, expected.ids)
        assert said.new_tokens == expected.new_tokens
        assert torch.equal(torch.stack(seen, dim=1), said.ids[:, 9:])
        seen.clear()


def test_where_the_context_ends_the_target_goes_on_alone():
    model, ids = tiny_llama(WIDE), tiny_ids(1, 9)
    short = tiny_llama(replace(WIDE, max_positions=24), seed=5)
    said = generate(model, ids, 40, draft=short, draft_tokens=3)
    assert torch.equal(said.ids, generate(model, ids, 40).ids)
    assert said.speculation.single >= 40 - 24 + 9


# Draws -------------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean."""
    expected = p.double() * counts.sum()
    assert float(expected.min()) > 5, "too few draws for the statistic"
    degrees = p.numel() - 1
    return float(((counts - expected).square() / expected).sum() - degrees) / (2 * degrees) ** 0.5


def chains(words: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Two models that look at one token: `P[a, b]`, how likely b is behind a. Some tokens are impossible to one."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(words, words, generator=g) + 0.05 for _ in range(2))
    q[1, 2] = 0
    return p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)


def test_accepted_draws_have_the_distribution_of_the_target():
    """All of three tokens together, where the draft's distribution is far from it."""
    p, q = chains()
    words, n, random = len(p), 200_000, torch.Generator().manual_seed(1)
    before = [torch.zeros(n, dtype=torch.long)]
    for _ in range(2):
        before.append(draw(q[before[-1]], random))
    proposed = torch.stack(before[1:], dim=1)
    there = torch.stack([p[x] for x in before], dim=1)
    tokens, accepted = accept_drawn(proposed, there, torch.stack([q[x] for x in before[:2]], dim=1), random)
    for i in (1, 2):  # what a round did not bring, the target draws itself
        tokens[:, i] = torch.where(accepted < i, draw(p[tokens[:, i - 1]], random), tokens[:, i])
    joint = p[0][:, None, None] * p[:, :, None] * p[None]
    found = torch.bincount(tokens[:, 0] * words**2 + tokens[:, 1] * words + tokens[:, 2], minlength=words**3)
    assert abs(chi_square(found, joint.flatten())) < 4
    assert chi_square(found, (q[0][:, None, None] * p[:, :, None] * p[None]).flatten() + 1e-3) > 100, "it sees nothing"
    # Theorem 3.5: a proposal is accepted with probability sum(min(p, q)).
    rate = float(torch.minimum(p[0], q[0]).sum())
    assert float((accepted > 0).float().mean()) == pytest.approx(rate, abs=0.005)


def test_equal_distributions_are_accepted_and_impossible_tokens_are_not():
    p = torch.tensor([[0.25, 0.75, 0.0]]).expand(1000, 3, 3)
    proposed = torch.tensor([0, 1]).expand(1000, 2)
    random = torch.Generator().manual_seed(0)
    assert accept_drawn(proposed, p, p[:, :2], random)[1].tolist() == [2] * 1000
    q = torch.tensor([0.25, 0.25, 0.5]).expand(1000, 2, 3)
    tokens, accepted = accept_drawn(torch.full((1000, 2), 2), p, q, random)
    assert accepted.tolist() == [0] * 1000
    assert tokens[:, 0].tolist() == [1] * 1000, "all that p has more than q is token 1"


def test_what_is_most_likely_is_accepted_up_to_the_first_other():
    chosen = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    proposed = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    assert accept_most_likely(proposed, chosen).tolist() == [3, 1, 0]


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 4, "top_p": 0.9}])
def test_generated_draws_have_the_distribution_of_the_target(settings):
    """All of three tokens together, with two models, their caches, and several sequences at once."""
    model, draft, joint = *tiny_pair(), torch.zeros(5, 5, 5)
    prompt, sampling = torch.tensor([[1, 4, 2]]), Sampling(**settings)
    for a, b in itertools.product(range(5), range(5)):
        p = sampling.probabilities(model(torch.cat((prompt, torch.tensor([[a, b]])), dim=1)))[0, 2:]
        joint[a, b] = p[0, a] * p[1, b] * p[2]
    counts, accepted = torch.zeros(125), 0
    for seed in range(1500):
        said = generate(model, prompt.repeat(4, 1), 3, draft=draft, draft_tokens=2, seed=seed, **settings)
        new = said.ids[:, 3:]
        counts += torch.bincount(new[:, 0] * 25 + new[:, 1] * 5 + new[:, 2], minlength=125)
        accepted += said.speculation.accepted
    assert 0.2 < accepted / 3000 < 0.8, "nothing was shown"
    joint = joint.flatten()
    assert not counts[joint == 0].any()
    often = joint > 0.002
    counts, joint = (torch.cat((x[often], x[~often].sum()[None])) for x in (counts, joint))
    assert abs(chi_square(counts[joint > 0], joint[joint > 0])) < 4


def tiny_pair() -> tuple[Llama, Llama]:
    """A model of five tokens, and one that is near."""
    small = replace(CONFIG, vocab_size=5, num_layers=1)
    model, draft, other = tiny_llama(small), tiny_llama(small), tiny_llama(small, seed=5)
    model.lm_head.weight.data *= 0.3
    for name, p in draft.named_parameters():
        p.data.copy_(0.9 * model.get_parameter(name) + 0.1 * other.get_parameter(name))
    return model, draft


def test_a_seed_repeats_a_draw():
    model, ids = tiny_llama(WIDE), tiny_ids(2, 9)
    draft = quantized(model)
    draws = [generate(model, ids, 20, temperature=1.5, seed=s, draft=draft).ids for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    warm = generate(model, ids, 20, temperature=1.5, draft=draft, warmup=True)
    assert torch.equal(warm.ids, draws[0])


# Errors ------------------------------------------------------------------------------------------


def test_errors():
    model, ids = tiny_llama(WIDE), tiny_ids(1, 9)
    with pytest.raises(ValueError, match="a draft proposes 1 to 15 tokens at a time, got 16"):
        generate(model, ids, 2, draft=tiny_llama(WIDE), draft_tokens=16)
    with pytest.raises(ValueError, match="a vocabulary of 97 tokens and the draft one of 96"):
        generate(model, ids, 2, draft=tiny_llama(replace(WIDE, vocab_size=96)))
    with pytest.raises(ValueError, match="no draft of itself"):
        generate(model, ids, 2, draft=model)
    with pytest.raises(ValueError, match="9 prompt tokens are more than the draft's context of 8"):
        generate(model, ids, 2, draft=tiny_llama(replace(WIDE, max_positions=8)))
    with pytest.raises(ValueError, match="the model is on cpu, its draft on meta"):
        generate(model, ids, 2, draft=tiny_llama(WIDE).to("meta"))
    with pytest.raises(ValueError, match="2 sequences and the draft 1"):
        Speculative(Session(model, 2, 20), Session(other := tiny_llama(WIDE), 1, 20), 2)
    del other
