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


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_reading_gives_the_logits_of_steps(at, tokens):
    """Whatever was in the cache from there on is gone; steps go on behind."""
    model, ids, other = tiny_llama(dtype=torch.float64), tiny_ids(3, 9), tiny_ids(3, 20, seed=7)
    session = Session(model, 3, 30)
    session.prefill(ids)
    for _ in range(4):
        session.step()
    read = other[:, :tokens]
    logits = session.read(read, at)
    whole = torch.cat((session.ids[:, :at], read), dim=1)
    torch.testing.assert_close(logits, model(whole)[:, at:], rtol=1e-9, atol=1e-9)
    assert session.length == at + tokens + 1
    session.step()
    assert torch.equal(session.ids, recomputed(model, whole, 2))


def test_going_back():
    model, ids = tiny_llama(), tiny_ids(2, 5)
    session = Session(model, 2, 20)
    session.prefill(ids)
    session.read(torch.cat((session.token[:, None], tiny_ids(2, 4, seed=3)), dim=1), 5)
    session.rewind(8, torch.tensor([7, 8]))
    kept = torch.cat((session.ids[:, :7], torch.tensor([[7], [8]])), dim=1)
    assert torch.equal(session.ids, kept)
    session.step()
    assert torch.equal(session.ids, recomputed(model, kept, 1))


@pytest.mark.parametrize("batch", [1, 3])
def test_where_batches_change_nothing_reading_is_steps_to_the_bit(batch):
    """And elsewhere it is not: the two sum in different orders."""
    model, ids = tiny_llama(replace(CONFIG, hidden_size=512, intermediate_size=1024, head_dim=64)), tiny_ids(batch, 9)
    different = False
    for invariant in (True, False):
        with lowbit.batch_invariant() if invariant else contextlib.nullcontext():
            session = Session(model, batch, 30)
            session.prefill(ids)
            steps = torch.stack([session.step().clone() for _ in range(5)], dim=1)
            cache = session.state.cache.keys.clone()
            logits = session.read(session.ids[:, 9:14], 9)
            if invariant:
                assert torch.equal(logits, steps)
                assert torch.equal(session.state.cache.keys, cache)
            else:
                different = not torch.equal(logits, steps)
    assert different, "nothing was shown"


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
    with pytest.raises(ValueError, match=r"tokens to read must be \(2, tokens\) with at least one token, got \(2, 0\)"):
        session.read(tiny_ids(2, 0), 1)
    with pytest.raises(ValueError, match="12 tokens do not fit into a cache of 10"):
        session.read(tiny_ids(2, 3), 9)
    with pytest.raises(ValueError, match="no token at -1, 10 are there"):
        session.read(tiny_ids(2, 1), -1)
    with pytest.raises(ValueError, match="goes back to 2 to 10 tokens, which are there, not to 11"):
        session.rewind(11, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="reads at most 16 tokens at once, got 17"):
        Session(model, 2, 30).read(tiny_ids(2, 17), 0)
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
    session.capture_read(3)
    session.prefill(tiny_ids(2, 9))
    logits = session.read(tiny_ids(2, 3, seed=5), 4).clone()
    plain = Session(model, 2, 24)
    plain.prefill(tiny_ids(2, 9))
    assert torch.equal(logits, plain.read(tiny_ids(2, 3, seed=5), 4))
    assert torch.equal(session.ids, plain.ids)
    assert len(Graph.made) == 3
    for seed, tokens in ((1, 9), (2, 5), (3, 9)):
        ids = tiny_ids(2, tokens, seed)
        session.prefill(ids)
        for _ in range(6):
            session.step()
        assert torch.equal(session.ids, recomputed(model, ids, 7))
    assert len(Graph.made) == 3


def test_on_a_cpu_nothing_is_kept():
    model = tiny_llama()
    assert session_for(model, 1, 10).capacity == 10
    assert session_for(model, 1, 10) is not session_for(model, 1, 10)
    forget_session(model)


def test_a_fingerprint_tells_whether_weights_have_moved():
    model = tiny_llama(replace(CONFIG, hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16))
    first = fingerprint(model)
    assert fingerprint(model) == first
    with lowbit.batch_invariant():
        assert fingerprint(model) != first
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
