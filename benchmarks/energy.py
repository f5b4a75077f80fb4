"""Times kernels as long runs at the GPU's power limit, and weighs them: joules of a product, clock, power.

    python benchmarks/energy.py --layers gate_up --formats int4:g128 --tokens 2048 --out benchmarks/results/NAME.json

Products of thousands of tokens draw all the power that a GPU may: their time is then energy over power, and short runs
in turns say little. Each kernel runs by itself for --hold seconds, bf16 too: the driver's counter gives the energy.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import arguments, cases, write
from crossover import run_of

KERNELS = ("cuda_wgmma", "triton_chunked")


class Sustained(NamedTuple):
    """What a call costs in a long run: microseconds, millijoules, and watts and megahertz while it lasts."""

    us: float
    mj: float
    watts: float
    mhz: float


class Meter:
    """The driver's counters of the first GPU (NVML)."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libnvidia-ml.so.1")
        self._check(self._lib.nvmlInit_v2())
        self._device = ctypes.c_void_p()
        self._check(self._lib.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"NVML answered {status}")

    def millijoules(self) -> int:
        """Since the driver was loaded."""
        found = ctypes.c_ulonglong()
        self._check(self._lib.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(found)))
        return found.value

    def mhz(self) -> int:
        """Of the multiprocessors, now."""
        found = ctypes.c_uint()
        self._check(self._lib.nvmlDeviceGetClockInfo(self._device, 1, ctypes.byref(found)))
        return found.value


class Clock:
    """Watches the clock of the multiprocessors while they work: between calls, they are idle and it is another."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._seen, self._over = meter, list[int](), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._seen.append(self._meter.mhz())

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def mhz(self) -> float:
        return statistics.mean(self._seen or [self._meter.mhz()])


def sustained(calls: Sequence[Callable[[], Any]], meter: Meter, hold: float) -> Sustained:
    """The calls over and over for `hold` seconds, after a third of that to warm up."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replays(seconds: float) -> int:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(8):
                graph.replay()
            torch.cuda.synchronize()
            count += 8
        return count

    replays(hold / 3)
    with Clock(meter) as clock:
        began, at = time.perf_counter(), meter.millijoules()
        count = replays(hold) * len(calls)
        mj, seconds = meter.millijoules() - at, time.perf_counter() - began
    return Sustained(seconds * 1e6 / count, mj / count, mj / 1e3 / seconds, clock.mhz)


def main() -> int:
    args = arguments(__doc__, seconds=300, formats="int4:g128", tokens="512,2048", more={"hold": 1.0})
    rows, meter = [], Meter()
    for case in cases(args):
        dense = [w.dequantize().bfloat16() for w in case.weights[:2]]
        runs: dict[str, list[Callable[[], Any]]] = {"bf16": [partial(F.linear, case.x, w) for w in dense]}
        for kernel in KERNELS:
            runs[kernel] = [partial(run_of(kernel, case.format), case.x, w) for w in case.weights]
        found = {name: sustained(calls, meter, args.hold) for name, calls in runs.items()}
        rows.append(case.row | {name: s._asdict() for name, s in found.items()})
        for name, s in found.items():
            print(f"{case} {name}: {s.us:.1f} us {s.mj:.1f} mJ {s.watts:.0f} W {s.mhz:.0f} MHz", flush=True)
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
