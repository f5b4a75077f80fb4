"""A model on two gloo ranks says what it says on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from parallel_ranks import TINY, WORLD, made, rank_main
from ranks import assert_passed

from lowbit.models import parallelize_


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=WORLD)
    assert_passed(tmp_path, WORLD, 14)


def test_without_ranks_it_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="there is no process group; start with torchrun"):
        parallelize_(made(TINY, "", fused=False))
