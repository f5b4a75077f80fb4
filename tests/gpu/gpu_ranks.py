"""What each of two processes with a GPU of its own does in test_all_reduce.py."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.distributed as dist
from cases import sqnr_db
from ranks import run_rank

from lowbit import decoder_ops
from lowbit.kernels.cuda.all_reduce import AllReduce, connect
from lowbit.models import LlamaConfig, Session, parallelize_, random_model
from lowbit.tools.bench_linear import parse_scheme

WORLD = 2
SMALL = LlamaConfig(
    vocab_size=2048, hidden_size=1024, intermediate_size=2048, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=128,
    max_positions=1024, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip


def connected() -> AllReduce:
    found = connect(dist.group.WORLD, SMALL.hidden_size, torch.device("cuda", dist.get_rank()))
    assert isinstance(found, AllReduce), found
    assert connect(dist.group.WORLD, SMALL.hidden_size, found.device) is found
    return found


def drawn(tokens: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed * WORLD + dist.get_rank())
    return torch.randn(tokens, SMALL.hidden_size, generator=g).bfloat16().cuda()


def the_same_as_the_group() -> None:
    """Of two terms there is one sum, to the bit."""
    direct = connected()
    for seed in range(200):
        y = drawn((1, 16, 129, 1000)[seed % 4], seed)
        expected = y.clone()
        dist.all_reduce(expected)
        parts = [torch.empty_like(y) for _ in range(WORLD)]
        dist.all_gather(parts, y)
        assert torch.equal(direct.gather(y), torch.cat(parts, dim=-1))
        assert torch.equal(direct.add_up(y), expected)


def in_a_graph() -> None:
    """Replays in a row, on both sides at their own pace."""
    direct = connected()
    x, weight = drawn(3, 0) * 0 + 1, torch.ones(SMALL.hidden_size, dtype=torch.bfloat16, device="cuda")
    y, out = drawn(3, 1), torch.empty(3, SMALL.hidden_size, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        total, normed = direct.add_rms_norm(x, y, weight, 1e-5)
        y.copy_(normed - x * (1 + dist.get_rank()) / 4)
        out.copy_(total)

    first = y.clone()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    y.copy_(first)
    mine = first.clone()
    for _ in range(500):
        graph.replay()
    got = out.clone(), y.clone()
    for _ in range(500):
        summed = mine.clone()
        dist.all_reduce(summed)
        total, normed = direct.add_rms_norm(x, mine, weight, 1e-5)
        assert torch.equal(total, x + summed)
        mine = normed - x * (1 + dist.get_rank()) / 4
    assert torch.equal(got[0], total)
    assert torch.equal(got[1], mine)


def a_model_says_what_it_says_on_one(scheme: str, least_db: float) -> None:
    device = torch.device("cuda", dist.get_rank())
    whole = random_model(SMALL, parse_scheme(scheme) if scheme else None, device).model
    part = parallelize_(copy.deepcopy(whole))
    assert part.ranks is not None
    assert isinstance(part.ranks.direct, AllReduce), part.ranks.direct
    for batch in (1, 3):
        ids = torch.randint(SMALL.vocab_size, (batch, 20), generator=torch.Generator().manual_seed(1)).to(device)
        sessions = [Session(model, batch, 64) for model in (whole, part)]
        expected, got = (session.prefill(ids) for session in sessions)
        assert sqnr_db(expected.float().cpu(), got.float().cpu()) > least_db
        for _ in range(20):
            # Of nearly equal logits, both have to take the same.
            sessions[1].put(sessions[0].token)
            expected, got = (session.step() for session in sessions)
            assert sqnr_db(expected.float().cpu(), got.float().cpu()) > least_db
            everyone = [torch.empty_like(got) for _ in range(WORLD)]
            dist.all_gather(everyone, got)
            assert torch.equal(*everyone), "the ranks have the same logits"


def norms_are_those_of_one_gpu() -> None:
    direct = connected()
    x, weight = torch.ones(5, SMALL.hidden_size, device="cuda").bfloat16(), drawn(1, 9)[0].abs()
    y = drawn(5, 3)
    summed = y.clone()
    dist.all_reduce(summed)
    total, normed = direct.add_rms_norm(x, y, weight, 1e-5)
    expected_total, expected = decoder_ops.add_rms_norm(x, summed, weight, 1e-5)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed.float(), expected.float(), rtol=2**-7, atol=1e-3)


def rank_main(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    checks = {f.__name__: f for f in (the_same_as_the_group, norms_are_those_of_one_gpu, in_a_graph)}
    # Activations that are quantized have scales of their own on every rank.
    for scheme, least_db in (("int4:g128", 30), ("float8_e4m3:row+float8_e4m3:row", 18)):
        checks[scheme] = partial(a_model_says_what_it_says_on_one, scheme, least_db)
    run_rank(rank, WORLD, folder, checks, "cpu:gloo,cuda:nccl")
