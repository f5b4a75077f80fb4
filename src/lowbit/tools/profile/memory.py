"""What happened to memory: from recorded allocations to a timeline by phase, and what its peaks are made of.

The events come from CUDA's allocator history or, on a CPU, from `recorder.AllocationTracker`. Everything here is a pure
function of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.tools.profile.layers import Layer
from lowbit.tools.profile.stacks import Stack, recorded_stack
from lowbit.tools.profile.verdict import SHARE

#: Groups of allocations that are listed for a phase's peak.
_LISTED = 6
#: Points of a timeline that a plot and a file need; peaks are kept.
_POINTS = 1500


@dataclass(frozen=True)
class MemoryEvent:
    """A block that was allocated (`bytes` above 0) or freed (below 0).

    Attributes:
        seconds: since the epoch.
        block: what identifies the block while it is alive.
        phase, layer: where it happened; "" outside of all.
    """

    seconds: float
    bytes: int
    block: int
    phase: str = ""
    layer: str = ""
    stack: Stack = ()


@dataclass(frozen=True)
class Span:
    """A stretch of time that belongs to a phase, in seconds since the epoch."""

    phase: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Spike:
    """Blocks of one line of code that were alive at a phase's peak and had been allocated in that phase.

    Attributes:
        layers: names of the layers that it happened in.
    """

    bytes: int
    count: int
    layers: tuple[str, ...]
    stack: Stack


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of a phase in bytes: at its start, at most, and what the difference is made of, largest first.

    Attributes:
        allocated: sum of all blocks allocated in it, freed ones included.
        attributed: the share of these bytes whose layer or line is known.
    """

    phase: str
    before: int
    peak: int
    peak_at: float
    allocated: int
    attributed: float
    spikes: tuple[Spike, ...]


@dataclass(frozen=True)
class Point:
    """Memory in use from `seconds` (since the first event) on."""

    seconds: float
    bytes: int
    phase: str


@dataclass(frozen=True)
class Timeline:
    """Memory over time, at most some 1500 points of it, and what each phase did."""

    points: tuple[Point, ...]
    phases: tuple[PhaseMemory, ...]

    @property
    def peak(self) -> int:
        return max((p.peak for p in self.phases), default=0)


def timeline(events: Sequence[MemoryEvent], base: int = 0) -> Timeline:
    """Replay `events` upon `base` bytes that were in use before; frees of blocks never seen change nothing."""
    in_use, alive = base, dict[int, MemoryEvent]()
    points: list[Point] = []
    peaks: dict[str, tuple[int, float]] = {}
    before: dict[str, int] = {}
    first = events[0].seconds if events else 0.0
    for event in events:
        before.setdefault(event.phase, in_use)
        if event.bytes > 0:
            alive[event.block] = event
            in_use += event.bytes
        else:
            gone = alive.pop(event.block, None)
            if gone is None:
                continue
            in_use -= gone.bytes
        points.append(Point(event.seconds - first, in_use, event.phase))
        if in_use > peaks.get(event.phase, (-1, 0.0))[0]:
            # Its blocks are collected in a second pass: copying them at every step would be quadratic.
            peaks[event.phase] = (in_use, event.seconds)
    blocks = _alive_at(events, {seconds for _, seconds in peaks.values()})
    phases = []
    for phase, (peak, at) in peaks.items():
        own = [e for e in events if e.phase == phase and e.bytes > 0]
        total = sum(e.bytes for e in own)
        known = sum(e.bytes for e in own if e.layer or e.stack)
        mine = [e for e in blocks[at] if e.phase == phase]
        phases.append(PhaseMemory(phase, before[phase], peak, at - first, total, known / total if total else 1.0,
                                  spikes(mine)))  # fmt: skip
    return Timeline(thin(points), tuple(phases))


