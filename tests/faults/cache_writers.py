"""Sixteen processes write kernels into one cache and are killed at random; then the cache is looked through.

    LOWBIT_CACHE=DIR python -m faults.cache_writers WRITES

A program of its own, because it forks, which the threads of a test process forbid. It prints how many kernels were
kept, how many of them were lost or torn, and how many writers were killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import lowbit
from faults.outcome import Outcome
from lowbit.kernels.cuda import loader

PROCESSES = 16
WRITES_PER_KILL = 8
SIZE = 1 << 14  # bytes of a kernel's machine code
TESTS = Path(__file__).resolve().parents[1]


def run(cases: int, directory: Path) -> Outcome:
    """Each process writes `cases` kernels. Every one that a writer got back has to be there at the end, whole."""
    path = os.pathsep.join((str(TESTS), str(Path(lowbit.__file__).parents[1])))
    environment = os.environ | {"LOWBIT_CACHE": str(directory), "PYTHONPATH": path}
    command = [sys.executable, "-m", "faults.cache_writers", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    kept, lost, killed = map(int, done.stdout.split())
    outcome = Outcome(cases=PROCESSES * cases, held=kept - lost)
    if lost or kept != outcome.cases:
        outcome.failures.append(f"{kept} of {outcome.cases} kernels were written, {lost} are lost or torn")
    outcome.counts["processes killed"] = killed
    return outcome


def machine_code(source: str, name: str, target: str, options: list[str]) -> bytes:
    """Stands in for NVRTC: known bytes at once."""
    return hashlib.sha256(source.encode()).digest() * (SIZE // 32)


def refuse(source: str, name: str, target: str, options: list[str]) -> bytes:
    raise AssertionError(f"{source!r} was compiled again: its file is lost or damaged")


def check(source: str) -> None:
    assert loader.compile_source(source, "kernel", (), (9, 0)) == machine_code(source, "", "", []), source


def told(log: int) -> list[str]:
    return os.pread(log, os.fstat(log).st_size, 0).decode().splitlines()


def write(log: int, number: int, writes: int) -> None:
    """Ask for the kernels of this writer that have not come back yet, tell `log` of every one that does, and read some
    of the others' in between."""
    others = told(log)
    mine = {line for line in others if line.startswith(f"{number} ")}
    order = random.Random(os.getpid())
    for source in (f"{number} {i}" for i in range(writes)):
        if source not in mine:
            check(source)
            os.write(log, f"{source}\n".encode())  # so short a write is whole or not at all
            if others:
                check(order.choice(others))


def start(log: int, number: int, writes: int) -> int:
    """The id of a new process that writes until it is done or killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.nice(5)  # or the one that kills hardly gets its turn
            write(log, number, writes)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return child


def ended(child: int) -> bool:
    """Whether a writer is through with its kernels."""
    process, status = os.waitpid(child, os.WNOHANG)
    assert process == 0 or status == 0, "a writer ended with an error, which is above"
    return process != 0


def main(writes: int) -> None:
    loader._compile = machine_code
    log = os.open(os.path.join(os.environ["LOWBIT_CACHE"], "log"), os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    chance, killed = random.Random(0), 0
    running = {number: start(log, number, writes) for number in range(PROCESSES)}
    while running:
        # By progress rather than by time: on a busy machine nobody would come to write.
        wanted = len(told(log)) + chance.randint(1, 2 * WRITES_PER_KILL)
        while running and len(told(log)) < wanted:
            time.sleep(0.001)
            running = {number: child for number, child in running.items() if not ended(child)}
        if running:
            number = chance.choice(sorted(running))
            os.kill(running[number], signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(running[number], 0)[1])
            running[number] = start(log, number, writes)

    loader._compile = refuse
    kept, lost = set(told(log)), 0
    for source in kept:
        try:
            check(source)
        except AssertionError:
            traceback.print_exc()
            lost += 1
    files = [file.name for file in loader.cache_dir("cuda").glob("*.cubin")]
    lost += sum(loader._read_cached(name) is None for name in files)
    print(len(kept), lost, killed)


if __name__ == "__main__":
    main(int(sys.argv[1]))
