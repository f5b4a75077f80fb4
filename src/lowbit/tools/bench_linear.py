"""`lowbit bench linear`: one layer's time in lowbit's schemes, in bf16, and in other libraries, in one process.

Everything that is compared is timed in turns within the same row (a layer, a scheme, a number of tokens), with cold
weights. The floor of a row is the time of reading as many bytes as the packed weight has, measured in the same turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.configs import Scheme
from lowbit.errors import see
from lowbit.formats.activation import parse_activation
from lowbit.kernels.problem import Problem, arch_of
from lowbit.kernels.select import select
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor
from lowbit.tools import timing
from lowbit.tools.bench_rows import BF16, FLOOR, LOWBIT, LeftOut, Record, Row, about, finished, reason_of, scheme_name
from lowbit.tools.doctor import sqnr_db
from lowbit.tools.peers import Function, NoCounterpart, Peer
from lowbit.tools.timing import Call, Turn

#: The linear layers of Llama-3.1-8B, `(N, K)`.
LAYERS = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "lm_head": (128256, 4096),
}  # fmt: skip
CHANNELS = 256  # of the output, compared with fp64


@dataclass(frozen=True)
class Layer:
    name: str
    n: int
    k: int


@dataclass
class Plan:
    """What to measure, and for how long rows may be started."""

    layers: Sequence[Layer]
    schemes: Sequence[Scheme]
    tokens: Sequence[int]
    peers: Sequence[Peer] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 240.0
    rounds: int = timing.ROUNDS
    clock: Callable[[], float] = time.monotonic


def parse_layer(word: str) -> Layer:
    """A layer's name, or `NxK`.

    Raises:
        ValueError: neither.
    """
    if word in LAYERS:
        return Layer(word, *LAYERS[word])
    if (match := re.fullmatch(r"(\d+)x(\d+)", word)) and all(sizes := (int(match[1]), int(match[2]))):
        return Layer(word, *sizes)
    raise ValueError(
        f"layer {word!r}: give {', '.join(LAYERS)}, or its sizes as NxK, such as 4096x14336" + see("bad-option")
    )


def parse_scheme(word: str) -> Scheme:
    """`int4:g128`, `int8:row+int8:row` (weight+activation), or a config's short name such as `int8dq`.

    Raises:
        ValueError: unknown, or with a static activation scale, which needs a calibration.
    """
    weight, _, act = word.partition("+")
    scheme = parse_config(weight).scheme
    scheme = Scheme(scheme.weight, parse_activation(act)) if act else scheme
    if scheme.act is not None and scheme.act.static:
        raise ValueError(
            f"{word}: static activation scales need a calibration; give the dynamic one" + see("bad-option")
        )
    return scheme


def name_of(scheme: Scheme) -> str:
    """What `parse_scheme` understands."""
    return scheme_name(scheme.weight.spec, scheme.act.spec if scheme.act else "")


# Measuring ---------------------------------------------------------------------------------------


@dataclass
class _Variant:
    """A provider's copies of the layer, or why it has none."""

    functions: list[Function] = field(default_factory=list)
    setup_s: float = 0.0
    error: str = ""


class _Unusable(Exception):
    """The GPU does not answer any more: whatever follows would fail too."""


def bench_linear(plan: Plan, on_row: Callable[[Row], None] = lambda row: None) -> tuple[list[Row], list[LeftOut]]:
    """Measure every layer, scheme and number of tokens until the plan's seconds are spent.

    Args:
        plan: what to measure.
        on_row: called with each row when it is complete.

    Returns:
        the rows, and what was left out.
    """
    rows: list[Row] = []
    todo = [(layer, scheme, m) for layer in plan.layers for scheme in plan.schemes for m in plan.tokens]
    reason = ""
    gpu = torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext()
    try:
        with torch.no_grad(), gpu:
            for row in _rows(plan):
                rows.append(row)
                on_row(row)
    except _Unusable as broken:
        reason = str(broken)
    reason = reason or f"{plan.seconds:g} s are spent"
    return rows, [LeftOut(layer.name, name_of(scheme), m, reason) for layer, scheme, m in todo[len(rows) :]]