def _alive_at(events: Sequence[MemoryEvent], times: set[float]) -> dict[float, list[MemoryEvent]]:
    alive, out = dict[int, MemoryEvent](), dict[float, list[MemoryEvent]]()
    in_use, most = 0, dict[float, int]()
    for event in events:
        if event.bytes > 0:
            alive[event.block] = event
            in_use += event.bytes
        elif (gone := alive.pop(event.block, None)) is not None:
            in_use -= gone.bytes
        # Several events may have the same time; the fullest moment of it is the peak.
        if event.seconds in times and in_use > most.get(event.seconds, -1):
            most[event.seconds], out[event.seconds] = in_use, list(alive.values())
    return out


def spikes(blocks: Iterable[MemoryEvent]) -> tuple[Spike, ...]:
    """The lines of code that made these blocks, those with the most bytes first."""
    by_line: dict[object, list[MemoryEvent]] = {}
    for block in blocks:
        by_line.setdefault(block.stack[0] if block.stack else None, []).append(block)
    groups = sorted(by_line.values(), key=lambda g: sum(b.bytes for b in g), reverse=True)
    return tuple(
        Spike(
            bytes=sum(b.bytes for b in group),
            count=len(group),
            layers=tuple(dict.fromkeys(b.layer for b in group if b.layer)),
            stack=max(group, key=lambda b: b.bytes).stack,
        )
        for group in groups[:_LISTED]
    )


def thin(points: Sequence[Point], limit: int = _POINTS) -> tuple[Point, ...]:
    """At most about `limit` points: of each run of neighbours the least, the most and the last, never across phases."""
    if len(points) <= limit:
        return tuple(points)
    step = -(-3 * len(points) // limit)
    kept: list[Point] = []
    run: list[Point] = []
    for point, following in zip(points, [*points[1:], None]):
        run.append(point)
        if len(run) == step or following is None or following.phase != point.phase:
            chosen = {id(p): p for p in (min(run, key=lambda p: p.bytes), max(run, key=lambda p: p.bytes), run[-1])}
            kept += sorted(chosen.values(), key=lambda p: p.seconds)
            run = []
    return tuple(kept)


def snapshot_events(snapshot: Mapping[str, Any], spans: Sequence[Span] = (), device: int = 0) -> list[MemoryEvent]:
    """The events of a CUDA snapshot (`torch.cuda.memory._snapshot()`).

    Phase and layer are what `torch.cuda.memory._set_memory_metadata` had been told (`phase=...;layer=...`); where there
    is no such note, the phase is that of the time.
    """
    starts = [s.start for s in spans]
    out = []
    for entry in snapshot["device_traces"][device]:
        action = entry["action"]
        if action not in ("alloc", "free_completed"):
            continue
        seconds = entry.get("time_us", 0) / 1e6
        note = _note(entry.get("user_metadata"))
        i = bisect.bisect_right(starts, seconds) - 1
        by_time = spans[i].phase if i >= 0 and seconds <= spans[i].end else ""
        size = entry["size"] if action == "alloc" else -entry["size"]
        stack = recorded_stack(entry.get("frames") or ())
        out.append(MemoryEvent(seconds, size, entry["addr"], note.get("phase", by_time), note.get("layer", ""), stack))
    return out


def _note(text: object) -> dict[str, str]:
    words = (word.partition("=") for word in str(text or "").split(";"))
    return {key: value for key, _, value in words if value}


def copies_in_layers(events: Iterable[MemoryEvent], layers: Iterable[Layer], phases: set[str]) -> dict[str, bool]:
    """Witness 2: of each quantized layer that allocated something in one of `phases`, whether a block was as large as a
    16-bit copy of its weight.

    Only to be asked about phases with few tokens: for many, activations are as large.
    """
    known = {name: layer for layer in layers if layer.quantized for name in layer.names}
    out: dict[str, bool] = {}
    for event in events:
        layer = known.get(event.layer)
        if layer is not None and event.bytes > 0 and event.phase in phases:
            out[layer.name] = out.get(layer.name, False) or event.bytes >= 2 * SHARE * layer.elements
    return out
