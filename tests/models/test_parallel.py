"""A model on two gloo ranks says what it says on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from parallel_ranks import TINY, WORLD, made, run_rank

from lowbit.models import parallelize_


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        notes = json.loads((tmp_path / f"rank{rank}.json").read_text())
        failed = {name: note for name, note in notes.items() if note != "passed"}
        assert not failed, f"rank {rank}: " + "\n".join(f"{name}\n{note}" for name, note in failed.items())
        assert len(notes) == 13


def test_without_ranks_it_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="there is no process group; start with torchrun"):
        parallelize_(made(TINY, "", fused=False))
