"""`lowbit bench generate`: speed and memory of a language model in bf16 and in lowbit's schemes, and a token's budget.

Models have the shape of a known one and random weights, which are as fast as real ones. A row is a config, a number of
sequences and a length of the prompts. A step is what `Session` runs: on a GPU one CUDA graph. Beside it stand two times
of the same weights: all linear layers alone, in a graph of their own, and reading as many bytes once. What the step
takes beyond the first is norms, attention, choosing the token, and gaps; what the linear layers take beyond the second
is theirs to lose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.configs import Scheme
from lowbit.kernels.problem import early_launches
from lowbit.models.inference import linear
from lowbit.models.llama import Llama
from lowbit.models.random import Made, random_model
from lowbit.models.session import Session
from lowbit.models.shapes import shape_of
from lowbit.tools import timing
from lowbit.tools.bench_rows import BF16, GenerateRow, LeftOut, Memory, reason_of
from lowbit.tools.sources import weight_bytes

COMPILED = "bf16 torch.compile"
ROUNDS = 3
# Larger reads are hardly faster: they are not made, their time is scaled up.
READ_BYTES = 1 << 30
# Longer prompts take the GPU longer than their launches take, and a graph of them much memory.
PROMPT_GRAPH_TOKENS = 4096


@dataclass
class Plan:
    """What to measure, and for how long rows may be started. bf16 is measured first, asked for or not.

    Attributes:
        shape: a name in `models.shapes`.
        configs: schemes under the names that rows shall have.
        batches, prompts, new_tokens: sequences, tokens of each prompt, steps of a generation.
        compiled: whether to measure bf16 under plain `torch.compile`, too.
        rounds: generations of which the median counts.
    """

    shape: str
    configs: Mapping[str, Scheme]
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (128,)
    new_tokens: int = 64
    compiled: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 300.0
    rounds: int = ROUNDS
    clock: Callable[[], float] = time.monotonic

    @property
    def variants(self) -> list[tuple[str, Scheme | None]]:
        """Names of the configs in their order, and what they quantize to."""
        compiled: list[tuple[str, Scheme | None]] = [(COMPILED, None)] if self.compiled else []
        return [(BF16, None), *compiled, *self.configs.items()]


def bench_generate(
    plan: Plan,
    on_row: Callable[[GenerateRow], None] = lambda row: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[list[GenerateRow], list[LeftOut]]:
    """Measure every config, batch and prompt until the plan's seconds are spent, or somebody interrupts.

    Args:
        on_row: called with each row when it is complete.
        on_stage: called with what is done next.

    Returns:
        the rows, and what was left out.
    """
    rows: list[GenerateRow] = []
    todo = [(name, b, p) for name, _ in plan.variants for b in plan.batches for p in plan.prompts]
    reason, gpu = f"{plan.seconds:g} s are spent", contextlib.nullcontext()
    if plan.device.type == "cuda":
        gpu = torch.cuda.device(plan.device)  # type: ignore[assignment]
    try:
        with torch.inference_mode(), gpu:
            for row in _rows(plan, on_stage):
                row = _compared(row, rows)
                rows.append(row)
                on_row(row)
    except KeyboardInterrupt:
        reason = "interrupted"
    left = [LeftOut(plan.shape, f"{name}, batch {b}, prompt {p}", b, reason) for name, b, p in todo[len(rows) :]]
    return rows, left


def _rows(plan: Plan, on_stage: Callable[[str], None]) -> Iterator[GenerateRow]:
    config = shape_of(plan.shape)
    deadline = plan.clock() + plan.seconds
    floors = _Floors(plan.device)
    for name, scheme in plan.variants:
        if plan.clock() > deadline:
            return
        on_stage(f"{plan.shape} in {name}: making weights")
        _collect(plan.device)
        made: Made | None = None
        error = ""
        try:
            with _Peak(plan.device) as making:
                made = random_model(config, scheme, plan.device)
        except Exception as problem:  # whatever goes wrong with one config is its result
            error = reason_of(problem)
        for batch in plan.batches:
            for prompt in plan.prompts:
                if plan.clock() > deadline:
                    return
                row = GenerateRow(plan.shape, name, batch, prompt, plan.new_tokens, error=error)
                if made is not None:
                    row = dataclasses.replace(
                        row, model_bytes=weight_bytes(made.model), make_s=made.seconds,
                        quantize_s=made.quantize_seconds, peak_make=making.found,
                    )  # fmt: skip
                    on_stage(f"{name}, batch {batch}, prompt {prompt}")
                    try:
                        row = _measured(plan, row, made.model, floors, compiled=name == COMPILED)
                    except Exception as problem:
                        row = dataclasses.replace(row, error=reason_of(problem))
                yield row
        made = None


def _measured(plan: Plan, row: GenerateRow, model: Llama, floors: _Floors, compiled: bool) -> GenerateRow:
    """One row: the prompt, the steps, then the linear layers alone and the floor."""
    _collect(plan.device)
    capacity = row.prompt + plan.new_tokens + 1
    random = torch.Generator(plan.device).manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (row.batch, row.prompt), generator=random, device=plan.device)
    session: Any
    began = time.perf_counter()
    with _Peak(plan.device) as capturing:
        if compiled:
            from lowbit.tools.bench_compiled import CompiledSession

            session = CompiledSession(model, row.batch, capacity)
        else:
            session = Session(model, row.batch, capacity)
        first_token(session, ids)
    capture = time.perf_counter() - began
    with _Peak(plan.device) as reading:
        eager = [first_token(session, ids) for _ in range(plan.rounds)]
    if row.batch * row.prompt <= PROMPT_GRAPH_TOKENS:
        began = time.perf_counter()
        session.capture_prompt(row.prompt)
        capture += time.perf_counter() - began
    with _Peak(plan.device) as reading_again:
        firsts = [first_token(session, ids) for _ in range(plan.rounds + 1)][1:]
    with _Peak(plan.device) as decoding:
        steps = timing.summarize([_step_us(plan, session, ids) for _ in range(plan.rounds)])
    nbytes = linear_bytes(model)
    linears = linears_us(model, row.batch, plan.device)
    floor = floors(nbytes)
    graph_bytes = session.graph_bytes
    del session
    return dataclasses.replace(
        row, tokens_per_second=row.batch / steps.us * 1e6, step_us=steps.us, step_us_min=steps.us_min,
        step_us_max=steps.us_max, samples=steps.samples, first_token_ms=statistics.median(firsts) * 1e3,
        first_token_eager_ms=statistics.median(eager) * 1e3, weight_bytes=nbytes, gb_s=nbytes / steps.us / 1e3,
        floor_us=floor, floor_share=floor / steps.us, linears_us=linears, other_us=steps.us - linears,
        peak_prefill=Memory.larger(reading.found, reading_again.found), peak_decode=decoding.found,
        peak_capture=capturing.found, graph_bytes=graph_bytes, capture_s=capture,
    )  # fmt: skip


def first_token(session: Any, ids: Tensor) -> float:
    """Seconds from the prompt to the first token on the host."""
    timing.synchronize(ids.device)
    started = time.perf_counter()
    session.prefill(ids)
    session.token.tolist()
    return time.perf_counter() - started


def _step_us(plan: Plan, session: Any, ids: Tensor) -> float:
    """Microseconds of a step: the mean over a generation, the host waiting only at its end."""
    session.prefill(ids)
    timing.synchronize(plan.device)
    started = time.perf_counter()
    for _ in range(plan.new_tokens):
        session.step()
    timing.synchronize(plan.device)
    return (time.perf_counter() - started) * 1e6 / plan.new_tokens


def _compared(row: GenerateRow, before: Sequence[GenerateRow]) -> GenerateRow:
    """The row with its speed over that of bf16 for the same batch and prompt."""
    base = next((r for r in before if (r.config, r.batch, r.prompt) == (BF16, row.batch, row.prompt)), None)
    base = row if row.config == BF16 else base
    if base is None or not base.step_us or not row.step_us:
        return row
    first = None
    if base.first_token_ms and row.first_token_ms:
        first = base.first_token_ms / row.first_token_ms
    return dataclasses.replace(row, speedup=base.step_us / row.step_us, first_token_speedup=first)


# The budget --------------------------------------------------------------------------------------


def linear_layers(model: Llama) -> list[nn.Linear]:
    """Every Linear that a token passes, in the order in which it does."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def linear_bytes(model: Llama) -> int:
    """Bytes of weights that one step reads: those of all linear layers, as stored."""
    weights = [layer.weight for layer in linear_layers(model)]
    return sum(getattr(w, "nbytes_packed", w.numel() * w.element_size()) for w in weights)