def _rows(plan: Plan) -> Iterator[Row]:
    """Rows in order; ends early when the time is spent."""
    deadline = plan.clock() + plan.seconds
    for layer in plan.layers:
        if plan.clock() > deadline:
            return
        random = torch.Generator(plan.device).manual_seed(0)

        def normal(*shape: int, random: torch.Generator = random) -> Tensor:
            return torch.randn(shape, generator=random, device=plan.device, dtype=torch.bfloat16)

        dense = normal(layer.n, layer.k) * 0.02
        originals = [dense] + [dense.clone() for _ in range(timing.copies_for(dense.nbytes) - 1)]
        bf16 = _Variant([_Linear(w) for w in originals])
        for scheme in plan.schemes:
            if plan.clock() > deadline:
                return
            variants = {BF16: bf16} | _variants(plan, scheme, dense, deadline)
            floor = timing.read_calls(scheme.weight.nbytes(layer.n, layer.k), plan.device)
            timing.warm_up(floor, plan.device)
            turn = timing.turn_of(floor, plan.device)
            for m in plan.tokens:
                if plan.clock() > deadline:
                    return
                yield _row(plan, layer, scheme, dense, normal(m, layer.k), variants, turn, deadline)
            del variants, floor, turn  # before the next scheme's copies are made


