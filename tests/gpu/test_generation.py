"""Generation on the GPU: graphs say what eager steps say, nothing waits, memory is what it should be."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from gpu_cases import SMALL, VARIANTS, made, prompts

import lowbit
from lowbit.models.random import random_model
from lowbit.models.sampling import Sampling, draw
from lowbit.models.session import Session, forget_session, session_for
from lowbit.models.shapes import SHAPES
from lowbit.specs import parse_config
from lowbit.tools.generate import generate

MIB = 1 << 20
CONFIGS = (None, "int4wo-128", "int8wo", "float8wo", "nf4wo-64", "int8dq", "float8dq-row")


@pytest.mark.parametrize("spec", CONFIGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_says_what_eager_steps_say(variant: str, spec: str | None) -> None:
    """For one sequence to the bit, over several prompts and lengths, with prompts as graphs too."""
    model = made(VARIANTS[variant], spec)
    graph, eager = Session(model, 1, 512), Session(model, 1, 512, graph=False)
    assert (graph.uses_graph, eager.uses_graph) == (True, False)
    graph.capture_prompt(33)
    for tokens in (33, 7, 1, 33, 300):
        ids = prompts(1, tokens, seed=tokens)
        assert torch.equal(graph.prefill(ids), eager.prefill(ids))
        for _ in range(60):
            assert torch.equal(graph.step(), eager.step())
        assert torch.equal(graph.ids, eager.ids)


@pytest.mark.parametrize("spec", ["int4wo-128", "int8wo"])
def test_several_sequences(spec: str) -> None:
    model = made(SMALL, spec)
    graph, eager = Session(model, 3, 256), Session(model, 3, 256, graph=False)
    ids = prompts(3, 20)
    graph.prefill(ids)
    eager.prefill(ids)
    for _ in range(40):
        assert torch.equal(graph.step(), eager.step())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_text_is_that_of_the_cpu(variant: str) -> None:
    model = made(VARIANTS[variant], None, torch.float32)
    ids = prompts(2, 19)
    on_gpu = generate(model, ids, 48).ids.cpu()
    forget_session(model)
    assert torch.equal(on_gpu, generate(model.cpu(), ids.cpu(), 48).ids)


def test_logits_are_as_exact_as_those_of_the_plain_model() -> None:
    model = made(SMALL, None)
    exact = deepcopy(model).double()
    session, ids = Session(model, 2, 256), prompts(2, 40)
    cache, exact_cache = model.new_cache(2, 256), exact.new_cache(2, 256)
    errors = []
    for i in range(20):
        got = session.prefill(ids) if i == 0 else session.step()
        part, at = (ids, 0) if i == 0 else (session.ids[:, -2:-1], 39 + i)
        with torch.inference_mode():
            plain = model(part, cache, at, last_only=True)[:, -1]
            expected = exact(part, exact_cache, at, last_only=True)[:, -1]
        errors.append([float((y.double() - expected).norm() / expected.norm()) for y in (got, plain)])
    ours, plains = map(sum, zip(*errors, strict=True))
    assert ours < 1.1 * plains, errors


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu() -> None:
    """Greedy steps and sampled ones are queued without a look at the result."""
    model = made(SMALL, "int4wo-128")
    session = Session(model, 2, 256)
    session.prefill(prompts(2, 20))
    random = torch.Generator("cuda").manual_seed(0)
    logits = session.step()
    sampling = Sampling(0.8, 50, 0.9)
    draw(sampling.probabilities(logits), random)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(5):
            logits = session.step()
        with torch.inference_mode():
            for _ in range(5):
                session.put(draw(sampling.probabilities(logits), random))
                logits = session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert session.length == 20 + 1 + 1 + 10


def test_a_seed_repeats_a_draw_and_ends_are_seen() -> None:
    model, ids = made(SMALL, "int8wo"), prompts(2, 9)
    draws = [generate(model, ids, 30, temperature=1.0, seed=seed).ids for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    free = generate(model, ids[:1], 30).ids
    end = int(free[0, 15])
    ended = generate(model, ids[:1], 30, eos_ids=(end,)).ids
    assert torch.equal(ended, free[:, : ended.shape[1]])
    assert int(ended[0, -1]) == end
    seen: list[torch.Tensor] = []
    said = generate(model, ids, 8, on_token=seen.append).ids
    assert torch.equal(torch.stack(seen, 1), said[:, 9:])


def test_sessions_are_kept_while_they_fit() -> None:
    model = made(SMALL, None)
    first = session_for(model, 1, 100)
    assert first.capacity == 256
    assert session_for(model, 1, 256) is first
    assert session_for(model, 2, 100) is not first
    second = session_for(model, 1, 300)
    assert second.capacity == 512
    lowbit.quantize_(model, "int8wo")
    third = session_for(model, 1, 300)
    assert third is not second, "its graph reads weights that are gone"
    ids = prompts(1, 12)
    assert torch.equal(generate(model, ids, 50).ids, generate(model, ids, 50).ids)
    assert session_for(model, 1, 62) is third
    assert generate(model, ids, 2).graph_bytes == third.graph_bytes > 0
    forget_session(model)
    assert session_for(model, 1, 300) is not third


@pytest.mark.parametrize("spec", ["int4wo-128", "float8wo", "nf4wo-64"])
def test_memory(spec: str) -> None:
    """Making a model takes the model and some rows; running it, its cache, its graphs and one workspace more."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(SHAPES["llama-3.2-1b"], parse_config(spec).scheme, "cuda").model
    torch.cuda.synchronize()
    size = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before - size <= 256 * MIB
    session = Session(model, 1, 512)
    session.prefill(prompts(1, 128))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    session.prefill(prompts(1, 128))
    for _ in range(8):
        session.step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - size - session.state.nbytes
    assert extra <= 128 * MIB, f"{extra / MIB:.0f} MiB beside weights and cache"
