"""What `lowbit bench` measured: records, what follows from the times of a row, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.tools.doctor import machine
from lowbit.tools.timing import Timing

BF16, LOWBIT, FLOOR = "bf16", "lowbit", "floor"
# A peer may quantize differently (other ranges, zero points) and be a little further from the original weights than
# lowbit. So much further is no choice: it computes something else, and its time says nothing.
WRONG_DB = 6.0


@dataclass(frozen=True)
class Record:
    """One provider in one row. Times are microseconds of one call.

    Attributes:
        weight, act: the row's scheme, also in the records of bf16 and of peers.
        kernel: what lowbit chose; empty for others.
        us, us_min, us_max, samples: the median over turns, their spread and number.
        nbytes: of the weight: packed (for peers lowbit's, so that GB/s compare), or bf16.
        gb_s: `nbytes` by the time.
        speedup: over bf16 of the same row.
        floor_us, floor_share: the time of reading `nbytes`, and what share of `us` that is.
        sqnr_db, sqnr_limit_db: lowbit's result against fp64 on the quantized operands, and the least its format allows.
        sqnr_dense_db: the result against fp64 on the weights before quantization.
        setup_s: quantizing and packing all copies (once per layer and scheme).
        warmup_s: compiling and tuning, before anything is timed.
        error: why there is no time, or why it does not count; empty otherwise.
    """

    layer: str
    n: int
    k: int
    m: int
    weight: str
    act: str
    provider: str
    kernel: str = ""
    us: float | None = None
    us_min: float | None = None
    us_max: float | None = None
    samples: int = 0
    copies: int = 0
    nbytes: int = 0
    gb_s: float | None = None
    tflop_s: float | None = None
    speedup: float | None = None
    floor_us: float | None = None
    floor_share: float | None = None
    sqnr_db: float | None = None
    sqnr_limit_db: float | None = None
    sqnr_dense_db: float | None = None
    setup_s: float = 0.0
    warmup_s: float = 0.0
    error: str = ""

    @property
    def scheme(self) -> str:
        return scheme_name(self.weight, self.act)


def scheme_name(weight: str, act: str) -> str:
    """A scheme as it is asked for: `weight`, or `weight+activation`."""
    return f"{weight}+{act}" if act else weight


@dataclass(frozen=True)
class Row:
    """All records of a layer, a scheme and a number of tokens."""

    records: tuple[Record, ...]

    def of(self, provider: str) -> Record:
        return next(r for r in self.records if r.provider == provider)

    @property
    def peers(self) -> list[Record]:
        return [r for r in self.records if r.provider not in (BF16, LOWBIT)]

    @property
    def best_peer(self) -> Record | None:
        """The fastest peer whose time counts."""
        return min((r for r in self.peers if r.us and not r.error), key=lambda r: r.us or math.inf, default=None)

    @property
    def ratio(self) -> float | None:
        """Time of the best peer over lowbit's: above 1, lowbit is faster."""
        best, ours = self.best_peer, self.of(LOWBIT).us
        return best.us / ours if best and best.us and ours else None


@dataclass(frozen=True)
class Memory:
    """Bytes of GPU memory: what tensors held at most, and what PyTorch had reserved for them."""

    allocated: int
    reserved: int

    @staticmethod
    def larger(a: Memory | None, b: Memory | None) -> Memory | None:
        """The larger of each."""
        if a is None or b is None:
            return a or b
        return Memory(max(a.allocated, b.allocated), max(a.reserved, b.reserved))


@dataclass(frozen=True)
class GenerateRow:
    """A model in one config, for a number of sequences and a length of their prompts.

    Attributes:
        tokens_per_second: of decoding, over the whole batch.
        step_us, step_us_min, step_us_max, samples: of one token per sequence: the median over generations.
        speedup, first_token_speedup: over bf16 of the same batch and prompt.
        first_token_ms: from the prompt to the token on the host, with a graph of prompts of up to 4096 tokens; `eager`
            without it.
        weight_bytes: that a step reads: all linear layers, packed.
        gb_s: `weight_bytes` by the time of a step.
        floor_us, floor_share: the time of reading as many bytes alone, and what share of the step that is.
        linears_us: all linear layers alone, in a graph of their own.
        other_us: the rest of the step: attention, norms, choosing the token, gaps. May be negative where the linear
            layers run while others do.
        model_bytes: of all weights, the embedding included.
        graph_bytes: GPU memory that the CUDA graphs hold.
        peak_make, peak_capture, peak_prefill, peak_decode: the most memory in each phase; None on a CPU.
        make_s, quantize_s: making the model with its quantization, and the quantization alone.
        capture_s: everything before something is timed: compiling, warming up, capturing graphs.
        error: why there are no times; empty otherwise.
    """

    model: str
    config: str
    batch: int
    prompt: int
    new_tokens: int
    tokens_per_second: float | None = None
    step_us: float | None = None
    step_us_min: float | None = None
    step_us_max: float | None = None
    samples: int = 0
    speedup: float | None = None
    first_token_ms: float | None = None
    first_token_eager_ms: float | None = None
    first_token_speedup: float | None = None
    weight_bytes: int = 0
    gb_s: float | None = None
    floor_us: float | None = None
    floor_share: float | None = None
    linears_us: float | None = None
    other_us: float | None = None
    model_bytes: int = 0
    graph_bytes: int = 0
    peak_make: Memory | None = None
    peak_capture: Memory | None = None
    peak_prefill: Memory | None = None
    peak_decode: Memory | None = None
    make_s: float = 0.0
    quantize_s: float = 0.0
    capture_s: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A row that was not measured, and why."""

    layer: str
    scheme: str
    m: int
    reason: str


def finished(records: Sequence[Record], timings: Mapping[str, Timing | Exception]) -> list[Record]:
    """Records with everything that follows from the times of a row."""
    bf16, floor = timings.get(BF16), timings.get(FLOOR)
    ours = next((r.sqnr_dense_db for r in records if r.provider == LOWBIT), None)
    out = []
    for r in records:
        t = timings.get(r.provider)
        if isinstance(t, Timing):
            changes: dict[str, Any] = dataclasses.asdict(t)
            changes |= {"gb_s": r.nbytes / t.us / 1e3, "tflop_s": 2 * r.m * r.n * r.k / t.us / 1e6}
            if isinstance(bf16, Timing):
                changes["speedup"] = bf16.us / t.us
            if isinstance(floor, Timing) and r.provider != BF16:
                changes |= {"floor_us": floor.us, "floor_share": floor.us / t.us}
            r = dataclasses.replace(r, **changes)
        elif isinstance(t, Exception):
            r = dataclasses.replace(r, error=reason_of(t))
        if r.us is not None and r.provider not in (BF16, LOWBIT) and is_wrong(r.sqnr_dense_db, ours):
            text = f"wrong result: {r.sqnr_dense_db:.1f} dB from the original weights, lowbit {ours:.1f} dB"
            r = dataclasses.replace(r, error=text)
        out.append(r)
    return out


def is_wrong(theirs: float | None, ours: float | None) -> bool:
    """Whether a peer computes something else. A result that is not a number is wrong, too."""
    return theirs is not None and ours is not None and not theirs > ours - WRONG_DB


def reason_of(error: BaseException) -> str:
    """An error in one line, with the error that it hides (leaving a failed capture raises another one)."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 400 else text[:400] + " ..."
    hidden = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return text if hidden is None else f"{text}; before that {reason_of(hidden)}"


# The file ----------------------------------------------------------------------------------------


def about(device: torch.device, command: str) -> dict[str, Any]:
    """What a result has to name beside its numbers."""
    from lowbit import __version__

    gpu, facts = device.type == "cuda", machine()
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "processor": facts["processor"],
        "threads": torch.get_num_threads(),
        "lowbit": __version__,
        "torch": torch.__version__,
        "triton": facts["triton"],
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def document(
    about: dict[str, Any], rows: Sequence[Row] | Sequence[GenerateRow], left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """What the JSON file holds. JSON has no NaN: it is null."""
    flat = [r for row in rows for r in (row.records if isinstance(row, Row) else (row,))]
    records = [_finite(dataclasses.asdict(r)) for r in flat]
    return about | {"records": records, "left_out": [dataclasses.asdict(x) for x in left_out]}


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_json` wrote."""
    records = [Record(**r) for r in json.loads(path.read_text(encoding="utf-8"))["records"]]
    rows: dict[tuple[str, str, str, int], list[Record]] = {}
    for r in records:
        rows.setdefault((r.layer, r.weight, r.act, r.m), []).append(r)
    return [Row(tuple(group)) for group in rows.values()]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all: who stops the program keeps what the last row had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
