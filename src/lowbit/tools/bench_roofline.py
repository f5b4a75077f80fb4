"""`lowbit roofline`: the ceilings of this machine, and ReLU -> Linear against what they allow.

The harness is that of `bench linear`: weights rotate through more than the cache, all variants of a row take turns in
CUDA graphs, medians. Inputs stay where the layer before would have left them: in the cache, if they fit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import operand_ops, ops
from lowbit.configs import Scheme
from lowbit.kernels.problem import Problem, arch_of
from lowbit.kernels.select import select
from lowbit.kernels.triton.launch import OPTIONS
from lowbit.tensor import QuantizedTensor
from lowbit.tools import timing
from lowbit.tools.bench_rows import LeftOut, reason_of
from lowbit.tools.roofline import BF16, Ceilings, RooflineRow, Shape, row_of
from lowbit.tools.timing import Call

MIB = 1 << 20
#: Bytes of the reads, and the side of the square matmuls, of a GPU and of a CPU.
READS = {"cuda": (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB), "cpu": (MIB // 16, MIB, 16 * MIB)}
SIDE = {"cuda": 8192, "cpu": 512}
ROUNDS = 7


@dataclass
class Plan:
    """What to measure, and for how long rows may be started."""

    shapes: Sequence[Shape]
    recipes: dict[str, Scheme]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 300.0
    rounds: int = timing.ROUNDS
    clock: Callable[[], float] = time.monotonic


# Ceilings ----------------------------------------------------------------------------------------


def measure_ceilings(device: torch.device) -> Ceilings:
    """Reads of several sizes, matmuls of every unit that this machine has, and an empty kernel."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    reads = tuple((size, _seconds(timing.read_calls(size, device), device)) for size in READS[kind])
    peaks, missing = dict[str, float](), dict[str, str]()
    for unit, make in (("bf16", _bf16), ("float8", _float8), ("int8", _int8), ("int8", _int8_here)):
        if kind == "cpu" and (unit == "float8" or (unit == "int8" and not _multiplies_codes(device))):
            missing[unit] = "kernels on this CPU multiply in fp32"
            continue
        try:
            hold = timing.hold_for(SIDE[kind], device)
            speed = 2 * SIDE[kind] ** 3 / _seconds(make(SIDE[kind], device), device, hold)
            peaks[unit] = max(speed, peaks.get(unit, 0))
            missing.pop(unit, None)
        except (RuntimeError, ValueError, TypeError) as error:  # a unit that the GPU or this torch does not have
            if unit == BF16:
                raise
            if unit not in peaks:
                missing[unit] = reason_of(error)
    return Ceilings(reads, peaks, _seconds(_empty(device), device), missing)


def _multiplies_codes(device: torch.device) -> bool:
    """Whether int8 meets int8 without becoming something else."""
    problem = Problem(64, 64, 64, "int8:row", "int8:row", torch.bfloat16, device.type, arch_of(device))
    return ops.operand_dtype(problem) == torch.int8


def _seconds(calls: Sequence[Call], device: torch.device, hold: float = 0.0) -> float:
    """Median seconds of one call."""
    timing.warm_up(calls, device)
    return timing.median_of(timing.turn_of(calls, device), ROUNDS, hold) / 1e6


def _squares(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=random, device=device, dtype=torch.bfloat16) for _ in range(2))
    return a, b


def _bf16(side: int, device: torch.device) -> list[Call]:
    a, b = _squares(side, device)
    return [partial(torch.mm, a, b.T)] * 2