@dataclass(frozen=True)
class _Linear:
    """One copy of the layer: plain, or quantized by lowbit."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _variants(plan: Plan, scheme: Scheme, dense: Tensor, deadline: float) -> dict[str, _Variant]:
    """lowbit's copies of the layer and every peer's."""
    count = timing.copies_for(scheme.weight.nbytes(*dense.shape))

    def ours() -> list[Function]:
        first = QuantizedTensor.from_float(dense, scheme.weight, scheme.act)
        return [_Linear(w) for w in [first, *(first.clone() for _ in range(count - 1))]]

    def theirs(peer: Peer) -> list[Function]:
        maker = peer.adapter(scheme)
        return [maker(dense) for _ in range(count)]

    found = {LOWBIT: _attempt(plan, ours)}
    for peer in plan.peers:
        late = plan.clock() > deadline
        found[peer.name] = _spent(plan) if late else _attempt(plan, partial(theirs, peer))
    return found


def _attempt(plan: Plan, build: Callable[[], list[Function]]) -> _Variant:
    began = time.perf_counter()
    try:
        functions, error = build(), ""
        timing.synchronize(plan.device)
    except NoCounterpart as nothing:
        functions, error = [], str(nothing)
    except Exception as problem:  # whatever a library raises is its result
        functions, error = [], reason_of(problem)
        _check_alive(plan, error)
    return _Variant(functions, time.perf_counter() - began, error)


def _spent(plan: Plan) -> _Variant:
    return _Variant(error=f"left out: {plan.seconds:g} s are spent")


def _check_alive(plan: Plan, error: str) -> None:
    """After an illegal access, everything on the GPU fails until the process ends."""
    try:
        timing.synchronize(plan.device)
    except Exception as dead:
        raise _Unusable(f"the GPU fails since: {error}") from dead


def _row(
    plan: Plan,
    layer: Layer,
    scheme: Scheme,
    dense: Tensor,
    x: Tensor,
    variants: dict[str, _Variant],
    floor: Turn,
    deadline: float,
) -> Row:
    """Warm up every variant, then time all of them and the floor in turns."""
    exact = _exact(x, dense[:CHANNELS])
    turns: dict[str, Turn] = {}
    partials: dict[str, Record] = {}
    for provider, variant in variants.items():
        if not variant.error and provider not in (BF16, LOWBIT) and plan.clock() > deadline:
            variant = _spent(plan)
        record = _blank(layer, scheme, x, provider, variant)
        if not variant.error:
            try:
                record, turns[provider] = _prepared(plan, record, variant.functions, x, exact)
            except Exception as problem:  # whatever a library raises is its result
                record = dataclasses.replace(record, error=reason_of(problem))
                _check_alive(plan, record.error)
        partials[provider] = record
    if LOWBIT in turns:
        partials[LOWBIT] = _judged(plan, partials[LOWBIT], scheme, variants[LOWBIT].functions[0], x)
    if hold := timing.hold_for(x.shape[0], plan.device):
        timings = timing.take_turns({FLOOR: floor}, plan.rounds) | timing.take_turns(turns, plan.rounds, hold=hold)
    else:
        timings = timing.take_turns({FLOOR: floor, **turns}, plan.rounds)
    for provider, found in timings.items():
        if isinstance(found, Exception):
            _check_alive(plan, f"{provider}: {reason_of(found)}")
    return Row(tuple(finished(list(partials.values()), timings)))


def _blank(layer: Layer, scheme: Scheme, x: Tensor, provider: str, variant: _Variant) -> Record:
    act = scheme.act.spec if scheme.act else ""
    packed = scheme.weight.nbytes(layer.n, layer.k)
    return Record(
        layer.name, layer.n, layer.k, x.shape[0], scheme.weight.spec, act, provider, copies=len(variant.functions),
        nbytes=2 * layer.n * layer.k if provider == BF16 else packed, setup_s=variant.setup_s, error=variant.error,
    )  # fmt: skip


def _prepared(plan: Plan, record: Record, functions: list[Function], x: Tensor, exact: Tensor) -> tuple[Record, Turn]:
    """A provider warmed up and ready to be timed, with the distance of its result from exact arithmetic."""
    began = time.perf_counter()
    y = functions[0](x)
    if tuple(y.shape) != (record.m, record.n):
        raise RuntimeError(f"its result has shape {tuple(y.shape)}, not {(record.m, record.n)}")
    # Looked at before the next call: a library may give the same memory to a later result.
    sqnr = sqnr_db(exact, y[:, :CHANNELS])
    calls: list[Call] = [partial(f, x) for f in functions]
    timing.warm_up(calls, plan.device)
    record = dataclasses.replace(record, warmup_s=time.perf_counter() - began, sqnr_dense_db=sqnr)
    return record, timing.turn_of(calls, plan.device)


def _judged(plan: Plan, record: Record, scheme: Scheme, function: Function, x: Tensor) -> Record:
    """lowbit's record with its kernel and its error against the quantized operands."""
    problem = Problem(
        record.m, record.n, record.k, record.weight, record.act, x.dtype, plan.device.type, arch_of(plan.device)
    )
    assert isinstance(function, _Linear)
    w = function.weight
    assert isinstance(w, QuantizedTensor)
    rows = w[:CHANNELS]
    assert isinstance(rows, QuantizedTensor)
    a = x if w.act is None else w.act.format.dequantize(w.act.quantize(x, w.act_scale), *x.shape)
    sqnr = sqnr_db(_exact(a, rows.dequantize(torch.float32)), function(x)[:, :CHANNELS])
    return dataclasses.replace(
        record, kernel=select(problem).kernel.name, sqnr_db=sqnr, sqnr_limit_db=scheme.weight.kernel_sqnr_db
    )


def _exact(x: Tensor, w: Tensor) -> Tensor:
    return x.double() @ w.double().T


def environment(plan: Plan, command: str) -> dict[str, Any]:
    """What a result has to name beside its numbers."""
    more = {"cold_bytes": timing.COLD_BYTES, "rounds": plan.rounds, "seconds": plan.seconds,
            "held_from": timing.HELD_FROM, "hold_seconds": timing.HOLD_SECONDS}  # fmt: skip
    return about(plan.device, command) | {"peers": {peer.name: peer.versions() for peer in plan.peers}} | more
