"""The profile of a model: what the recorders saw, joined, as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.tools.profile import kernels as k
from lowbit.tools.profile.layers import Layer
from lowbit.tools.profile.memory import MemoryEvent, Span, Timeline, copies_in_layers, timeline
from lowbit.tools.profile.stacks import Frame, Stack
from lowbit.tools.profile.suggest import Suggestion, suggest
from lowbit.tools.profile.taint import Copy, Read
from lowbit.tools.profile.verdict import LayerVerdict, Verdict, Verdicts, judge

#: Of the JSON file; the number changes when a field changes its meaning.
SCHEMA = "lowbit-profile/1"
#: Where recording slows a CPU down by this factor, times of layers are shown, but nothing is concluded from them.
_DISTORTED = 2.0
DISPATCH, MEMORY, KERNELS = "dispatcher", "memory", "kernels"


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase; `instrumented` where no run of it was free of recorders."""

    phase: str
    seconds: float
    instrumented: bool


@dataclass(frozen=True)
class Profile:
    """Everything that was found out.

    Attributes:
        title: what was profiled.
        machine: device and versions by name.
        verdicts: whether each quantized layer stays packed.
        timeline: memory over time.
        kernels, layers, gaps: where time went.
        ceiling_gb_s: how fast this machine reads memory, measured; None if it was not.
        attributed: share of the recorded time that belongs to a phase.
        slowdown: how many times longer each phase took while its kernels were recorded.
        tokens: how many the phases had, if the run said.
        error: what ended the run early, or "".
    """

    title: str
    machine: Mapping[str, str]
    phases: tuple[PhaseTime, ...]
    verdicts: Verdicts
    timeline: Timeline
    kernels: tuple[k.KernelTime, ...]
    layers: tuple[k.LayerTime, ...]
    gaps: tuple[k.Gaps, ...]
    ceiling_gb_s: float | None
    attributed: float
    suggestions: tuple[Suggestion, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    slowdown: Mapping[str, float] = field(default_factory=dict)

    @property
    def unfused(self) -> list[LayerVerdict]:
        return self.verdicts.of(Verdict.UNFUSED)

    def layer_times(self, phase: str) -> list[k.LayerTime]:
        return [t for t in self.layers if t.phase == phase]

    @property
    def busiest_phase(self) -> str:
        """The phase whose layers are shown first: decode, or else the last one with layers in it."""
        phases = [t.phase for t in self.layers]
        return "decode" if "decode" in phases else phases[-1] if phases else ""


def build(
    title: str,
    machine: Mapping[str, str],
    layers: Sequence[Layer],
    *,
    spans: Mapping[str, Sequence[Span]],
    reads: Sequence[Read] = (),
    written: Sequence[tuple[str, Copy]] = (),
    ran: Collection[str] = (),
    caches: Collection[str] = (),
    events: Sequence[MemoryEvent] = (),
    memory_base: int = 0,
    trace: Mapping[str, Any] | None = None,
    ceiling_gb_s: float | None = None,
    few_tokens: Sequence[str] = ("decode",),
    tokens: Mapping[str, int] | None = None,
    recorded_tokens: Mapping[str, int] | None = None,
    error: str = "",
) -> Profile:
    """Join what was recorded. Pure.

    Args:
        few_tokens: phases in which activations are much smaller than weights; only about these can a block's size and a
            kernel's say that a weight was copied.
    """
    calls = k.calls_of(trace) if trace is not None else []
    verdicts = with_witnesses(
        judge(layers, reads, written, ran, caches),
        copies_in_layers(events, layers, set(few_tokens)),
        k.copies_before_products(calls, layers, set(few_tokens)),
    )
    found = Profile(
        title=title,
        machine=machine,
        phases=tuple(phase_times(spans)),
        verdicts=verdicts,
        timeline=timeline(events, memory_base),
        kernels=tuple(k.kernels_by_time(calls)),
        layers=tuple(k.layer_times(calls, layers, ceiling_gb_s)),
        gaps=tuple(k.gaps(calls)),
        ceiling_gb_s=ceiling_gb_s,
        attributed=k.attributed(calls),
        tokens=dict(tokens or {}),
        error=error,
        slowdown=slowdown(spans, tokens or {}, recorded_tokens or {}),
    )
    # A kernel of a GPU takes as long as it takes; operations on a CPU include what recording them costs.
    on_gpu = bool(found.gaps)
    layer_times = [t for t in found.layers if on_gpu or found.slowdown.get(t.phase, 1.0) < _DISTORTED]
    suggestions = suggest(found.verdicts, found.timeline, layer_times, found.gaps, ceiling_gb_s)
    return replace(found, suggestions=tuple(suggestions))


def slowdown(
    spans: Mapping[str, Sequence[Span]], tokens: Mapping[str, int], recorded_tokens: Mapping[str, int]
) -> dict[str, float]:
    """Time of each phase while kernels were recorded, as a multiple of its time by the clock; per token, where the
    recorded run had fewer of them."""

    def seconds_of(recording: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for s in spans.get(recording, ()):
            sums[s.phase] = sums.get(s.phase, 0.0) + s.seconds
        return sums

    clock, kernels = seconds_of("clock"), seconds_of("kernels")
    out = {}
    for phase in (name for name in clock if name in kernels):
        fewer = tokens[phase] / recorded_tokens[phase] if recorded_tokens.get(phase) and phase in tokens else 1.0
        out[phase] = kernels[phase] * fewer / clock[phase]
    return out


def phase_times(spans: Mapping[str, Sequence[Span]]) -> list[PhaseTime]:
    """Each phase once, timed where it was recorded least: what is done once first, then what was timed by itself."""
    order = sorted((s for members in spans.values() for s in members), key=lambda s: s.start)
    timed = {s.phase for s in spans.get("clock", ())}
    out = []
    for phase in sorted(dict.fromkeys(s.phase for s in order), key=lambda name: name in timed):
        for recording in ("clock", "warm-up", "", "memory", "kernels"):
            seconds = [s.seconds for s in spans.get(recording, ()) if s.phase == phase]
            if seconds:
                out.append(PhaseTime(phase, sum(seconds), recording in ("memory", "kernels")))
                break
    return out


def with_witnesses(verdicts: Verdicts, memory: Mapping[str, bool], kernels: Mapping[str, bool]) -> Verdicts:
    """Add what allocations and kernels say of each layer.

    The dispatcher's word stands where it saw the weight being read. Where it did not (graphs that were compiled or
    captured, code that launches its own kernels), the other two decide together.
    """
    out = []
    for v in verdicts.layers:
        name = v.layer.name
        witnesses = {DISPATCH: v.verdict is Verdict.UNFUSED} if v.op else {}
        witnesses |= {MEMORY: memory[name]} if name in memory else {}
        witnesses |= {KERNELS: kernels[name]} if name in kernels else {}
        v = replace(v, witnesses=witnesses)
        if not v.op and witnesses.get(MEMORY) and witnesses.get(KERNELS):
            why = "a block of the weight's size was allocated, and written before a matrix product"
            v = replace(v, verdict=Verdict.UNFUSED, copy_bytes=2 * v.layer.elements, why=why)
        out.append(v)
    return Verdicts(tuple(out))


# As a document -----------------------------------------------------------------------------------


def document(profile: Profile) -> dict[str, Any]:
    """The profile as what JSON knows."""
    return {
        "schema": SCHEMA,
        "title": profile.title,
        "machine": dict(profile.machine),
        "error": profile.error,
        "tokens": dict(profile.tokens),
        "phases": [vars(p) for p in profile.phases],
        "verdicts": {"summary": profile.verdicts.summary, "layers": [_verdict(v) for v in profile.verdicts.layers]},
        "suggestions": [vars(s) | {"layers": list(s.layers)} for s in profile.suggestions],
        "memory": {
            "peak_bytes": profile.timeline.peak,
            "phases": [
                vars(p) | {"spikes": [vars(s) | {"layers": list(s.layers), "stack": _stack(s.stack)} for s in p.spikes]}
                for p in profile.timeline.phases
            ],
            "timeline": [[round(p.seconds, 6), p.bytes, p.phase] for p in profile.timeline.points],
        },
        "ceiling_gb_s": profile.ceiling_gb_s,
        "time_attributed": profile.attributed,
        "slowdown": dict(profile.slowdown),
        "kernels": [vars(x) for x in profile.kernels],
        "layers": [vars(x) for x in profile.layers],
        "gaps": [vars(x) | {"idle": x.idle} for x in profile.gaps],
    }


def _verdict(v: LayerVerdict) -> dict[str, Any]:
    where: Frame | None = v.where
    layer = vars(v.layer) | {"also": list(v.layer.also), "lookups": list(v.layer.lookups)}
    layer |= {"bits_per_weight": v.layer.bits}
    return vars(v) | {
        "layer": layer, "verdict": v.verdict.value, "stack": _stack(v.stack), "witnesses": dict(v.witnesses),
        "where": str(where) if where is not None else None,
    }  # fmt: skip


def _stack(stack: Stack) -> list[str]:
    return [str(frame) for frame in stack]
