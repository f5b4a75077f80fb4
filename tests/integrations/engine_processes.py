"""Programs beside the tests: engines keep their state in globals, and do not live with warnings as errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(program: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    path = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "VLLM_CPU_KVCACHE_SPACE": "1"} | environment
    return subprocess.Popen(
        [sys.executable, str(HERE / program), *args], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=800)
    assert process.returncode == 0, out[-4000:]
    return out


@cache
def notes(engine: str, world: int, directory: Path) -> list[dict[str, Any]]:
    """What each rank of `<engine>_ranks.py` found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    out = directory / f"of{world}"
    ranks = [run(f"{engine}_ranks.py", str(out), str(world), str(rank), address) for rank in range(world)]
    for process in ranks:
        finish(process)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world)]
