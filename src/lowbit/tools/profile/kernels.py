"""Where time went: from a Chrome trace of `torch.profiler` to kernels, layers, gaps and a witness for dequantization.

On a GPU the calls are its kernels, which belong to the operation that launched them; on a CPU they are operations, each
with the time that it did not spend in others. Phases and layers are annotations that `recorder.Profiler` left in the
trace. Everything here is a pure function of the trace.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.tools.profile.layers import Layer
from lowbit.tools.profile.taint import PRODUCTS
from lowbit.tools.profile.verdict import SHARE

PHASE, LAYER = "lowbit.phase=", "lowbit.layer="
_GEMM = re.compile(r"gemm|gemv|nvjet|cutlass|_mm_|splitK|cublas|scaled_mm|weight_only|wgmma|small_m", re.IGNORECASE)
_ELEMENTWISE = re.compile(r"elementwise|copy|_to_copy|dequant|CatArray|triton_poi", re.IGNORECASE)
#: Operations that write one element for each that they read.
_POINTWISE = {"_to_copy", "copy_", "mul", "mul_", "sub", "sub_", "add", "add_", "div", "to"}
#: Most elements that one thread of an elementwise kernel handles.
_PER_THREAD = 16


@dataclass(frozen=True)
class Call:
    """A kernel on the GPU or an operation on the CPU that took time.

    Attributes:
        start_us, us: when, and how long; of an operation, without those that it called.
        elements: of an operation, those of its largest operand; of a kernel, the most that its threads can handle.
        instance: which run of a layer it belongs to; -1 for none.
    """

    name: str
    start_us: float
    us: float
    phase: str
    layer: str
    elements: int
    instance: int
    on_gpu: bool


@dataclass(frozen=True)
class KernelTime:
    """All calls of one name in a phase; `share` is that of the phase's busy time."""

    name: str
    phase: str
    us: float
    calls: int
    share: float


@dataclass(frozen=True)
class LayerTime:
    """Time inside of a layer in a phase, and how fast it read its weight.

    Attributes:
        us: of one run, on average.
        gb_s: stored bytes of the weight per second.
        share: of `gb_s` in what the memory can do; None where that was not measured.
    """

    layer: str
    phase: str
    us: float
    calls: int
    gb_s: float
    share: float | None


@dataclass(frozen=True)
class Gaps:
    """How busy the GPU was from the first to the last kernel of a phase.

    Attributes:
        launches: kernels that were launched.
        longest_us: the longest time without any.
    """

    phase: str
    span_us: float
    busy_us: float
    launches: int
    longest_us: float

    @property
    def idle(self) -> float:
        return 1 - self.busy_us / self.span_us if self.span_us else 0.0


def calls_of(trace: Mapping[str, Any]) -> list[Call]:
    """The calls of a trace in the order of their start: kernels if it has any, else operations."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and isinstance(e.get("ts"), (int, float))]
    scopes = _Scopes(events)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        return sorted(_kernel_calls(events, kernels, scopes), key=lambda c: c.start_us)
    return sorted(_operation_calls(scopes), key=lambda c: c.start_us)


class _Scopes:
    """What was going on around each event of the CPU's threads: which phase, which layer, and what it called itself."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
        for e in events:
            if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
                threads.setdefault((e["pid"], e["tid"]), []).append(e)
        self.around: dict[int, tuple[str, str, int]] = {}
        self.own_us: dict[int, float] = {}
        self.operations: list[Mapping[str, Any]] = []
        instances = 0
        for members in threads.values():
            members.sort(key=lambda e: (e["ts"], -e["dur"]))
            stack: list[tuple[float, Mapping[str, Any], tuple[str, str, int]]] = []
            for e in members:
                while stack and stack[-1][0] <= e["ts"]:
                    stack.pop()
                phase, layer, instance = stack[-1][2] if stack else ("", "", -1)
                name = str(e["name"])
                if name.startswith(PHASE):
                    phase, layer, instance = name[len(PHASE) :], "", -1
                elif name.startswith(LAYER):
                    layer, instance, instances = name[len(LAYER) :], instances, instances + 1
                self.around[id(e)] = (phase, layer, instance)
                if e["cat"] == "cpu_op":
                    self.operations.append(e)
                    self.own_us[id(e)] = e["dur"]
                    parent = next((p for _, p, _ in reversed(stack) if p["cat"] == "cpu_op"), None)
                    if parent is not None:
                        self.own_us[id(parent)] -= e["dur"]
                stack.append((e["ts"] + e["dur"], e, (phase, layer, instance)))


def _operation_calls(scopes: _Scopes) -> Iterable[Call]:
    for e in scopes.operations:
        phase, layer, instance = scopes.around[id(e)]
        own = max(scopes.own_us[id(e)], 0.0)
        yield Call(str(e["name"]), e["ts"], own, phase, layer, _largest(e), instance, False)


def _kernel_calls(
    events: Iterable[Mapping[str, Any]], kernels: Iterable[Mapping[str, Any]], scopes: _Scopes
) -> Iterable[Call]:
    launches: dict[Any, Mapping[str, Any]] = {}
    for e in events:
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {}):
            launches[e["args"]["correlation"]] = e
    for e in kernels:
        args = e.get("args", {})
        launch = launches.get(args.get("correlation"))
        phase, layer, instance = scopes.around[id(launch)] if launch is not None else ("", "", -1)
        threads = math.prod(args.get("grid") or [0]) * math.prod(args.get("block") or [0])
        yield Call(str(e["name"]), e["ts"], e["dur"], phase, layer, threads * _PER_THREAD, instance, True)


