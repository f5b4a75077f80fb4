"""Tensor parallelism and FSDP2 on two gloo ranks, for every registered format in one pair of processes.

Each rank notes what happened per format and check; the test then reads the notes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import FORMATS, sqnr_db, weights
from ranks import assert_passed, run_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format

WORLD = 2
HIDDEN = 512
CHECKS: dict[str, Callable[[Format], None]] = {}


def check(f: Callable[[Format], None]) -> Callable[[Format], None]:
    CHECKS[f.__name__] = f
    return f


@cache
def weight(fmt: Format, n: int, k: int, seed: int) -> QuantizedTensor:
    return QuantizedTensor.from_float(weights("normal", n, k, seed), fmt)


class MLP(nn.Module):
    def __init__(self, fmt: Format, k: int = 128, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(k, hidden), nn.Linear(hidden, k)
        for i, layer in enumerate((self.up, self.down)):
            layer.weight = nn.Parameter(weight(fmt, *layer.weight.shape, i).clone(), requires_grad=False)
            nn.init.constant_(layer.bias, 0.5 + i)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 128, generator=g), torch.randn(2, 3, 128, generator=g)]


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def close(expected: Tensor, got: Tensor) -> None:
    assert got.shape == expected.shape
    assert sqnr_db(expected, got) > 90, sqnr_db(expected, got)


@check
def tensor_parallel(fmt: Format) -> None:
    """Columns of the first layer, rows of the second, one all-reduce; or the named error of a cut inside a tile."""
    model = MLP(fmt)
    expected = [model(x) for x in inputs()]
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    sharded = copy.deepcopy(model)
    if HIDDEN // WORLD % fmt.tile[1]:
        with pytest.raises(ValueError, match=rf"cannot cut .*{fmt.spec} stores tiles of {fmt.tile[1]}"):
            parallelize_module(sharded, mesh(), plan, src_data_rank=None)
        plan.pop("down")
        sharded = copy.deepcopy(model)
        parallelize_module(sharded.up, mesh(), ColwiseParallel(), src_data_rank=None)
        part = sharded.up(inputs()[0])
        half = slice(dist.get_rank() * HIDDEN // WORLD, (dist.get_rank() + 1) * HIDDEN // WORLD)
        close(model.up(inputs()[0])[:, half], part)
        return
    parallelize_module(sharded, mesh(), plan, src_data_rank=None)
    local = sharded.up.weight.to_local()
    assert isinstance(local, QuantizedTensor)
    assert local.shape == (HIDDEN // WORLD, 128)
    assert sharded.down.weight.to_local().shape == (128, HIDDEN // WORLD)
    for x, y in zip(inputs(), expected, strict=True):
        close(y, sharded(x))


@check
def tensor_parallel_backward(fmt: Format) -> None:
    if HIDDEN // WORLD % fmt.tile[1]:
        return
    model = MLP(fmt)
    x = inputs()[0].requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh(), plan, src_data_rank=None)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    close(expected, got)


@check
def fsdp(fmt: Format) -> None:
    """Shards of rows, gathered for the forward; twice, since the second uses the buffers of the first."""
    model = MLP(fmt)
    expected = [model(x) for x in inputs()]
    if HIDDEN // WORLD % fmt.tile[0] or model.down.weight.shape[0] // WORLD % fmt.tile[0]:
        with pytest.raises(ValueError, match=rf"{fmt.spec} stores tiles of {fmt.tile[0]}"):
            fully_shard(model, mesh=mesh())
        model = MLP(fmt, k=256)
        g = torch.Generator().manual_seed(1)
        batches = [torch.randn(4, 256, generator=g)]
        expected = [model(x) for x in batches]
    else:
        batches = inputs()
    fully_shard(model.up, mesh=mesh())
    fully_shard(model, mesh=mesh())
    shard = model.up.weight.to_local()
    assert isinstance(shard, QuantizedTensor)
    assert shard.shape[0] == HIDDEN // WORLD
    assert shard.nbytes_packed < model.up.weight.numel() * fmt.bits_per_weight / 8 * 0.6 + 4096
    for _ in range(2):
        for x, y in zip(batches, expected, strict=True):
            with torch.no_grad():
                close(y, model(x))


@check
def fsdp_trains_what_is_not_quantized(fmt: Format) -> None:
    if fmt.tile[0] != 1:
        return
    model = MLP(fmt)
    fully_shard(model, mesh=mesh())
    model(inputs()[0]).square().sum().backward()
    assert model.up.bias.grad is not None
    assert model.up.weight.grad is None


def rank_main(rank: int, specs: list[str], folder: str) -> None:
    checks = {f"{spec} {name}": partial(run, parse_format(spec)) for spec in specs for name, run in CHECKS.items()}
    run_rank(rank, WORLD, folder, checks)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_every_format_on_two_ranks(tmp_path: Path) -> None:
    mp.spawn(rank_main, ([f.spec for f in FORMATS], str(tmp_path)), nprocs=WORLD)
    assert_passed(tmp_path, WORLD, len(FORMATS) * len(CHECKS))
