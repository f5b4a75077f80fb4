"""Sessions: the tokens they choose, what they keep, when they are made anew."""

import gc
from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

import lowbit
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
