"""Sessions: the tokens they choose, what they keep, when they are made anew."""

import contextlib
import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

import lowbit
from lowbit.models import session as session_module
from lowbit.models.session import Session, fingerprint, forget_session, session_for


def recomputed(model, ids, steps):
    """Greedy continuation without a cache."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("tokens", [1, 9])
def test_steps_choose_the_most_likely_token(tokens):
    model, ids = tiny_llama(), tiny_ids(3, tokens)
    session = Session(model, 3, 20)
    assert torch.equal(session.prefill(ids).argmax(-1), session.token)
    assert session.length == tokens + 1
    for _ in range(8):
        logits = session.step()
        assert torch.equal(logits.argmax(-1), session.token)
    assert torch.equal(session.ids, recomputed(model, ids, 9))
    assert torch.equal(session.state.positions, torch.full((3,), session.length - 1, dtype=torch.int32))


def test_a_session_begins_anew():
    model = tiny_llama()
    session = Session(model, 2, 20)
    for seed, tokens in ((1, 12), (2, 5), (3, 1)):
        ids = tiny_ids(2, tokens, seed)
        session.prefill(ids)
        for _ in range(4):
            session.step()
        assert torch.equal(session.ids, recomputed(model, ids, 5))


def test_a_token_can_be_replaced():
    model, ids = tiny_llama(), tiny_ids(2, 5)
    session = Session(model, 2, 20)
    session.prefill(ids)
    session.put(torch.tensor([7, 8]))
    session.step()
    forced = torch.cat((ids, torch.tensor([[7], [8]])), dim=1)
    assert torch.equal(session.ids, recomputed(model, forced, 1))


def test_what_it_keeps():
    session = Session(tiny_llama(), 2, 20)
    half, groups = CONFIG.head_dim // 2, CONFIG.num_kv_heads
    small = 2 * 21 * 8 + 2 * 8 + 2 * 4 + 2 * 20 * half * 4 + 2 * groups * 4
    assert session.state.nbytes == session.state.cache.nbytes + small
    assert (session.uses_graph, session.graph_bytes, session.capture_seconds) == (False, 0, 0)


def test_errors():
    model = tiny_llama()
    session = Session(model, 2, 10)
    with pytest.raises(ValueError, match="give it a prompt first"):
        session.step()
    with pytest.raises(ValueError, match=r"prompts must be \(2, tokens\) with at least one token, got \(1, 4\)"):
        session.prefill(tiny_ids(1, 4))
    with pytest.raises(ValueError, match=r"got \(2, 0\)"):
        session.prefill(tiny_ids(2, 0))
    with pytest.raises(ValueError, match="11 tokens do not fit into a cache of 10"):
        session.prefill(tiny_ids(2, 11))
    session.prefill(tiny_ids(2, 9))
    session.step()
    with pytest.raises(ValueError, match="11 tokens do not fit into a cache of 10"):
        session.step()
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA GPU and Triton, the model is on cpu"):
        Session(model, 2, 10, graph=True)
    with pytest.raises(ValueError, match="1 to 64 positions"):
        Session(model, 1, 65)


class Graph:
    """Stands for a CUDA graph: what was captured runs again, into the same result."""

    made: ClassVar[list["Graph"]] = []

    def __init__(self):
        Graph.made.append(self)

    def replay(self):
        self.result.copy_(self.run())


@pytest.fixture
def graphs(monkeypatch):
    """Sessions that believe in CUDA; `run` is known to the graph that is being captured."""
    anything = SimpleNamespace(wait_stream=lambda stream: None)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("Stream", "current_stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: anything)
    reserved = iter(range(100, 10000, 7))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(reserved))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    real = session_module._Graph.__init__

    def init(self, run, reset, device):
        real(self, run, reset, device)
        self.graph.run, self.graph.result = run, self.result

    monkeypatch.setattr(session_module._Graph, "__init__", init)
    Graph.made.clear()


@torch.inference_mode()
def test_graphs_are_captured_once_and_counted(graphs):
    model = tiny_llama()
    session = Session(model, 2, 24)
    session._step = session._captured(session._run_step)
    assert session.uses_graph
    assert session.graph_bytes == 7
    session.capture_prompt(9)
    session.capture_prompt(9)
    assert len(Graph.made) == 2
    assert session.graph_bytes == 14
    for seed, tokens in ((1, 9), (2, 5), (3, 9)):
        ids = tiny_ids(2, tokens, seed)
        session.prefill(ids)
        for _ in range(6):
            session.step()
        assert torch.equal(session.ids, recomputed(model, ids, 7))
    assert len(Graph.made) == 2


def test_on_a_cpu_nothing_is_kept():
    model = tiny_llama()
    assert session_for(model, 1, 10).capacity == 10
    assert session_for(model, 1, 10) is not session_for(model, 1, 10)
    forget_session(model)


def test_a_fingerprint_tells_whether_weights_have_moved():
    model = tiny_llama(replace(CONFIG, hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16))
    first = fingerprint(model)
    assert fingerprint(model) == first
    lowbit.quantize_(model, "int8wo")
    second = fingerprint(model)
    assert second != first
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone(), requires_grad=False)
    assert fingerprint(model) != second


def test_a_session_does_not_keep_its_model():
    model = tiny_llama()
    session = Session(model, 1, 10)
    del model
    gc.collect()
    with pytest.raises(AssertionError, match="gone"):
        session.prefill(tiny_ids(1, 3))