def linears_us(model: Llama, batch: int, device: torch.device) -> float:
    """Microseconds of all linear layers of a step, one after the other, with nothing in between."""
    layers = linear_layers(model)
    dtype = model.model.norm.weight.dtype
    inputs = {k: torch.randn(batch, k, dtype=dtype, device=device) for k in {layer.in_features for layer in layers}}

    def run() -> None:
        for layer in layers:
            linear(layer, inputs[layer.in_features])

    with early_launches():
        timing.warm_up([run], device)
        turn = timing.turn_of([run], device)
    return statistics.median(turn() for _ in range(5))


class _Floors:
    """Microseconds of reading so many bytes once, measured once for each number."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[int, float] = {}

    def __call__(self, nbytes: int) -> float:
        size = min(nbytes, READ_BYTES)
        if size not in self.known:
            calls = timing.read_calls(size, self.device)
            timing.warm_up(calls, self.device)
            turn = timing.turn_of(calls, self.device)
            self.known[size] = statistics.median(turn() for _ in range(7))
            del calls, turn
            _collect(self.device)
        return self.known[size] * nbytes / size


# Memory ------------------------------------------------------------------------------------------


class _Peak:
    """The most GPU memory that was allocated and reserved inside its `with` block; None elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: Memory | None = None

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.found = Memory(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
