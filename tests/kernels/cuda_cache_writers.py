"""Sixteen processes write the same kernels into one cache and are killed at random; then the cache is looked through.

    LOWBIT_CACHE=DIR python cuda_cache_writers.py

A program of its own, because it forks, which the threads of a test process forbid. It prints how many kernels were
kept and how many writers were killed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import time
import traceback

from lowbit.kernels.cuda import loader

PROCESSES, SECONDS, KERNELS = 16, 5.0, 24
SIZE = 1 << 16  # bytes of a kernel's machine code
MOST = 40_000  # bytes of the log, about 100 MB of kernels; where writing is fast, it ends before the time is over


def machine_code(source: str, name: str, target: str, options: list[str]) -> bytes:
    """Stands in for NVRTC: known bytes at once."""
    return hashlib.sha256(source.encode()).digest() * (SIZE // 32)


def refuse(source: str, name: str, target: str, options: list[str]) -> bytes:
    raise AssertionError(f"{source!r} was compiled again: its file is lost or damaged")


def check(source: str) -> None:
    assert loader.compile_source(source, "kernel", (), (9, 0)) == machine_code(source, "", "", []), source


def write(log: int, number: int) -> None:
    """Ask for kernels and tell `log` of every one that came back.

    The first are those of the writer's own generation, then come those that others write, in another order.
    """
    order = random.Random(number)
    for generation in itertools.count(number):
        for i in order.sample(range(KERNELS), KERNELS):
            if os.fstat(log).st_size > MOST:
                time.sleep(SECONDS)  # to be killed; an orphan must not fill the disk
                return
            source = f"{generation} {i}"
            check(source)
            os.write(log, f"{source}\n".encode())  # so short a write is whole or not at all


def start(log: int, number: int) -> int:
    """The id of a new process that writes until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            os.nice(5)  # or the one that kills hardly gets its turn
            write(log, number)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def killed(child: int) -> bool:
    """Kill a writer; False if it had ended by itself, which is a fault."""
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    loader._compile = machine_code
    log = os.open(os.path.join(os.environ["LOWBIT_CACHE"], "log"), os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    chance, stop, ended = random.Random(0), time.monotonic() + SECONDS, list[bool]()
    running = [start(log, number) for number in range(PROCESSES)]
    while all(ended) and time.monotonic() < stop and os.fstat(log).st_size < MOST:
        time.sleep(chance.uniform(0, 0.01))
        ended.append(killed(running.pop(chance.randrange(PROCESSES))))
        running.append(start(log, PROCESSES + len(ended)))
    ended += [killed(child) for child in running]
    assert all(ended), "a writer ended by itself; its error is above"

    loader._compile = refuse
    kept = set(os.pread(log, os.fstat(log).st_size, 0).decode().splitlines())
    for source in kept:
        check(source)
    files = [file.name for file in loader.cache_dir("cuda").glob("*.cubin")]
    torn = [name for name in files if loader._read_cached(name) is None]
    assert not torn, torn
    print(len(kept), len(ended))


if __name__ == "__main__":
    main()
