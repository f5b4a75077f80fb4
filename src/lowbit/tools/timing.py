"""Timing that can be believed: cold weights, variants in turns, medians.

A *variant* is one way to compute something, given as a list of calls, one per copy of its weights. Together the copies
exceed the cache, so that every call reads its weights from memory, as a model's layers do. A *turn* runs all calls of
a variant once: on a GPU as one CUDA graph, which leaves Python and launches out; on a CPU by the clock.

Products of many tokens run at the GPU's power limit, which sets the clock a tenth of a second or more behind what runs:
in short turns a variant has the clock that the others' power leaves, and one that draws less seems slower than it is.
There a variant is *held*: it runs by itself until the clock is its own (docs/measured.md has what that changes).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.kernels.triton.launch import OPTIONS

COLD_BYTES = 160 << 20  # three times the L2 cache of an H100
FEWEST_COPIES, MOST_COPIES = 2, 64
ROUNDS, FEWEST_ROUNDS = 15, 3
# From so many tokens on variants are held, for so many seconds each time, of which there are FEWEST_ROUNDS.
HELD_FROM, HOLD_SECONDS = 512, 0.3

Call = Callable[[], object]
#: Runs a variant's turn and returns the microseconds of one call.
Turn = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over turns and the spread."""

    us: float
    us_min: float
    us_max: float
    samples: int


def summarize(samples: Sequence[float]) -> Timing:
    return Timing(statistics.median(samples), min(samples), max(samples), len(samples))


def copies_for(nbytes: int) -> int:
    """How many copies of so many bytes exceed the cache; for very small ones as many as are affordable."""
    return max(FEWEST_COPIES, min(MOST_COPIES, -(-COLD_BYTES // max(nbytes, 1))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(calls: Sequence[Call], device: torch.device) -> float:
    """Run every call once, so that nothing is compiled or tuned while it is timed; the seconds it took."""
    started = time.perf_counter()
    for call in calls:
        call()
    synchronize(device)
    return time.perf_counter() - started


def turn_of(calls: Sequence[Call], device: torch.device) -> Turn:
    """The turn of a variant that is warmed up."""
    return _graph_turn(calls) if device.type == "cuda" else partial(_clock_turn, calls)


def _clock_turn(calls: Sequence[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) * 1e6 / len(calls)


def _graph_turn(calls: Sequence[Call]) -> Turn:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def turn() -> float:
        # The first replay is not timed. It keeps the GPU busy until the second has been submitted, whose launch would
        # count otherwise, and it leaves in the cache what a variant's own calls leave there, not what others left.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / len(calls)

    return turn


def take_turns(
    turns: Mapping[str, Turn],
    rounds: int = ROUNDS,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    hold: float = 0.0,
) -> dict[str, Timing | Exception]:
    """Time variants round robin: whatever changes with time (clocks, heat, other programs) meets all of them alike.

    A variant that has spent `seconds` on at least `FEWEST_ROUNDS` turns gets no more. One that fails is out; its
    error stands in place of its timing.

    Args:
        hold: seconds that a variant runs by itself ahead of each turn that counts (`hold_for`); there are
            `FEWEST_ROUNDS` of these then.
    """
    samples: dict[str, list[float]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    failed: dict[str, Exception] = {}
    for _ in range(min(rounds, FEWEST_ROUNDS) if hold else rounds):
        for name, turn in turns.items():
            if name in failed or (spent[name] > seconds and len(samples[name]) >= FEWEST_ROUNDS):
                continue
            try:
                began = clock()
                while clock() - began < hold:
                    turn()
                began = clock()
                samples[name].append(turn())
            except Exception as error:  # whatever a library raises is a result here, and its neighbours go on
                failed[name] = error
            spent[name] += clock() - began
    return {name: failed[name] if name in failed else summarize(samples[name]) for name in turns}


def hold_for(tokens: int, device: torch.device) -> float:
    """Seconds that a product of so many tokens is held."""
    return HOLD_SECONDS if tokens >= HELD_FROM and device.type == "cuda" else 0.0


def median_us(calls: Sequence[Call], rounds: int = ROUNDS, hold: float = 0.0) -> float:
    """Median time of one call of a single variant on the GPU, for programs that compare instances of one kernel."""
    device = torch.device("cuda")
    warm_up(calls[:2], device)
    return median_of(turn_of(calls, device), rounds, hold)


def median_of(turn: Turn, rounds: int, hold: float = 0.0) -> float:
    """Median time of all turns of a single variant, whose errors are raised."""
    (found,) = take_turns({"": turn}, rounds, math.inf, hold=hold).values()
    if isinstance(found, Exception):
        raise found
    return found.us


# The floor ---------------------------------------------------------------------------------------


def read_calls(nbytes: int, device: torch.device, block: int = 8192) -> list[Call]:
    """A variant that reads `nbytes` once and adds them up: no layer with as many bytes of weights can be faster."""
    words = max(1, nbytes // 4)
    count = copies_for(nbytes)
    if device.type != "cuda":
        return [torch.rand(words, device=device).sum for _ in range(count)]
    # Here and not above: without a GPU, Triton need not be installed.
    from lowbit.tools.read_kernel import read_kernel

    grid = (-(-words // block),)
    sums = torch.empty(grid, dtype=torch.int32, device=device)

    def read(buffer: Tensor) -> None:
        read_kernel[grid](buffer, sums, words, BLOCK=block, num_warps=8, **OPTIONS)

    return [partial(read, torch.randint(9, (words,), dtype=torch.int32, device=device)) for _ in range(count)]


def floor_us(nbytes: int) -> float:
    """Median time of reading `nbytes` once on the GPU."""
    return median_us(read_calls(nbytes, torch.device("cuda")))
