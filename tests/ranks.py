"""Checks that run on several ranks: every rank notes what happened to each, and the test reads the notes."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def run_rank(
    rank: int, world: int, folder: str, checks: Mapping[str, Callable[[], object]], backend: str = "gloo"
) -> None:
    """What a process does that has become rank `rank` of `world`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    notes: dict[str, str] = {}
    for name, run in checks.items():
        try:
            run()
            notes[name] = "passed"
        except (Exception, pytest.fail.Exception):
            notes[name] = traceback.format_exc()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(notes))
    dist.barrier()
    dist.destroy_process_group()


def assert_passed(folder: Path, world: int, checks: int) -> None:
    """Every rank has noted so many checks, and all of them passed."""
    for rank in range(world):
        notes = json.loads((folder / f"rank{rank}.json").read_text())
        assert len(notes) == checks
        failed = {name: note for name, note in notes.items() if note != "passed"}
        assert not failed, f"rank {rank}: {len(failed)} of {len(notes)} failed\n" + "\n".join(
            f"{name}\n{note}" for name, note in failed.items()
        )
