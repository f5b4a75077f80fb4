"""A process is killed at random points of quantize-and-save.

    python -m faults.kills CASES DIRECTORY

A program of its own, because it forks, which the threads of a test process forbid. It prints an `Outcome` as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from faults.outcome import Outcome
from faults.subjects import same_state
from lowbit.checkpoint import CheckpointError, read

SHARD = 60_000
TESTS = Path(__file__).resolve().parents[1]
SOURCE = str(Path(lowbit.__file__).parent)
#: What lies in the directory when the save begins.
BEFORE = ("nothing", "an older checkpoint", "a config.json")


def run(cases: int, directory: Path) -> Outcome:
    return run_program("faults.kills", cases, directory)


def run_program(module: str, cases: int, directory: Path) -> Outcome:
    """The outcome that a module prints as JSON."""
    path = os.pathsep.join((str(TESTS), str(Path(SOURCE).parent)))
    command = [sys.executable, "-m", module, str(cases), str(directory)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    return Outcome.from_json(json.loads(done.stdout))


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({f"layer{i}": nn.Linear(192, 192) for i in range(6)})


def quantize_and_save(directory: Path, seed: int = 1) -> None:
    """An older checkpoint is another model in another scheme, in more files."""
    model = model_of(seed)
    if seed == 1:
        lowbit.quantize_(model, {"_default": "int4wo-32", "re:layer[01]": "int8wo"})
        lowbit.save(model, directory, config={"model_type": "new"}, max_shard_bytes=SHARD)
    else:
        lowbit.quantize_(model, "int3wo-64")
        lowbit.save(model, directory, config={"model_type": "old"}, max_shard_bytes=SHARD // 3)


def prepare(directory: Path, before: str) -> None:
    directory.mkdir(parents=True)
    if before == "an older checkpoint":
        quantize_and_save(directory, seed=0)
    elif before == "a config.json":
        (directory / "config.json").write_text('{"model_type": "mine"}\n')


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


# Where it is killed ---------------------------------------------------------------------------------------------------


class Lines:
    """Counts the lines of lowbit that run, in all files or in those named, and kills the process at one of them."""

    def __init__(self, kill_at: int = 0, files: tuple[str, ...] = ("",)) -> None:
        self.count, self.kill_at = 0, kill_at
        self.files = tuple(os.path.join(SOURCE, file) for file in files)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def killed_at_line(work: Callable[[], object], lines: Lines) -> bool:
    def child() -> None:
        sys.settrace(lines)
        work()

    return was_killed(forked(child))


def killed_after(work: Callable[[], object], seconds: float) -> bool:
    process = forked(work)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return was_killed(process)


def forked(work: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def was_killed(process: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


# What is left ---------------------------------------------------------------------------------------------------------


def wrong(directory: Path, allowed: list[dict[str, Tensor]], new: dict[str, bytes], outcome: Outcome) -> str | None:
    left = sorted(contents(directory))
    for verify in (True, False):
        try:
            got = read(directory, verify=verify)
        except CheckpointError:
            outcome.counts["does not load"] += verify
            continue
        outcome.counts["loads whole"] += verify
        if not any(same_state(got, state) for state in allowed):
            return f"{directory.name}: loads with verify={verify} and is incomplete: {left}"
    quantize_and_save(directory)
    again = contents(directory)
    return None if again == new else f"{directory.name}: after another run there are {sorted(again)}, before {left}"


def main(cases: int, directory: Path) -> Outcome:
    torch.set_num_threads(1)
    rng, outcome = random.Random(0), Outcome()
    quantize_and_save(directory / "new")
    quantize_and_save(directory / "old", seed=0)
    new, old = (read(directory / name) for name in ("new", "old"))
    lines = Lines()
    started = time.perf_counter()
    quantize_and_save(directory / "timed")
    seconds = time.perf_counter() - started
    sys.settrace(lines)
    quantize_and_save(directory / "traced")
    sys.settrace(None)
    files = contents(directory / "new")
    attempts = 0
    while outcome.cases < cases:
        attempts += 1
        assert attempts <= 3 * cases, "processes end before they are killed"
        before = BEFORE[attempts % len(BEFORE)]
        place = directory / str(attempts)
        prepare(place, before)
        work = functools.partial(quantize_and_save, place)
        if attempts % 2:
            killed, how = killed_at_line(work, Lines(rng.randint(1, lines.count))), "at a line"
        else:
            killed, how = killed_after(work, rng.uniform(0, seconds)), "at a time"
        if killed:
            outcome.counts[how] += 1
            allowed = [new, old] if before == "an older checkpoint" else [new]
            if before == "a config.json":  # a model without quantized weights and without any tensor never loads
                config = (place / "config.json").read_text() if (place / "config.json").exists() else "gone"
                if "mine" not in config and '"new"' not in config:
                    outcome.add(f"{place.name}: config.json is {config}")
                    continue
            outcome.add(wrong(place, allowed, files, outcome))
    return outcome


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2])).to_json()))