def _float8(side: int, device: torch.device) -> list[Call]:
    """With fast accumulation and one scale: what the units can do, not what is exact enough to be used here."""
    a, b = (t.to(torch.float8_e4m3fn) for t in _squares(side, device))
    one = torch.ones((), device=device)
    call = partial(torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return [call] * 2


def _int8_squares(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = ((t * 40).clamp(-128, 127).to(torch.int8) for t in _squares(side, device))
    return a, b


def _int8(side: int, device: torch.device) -> list[Call]:
    a, b = _int8_squares(side, device)
    return [partial(torch._int_mm, a, b.T)] * 2


def _int8_here(side: int, device: torch.device) -> list[Call]:
    """PyTorch's products of integers are not the fastest there are on a GPU: what lowbit runs in their place."""
    a, b = _int8_squares(side, device)
    ones = torch.ones(side, 1, device=device)
    how = ("int8:row", "int8:row", side, side, torch.bfloat16, False)
    return [partial(ops.linear_of_operand, a, ones, [b, ones], None, *how)] * 2


def _empty(device: torch.device) -> list[Call]:
    if device.type != "cuda":
        return [torch.empty(0).relu_] * 64
    from lowbit.tools.read_kernel import empty_kernel

    nothing = torch.empty(1, dtype=torch.int32, device=device)

    def launch() -> None:
        empty_kernel[(1,)](nothing, num_warps=1, **OPTIONS)

    return [launch] * 64


# Layers ------------------------------------------------------------------------------------------


def bench_roofline(
    plan: Plan, ceilings: Ceilings, on_row: Callable[[RooflineRow], None] = lambda row: None
) -> tuple[list[RooflineRow], list[LeftOut]]:
    """Measure every shape in every recipe until the plan's seconds are spent; the rows, and what was left out."""
    rows: list[RooflineRow] = []
    todo = [(shape, recipe) for shape in plan.shapes for recipe in plan.recipes]
    gpu = torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), gpu:
        for row in _rows(plan, ceilings):
            rows.append(row)
            on_row(row)
    left = [
        LeftOut(f"{s.m}x{s.k}x{s.n}", recipe, s.m, f"{plan.seconds:g} s are spent") for s, recipe in todo[len(rows) :]
    ]
    return rows, left


def _rows(plan: Plan, ceilings: Ceilings) -> Iterator[RooflineRow]:
    deadline = plan.clock() + plan.seconds
    for shape in plan.shapes:
        if plan.clock() > deadline:
            return
        random = torch.Generator(plan.device).manual_seed(0)
        x, dense = (
            torch.randn(rows, shape.k, generator=random, device=plan.device, dtype=torch.bfloat16)
            for rows in (shape.m, shape.n)
        )
        weights = [dense, *(dense.clone() for _ in range(timing.copies_for(dense.nbytes) - 1))]
        for recipe, scheme in plan.recipes.items():
            if plan.clock() > deadline:
                return
            try:
                yield _measured(plan, ceilings, shape, recipe, scheme, x, weights)
            except Exception as problem:  # whatever goes wrong with one row is its result
                yield row_of(shape, recipe, scheme, ceilings, error=reason_of(problem))
                timing.synchronize(plan.device)  # a GPU that does not answer any more ends the run here
        del weights, dense, x


def _measured(
    plan: Plan, ceilings: Ceilings, shape: Shape, recipe: str, scheme: Scheme, x: Tensor, weights: list[Tensor]
) -> RooflineRow:
    """Both layers and their parts, in turns."""
    n, k = weights[0].shape
    problem = Problem(
        shape.m, n, k, scheme.weight.spec, scheme.act.spec if scheme.act else "", x.dtype, plan.device.type,
        arch_of(plan.device),
    )  # fmt: skip
    first = QuantizedTensor.from_float(weights[0], scheme.weight, scheme.act)
    packed: list[Any] = [first, *(first.clone() for _ in range(timing.copies_for(first.nbytes_packed) - 1))]
    dtype = ops.operand_dtype(problem)
    layer = _Layer(problem, dtype)
    given = layer.before(x)
    variants: dict[str, list[Call]] = {
        "b_bf16_gemm_s": [partial(F.linear, x, w) for w in weights],
        "b_bf16_ovhd_s": [partial(F.relu, x)] * 4,
        "b_bf16_e2e_s": [partial(_bf16_layer, x, w) for w in weights],
        "b_q_gemm_s": [partial(layer.multiply, given, w) for w in packed],
        "b_q_ovhd_s": [partial(layer.before, x)] * 4,
        "b_q_e2e_s": [partial(layer, x, w) for w in packed],
    }
    if scheme.act is not None:
        variants["b_q_quant_s"] = [partial(operand_ops.quantized, x, None, problem.act, dtype or torch.bfloat16)] * 4
    turns = {}
    for name, calls in variants.items():
        timing.warm_up(calls, plan.device)
        turns[name] = timing.turn_of(calls, plan.device)
    found = timing.take_turns(turns, plan.rounds, hold=timing.hold_for(shape.m, plan.device))
    for name, timed in found.items():
        if isinstance(timed, Exception):
            raise RuntimeError(f"{name} does not run") from timed
    observed = {name: timed.us / 1e6 for name, timed in found.items() if isinstance(timed, timing.Timing)}
    return row_of(shape, recipe, scheme, ceilings, select(problem).kernel.name, dtype is not None, observed)


def _bf16_layer(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x), w)


@dataclass(frozen=True)
class _Layer:
    """ReLU -> Linear as lowbit runs it: codes handed over where the kernel takes them (in `dtype`), else one by one."""

    problem: Problem
    dtype: torch.dtype | None

    def before(self, x: Tensor) -> Any:
        if self.dtype is None:
            return F.relu(x)
        return operand_ops.relu_quantized(x, None, self.problem.act, self.dtype)

    def multiply(self, given: Any, w: QuantizedTensor) -> Tensor:
        if self.dtype is None:
            return F.linear(given, w)
        p = self.problem
        return ops.linear_of_operand(*given, list(w.planes.values()), None, p.format, p.act, p.n, p.k, p.dtype, False)

    def __call__(self, x: Tensor, w: QuantizedTensor) -> Tensor:
        return self.multiply(self.before(x), w)


def document(
    about: dict[str, Any], ceilings: Ceilings, rows: Sequence[RooflineRow], left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """What the JSON file holds."""
    found = {"ceilings": asdict(ceilings), "records": [asdict(row) for row in rows]}
    return about | found | {"left_out": [asdict(x) for x in left_out]}
