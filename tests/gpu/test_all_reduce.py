"""What GPUs exchange: several ranks on one GPU with a stream each, and two processes on two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from gpu_ranks import WORLD, rank_main
from ranks import assert_passed
from torch import Tensor

from lowbit import decoder_ops
from lowbit.kernels.cuda.all_reduce import AllReduce, memory_bytes


class Together:
    """Ranks of one process. What they call runs at the same time, as it would on GPUs of their own.

    Attributes:
        most: rows whose blocks fit the GPU for all ranks at once: a rank whose blocks find no place sends nothing.
    """

    def __init__(self, world: int, width: int, most: int = 1000) -> None:
        self.most, self.width = most, width
        device = torch.device("cuda", torch.cuda.current_device())
        self.memory = [torch.zeros(memory_bytes(width, world), dtype=torch.uint8, device=device) for _ in range(world)]
        at = [t.data_ptr() for t in self.memory]
        self.ranks = [AllReduce(rank, at, width, device) for rank in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]

    def each(self, call: Callable[[AllReduce, int], object]) -> list[object]:
        torch.cuda.synchronize()
        results = []
        for i, (rank, stream) in enumerate(zip(self.ranks, self.streams, strict=True)):
            with torch.cuda.stream(stream):
                results.append(call(rank, i))
        torch.cuda.synchronize()
        return results


def whole_numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small enough that every sum of them is exact."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=g).to(dtype).cuda()


@pytest.fixture(params=[(2, 4096), (2, 576), (3, 5120), (4, 16384, 32), (4, 2048)], ids=str)
def together(request: pytest.FixtureRequest) -> Together:
    return Together(*request.param)


each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_dtype
@pytest.mark.parametrize("tokens", [1, 16, 130, 300])
def test_sums(together: Together, tokens: int, dtype: torch.dtype) -> None:
    """Again and again, with others between: no call may find what was left by one before."""
    for i in range(20):
        rows = min(tokens, together.most) if i % 3 else 1
        given = [whole_numbers(rows, together.width, dtype=dtype, seed=100 * i + j) for j in range(len(together.ranks))]
        exact = torch.stack(given).float().sum(0).to(dtype)
        for got in together.each(lambda rank, j, given=given: rank.add_up(given[j])):
            assert torch.equal(got, exact)


@each_dtype
@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_sums_and_norm(together: Together, tokens: int, dtype: torch.dtype) -> None:
    tokens, width = min(tokens, together.most), together.width
    g = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(n, width, generator=g).to(dtype).cuda() for n in (tokens, 1))
    given = [whole_numbers(tokens, width, dtype=dtype, seed=j) for j in range(len(together.ranks))]
    total, normed = decoder_ops.add_rms_norm(x, torch.stack(given).float().sum(0).to(dtype), weight[0], 1e-5)
    results = together.each(lambda rank, j: rank.add_rms_norm(x, given[j], weight[0], 1e-5))
    for got_total, got_normed in results:
        assert torch.equal(got_total, total)
        torch.testing.assert_close(got_normed.float(), normed.float(), rtol=2**-7, atol=1e-3)
        assert torch.equal(got_normed, results[0][1]), "every rank has the same bits"


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("columns", [8, 160, 64128])
def test_parts_side_by_side(together: Together, tokens: int, columns: int) -> None:
    tokens = min(tokens, max(1, together.most * together.width // columns))
    given = [whole_numbers(tokens, columns, dtype=torch.bfloat16, seed=j) for j in range(len(together.ranks))]
    for _ in range(3):
        for got in together.each(lambda rank, j: rank.gather(given[j])):
            assert torch.equal(got, torch.cat(given, dim=-1))


def test_what_it_does_not_take() -> None:
    rank = Together(2, 64).ranks[0]
    y = torch.zeros(4, 64, dtype=torch.bfloat16, device="cuda")
    assert rank.takes(y)
    assert not rank.takes(y.float())
    assert not rank.takes(y[:, 4:])
    assert not rank.takes(y[:, :60].contiguous())
    assert not rank.takes(y[:0])
    assert not rank.takes(y.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=WORLD)
    assert_passed(tmp_path, WORLD, 5)