def _largest(operation: Mapping[str, Any]) -> int:
    dims = operation.get("args", {}).get("Input Dims") or []
    flat = [d for d in dims if isinstance(d, list) and all(isinstance(n, int) for n in d)]
    return max((math.prod(d) for d in flat if d), default=0)


# What is told from calls -------------------------------------------------------------------------


def kernels_by_time(calls: Iterable[Call], limit: int = 20) -> list[KernelTime]:
    """Names with the most time in each phase, at most `limit` per phase."""
    sums: dict[tuple[str, str], list[float]] = {}
    total: dict[str, float] = {}
    for c in calls:
        if c.us > 0:
            sums.setdefault((c.phase, c.name), []).append(c.us)
            total[c.phase] = total.get(c.phase, 0.0) + c.us
    out: list[KernelTime] = []
    for phase in total:
        rows = [KernelTime(n, p, sum(us), len(us), sum(us) / total[p]) for (p, n), us in sums.items() if p == phase]
        out += sorted(rows, key=lambda r: -r.us)[:limit]
    return out


def layer_times(calls: Iterable[Call], layers: Sequence[Layer], ceiling_gb_s: float | None = None) -> list[LayerTime]:
    """Time of each layer in each phase, and the speed at which it got its weight; without lookups, which read a few
    rows of theirs."""
    known = {name: layer for layer in layers for name in layer.names if name not in layer.lookups}
    sums: dict[tuple[str, str], float] = {}
    instances: dict[tuple[str, str], set[int]] = {}
    for c in calls:
        if c.layer in known:
            key = (c.phase, c.layer)
            sums[key] = sums.get(key, 0.0) + c.us
            instances.setdefault(key, set()).add(c.instance)
    out = []
    for (phase, name), us in sums.items():
        runs = len(instances[phase, name])
        gb_s = known[name].stored_bytes * runs / us / 1e3 if us else 0.0
        out.append(LayerTime(name, phase, us / runs, runs, gb_s, gb_s / ceiling_gb_s if ceiling_gb_s else None))
    return out


def gaps(calls: Iterable[Call]) -> list[Gaps]:
    """Of each phase, how long the GPU had nothing to do; nothing for a CPU."""
    phases: dict[str, list[Call]] = {}
    for c in calls:
        if c.on_gpu:
            phases.setdefault(c.phase, []).append(c)
    out = []
    for phase, members in phases.items():
        busy, longest, end = 0.0, 0.0, members[0].start_us
        for c in members:  # in order of start; kernels of several streams overlap
            longest = max(longest, c.start_us - end)
            busy += max(0.0, c.start_us + c.us - max(end, c.start_us))
            end = max(end, c.start_us + c.us)
        out.append(Gaps(phase, end - members[0].start_us, busy, len(members), longest))
    return out


def attributed(calls: Iterable[Call]) -> float:
    """The share of time that belongs to a phase."""
    total = known = 0.0
    for c in calls:
        total += c.us
        known += c.us if c.phase else 0.0
    return known / total if total else 1.0


def copies_before_products(calls: Iterable[Call], layers: Iterable[Layer], phases: set[str]) -> dict[str, bool]:
    """Witness 3: of each quantized layer that ran in one of `phases`, whether in some run an elementwise kernel of its
    weight's size came before a matrix product.

    Only to be asked about phases with few tokens: for many, activations are as large.
    """
    known = {name: layer for layer in layers if layer.quantized for name in layer.names}
    runs: dict[tuple[str, int], list[Call]] = {}
    for c in calls:
        if c.layer in known and c.phase in phases:
            runs.setdefault((c.layer, c.instance), []).append(c)
    out: dict[str, bool] = {}
    for (name, _), members in runs.items():
        copied = found = False
        for c in members:
            copied = copied or (_is_pointwise(c) and c.elements >= SHARE * known[name].elements)
            found = found or (copied and _is_product(c))
        first = known[name].name
        out[first] = out.get(first, False) or found
    return out


def _is_pointwise(c: Call) -> bool:
    return bool(_ELEMENTWISE.search(c.name)) if c.on_gpu else c.name.partition("::")[2] in _POINTWISE


def _is_product(c: Call) -> bool:
    if c.on_gpu:
        return bool(_GEMM.search(c.name)) and not _ELEMENTWISE.search(c.name)
    return c.name.partition("::")[2].rstrip("_") in PRODUCTS


def kind_of(name: str) -> str:
    """`matrix product`, `copy or elementwise` or `other`, by a kernel's or an operation's name."""
    library, separated, operation = name.partition("::")
    if separated and "<" not in library and " " not in library:
        if operation.rstrip("_") in PRODUCTS or (library, operation) == ("lowbit", "linear"):
            return "matrix product"
        return "copy or elementwise" if operation in _POINTWISE else "other"
    if _ELEMENTWISE.search(name):
        return "copy or elementwise"
    return "matrix product" if _GEMM.search(name) else "other"
