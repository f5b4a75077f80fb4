"""Speculative decoding on the GPU: graphs, the target's text, one wait per round."""

from __future__ import annotations

import warnings

import pytest
import torch
from gpu_cases import SMALL, VARIANTS, made, prompts

import lowbit
from lowbit.models import Llama, Sampling
from lowbit.models.session import Session, forget_session
from lowbit.models.speculative import Speculative
from lowbit.tools.generate import generate

hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="batch_invariant needs Hopper"
)


def copy_of(model: Llama, spec: str) -> Llama:
    copy = made(model.config, None, model.model.norm.weight.dtype)
    copy.load_state_dict(model.state_dict())
    lowbit.quantize_(copy, spec)
    return copy


@pytest.mark.parametrize("spec", [None, "int4wo-128", "int8wo", "float8dq-row"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_of_reading_says_what_eager_reading_says(variant: str, spec: str | None) -> None:
    model = made(VARIANTS[variant], spec)
    graph, eager = Session(model, 1, 512), Session(model, 1, 512, graph=False)
    for tokens in (2, 5, 16):
        graph.capture_read(tokens)
    for session in (graph, eager):
        session.prefill(prompts(1, 40))
    for tokens, at in ((5, 40), (2, 44), (16, 45), (16, 3), (5, 0)):
        ids = prompts(1, tokens, seed=at)
        assert torch.equal(graph.read(ids, at), eager.read(ids, at))
        assert torch.equal(graph.step(), eager.step())
        assert torch.equal(graph.ids, eager.ids)


@pytest.mark.parametrize("tokens", [1, 4, 15])
def test_the_text_is_that_of_the_target(tokens: int) -> None:
    """In fp32, where rounding decides nothing."""
    model = made(SMALL, None, torch.float32)
    ids = prompts(2, 19)
    plain = generate(model, ids, 100).ids
    for spec in ("int8wo", "int4wo-32"):
        said = generate(model, ids, 100, draft=copy_of(model, spec), draft_tokens=tokens)
        assert torch.equal(said.ids, plain)
        assert said.speculation is not None
        assert said.speculation.accepted > 0
        assert said.graph_bytes > 0


@hopper
@pytest.mark.parametrize("spec", [None, "int8wo", "int4wo-128", "nf4wo-64"])
def test_to_the_bit_where_batches_change_nothing(spec: str | None) -> None:
    """In bf16, whose logits often are equal: the pass over several tokens is so many steps."""
    plain = made(SMALL, None)
    model = plain if spec is None else copy_of(plain, spec)
    draft, ids = copy_of(plain, "int4wo-32"), prompts(2, 19)
    with lowbit.batch_invariant():
        session = Session(model, 2, 256)
        session.capture_read(5)
        session.prefill(ids)
        steps = torch.stack([session.step().clone() for _ in range(5)], dim=1)
        assert torch.equal(session.read(session.ids[:, 19:24], 19), steps)
        text = generate(model, ids, 200).ids
        assert torch.equal(generate(model, ids, 200, draft=draft).ids, text)
    forget_session(model)


def test_a_session_of_one_kind_is_not_taken_for_the_other() -> None:
    model, ids = made(SMALL, "int8wo"), prompts(1, 19)
    free = generate(model, ids, 60).ids
    with lowbit.batch_invariant():
        generate(model, ids, 60)
    assert torch.equal(generate(model, ids, 60).ids, free)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round_waits_once(temperature: float) -> None:
    model = made(SMALL, "int8wo")
    draft, ids = made(SMALL, "int4wo-128"), prompts(1, 20)
    sessions = Session(model, 1, 256), Session(draft, 1, 256)
    speculative, sampling = Speculative(*sessions, 4), Sampling(temperature, 50, 0.9)
    random = torch.Generator("cuda").manual_seed(0)
    speculative.prefill(ids)
    speculative.round(sampling, random)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for _ in range(5):
                speculative.round(sampling, random)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in waits if "called a synchronizing" in str(w.message)]
    assert len(waits) == 5


def test_a_seed_repeats_a_draw() -> None:
    model = made(SMALL, "int8wo")
    draft, ids = made(SMALL, "int4wo-128"), prompts(2, 9)
    draws = [generate(model, ids, 40, temperature=1.0, seed=seed, draft=draft).ids for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
