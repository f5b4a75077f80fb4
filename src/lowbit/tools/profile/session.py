"""`profile(model, run)`: everything about a model in a few runs."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.tools.doctor import machine
from lowbit.tools.profile.layers import state_tensors
from lowbit.tools.profile.recorder import Profiler
from lowbit.tools.profile.result import Profile, build
from lowbit.tools.timing import read_calls, synchronize, turn_of, warm_up

#: Bytes whose reading is the ceiling: more than caches hold, as the weights of a model are.
_CEILING_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}
Phase = Callable[[str], AbstractContextManager[Callable[[nn.Module], None]]]


@dataclass(frozen=True)
class Files:
    """Raw recordings: a Chrome trace (compressed if its name ends in `.gz`), and a GPU's allocator history."""

    trace: Path | None = None
    snapshot: Path | None = None


def profile(
    model: nn.Module | Callable[[Phase], nn.Module],
    run: Callable[[nn.Module, Phase], Any],
    *,
    device: torch.device | str | None = None,
    title: str = "",
    few_tokens: Sequence[str] = ("decode",),
    tokens: Mapping[str, int] | None = None,
    recorded: Callable[[nn.Module, Phase], Any] | None = None,
    recorded_tokens: Mapping[str, int] | None = None,
    files: Files | None = None,
) -> Profile:
    """Run `run` four times, each time watching something else, and join what was seen.

        def run(model, phase):
            with phase("prefill"):
                model(prompt)
            with phase("decode"):
                model(token)

        print(profile(model, run).verdicts)

    First allocations and what becomes of quantized weights, with compiled parts uncompiled; then a run to warm up; the
    time of the phases; kernels and operations.

    Args:
        model: the model, or a function that loads it and marks its own phases; `with phase("load") as count:
            count(model)` makes weights that a file maps into memory part of that phase.
        run: the work, marked with phases; `phase(name)` is a context manager.
        device: where the model runs; default: where it is, or the CPU for one that is yet to be loaded.
        title: what the profile is called; default: the class of the model.
        few_tokens: phases with so few tokens that a block or a kernel of a weight's size is no activation.
        tokens: how many tokens each phase has, for the report.
        recorded: a shorter `run` for the runs that are recorded, whose every operation costs time and space, and its
            `recorded_tokens`. The time of phases is that of `run`.
        files: raw recordings to write.

    Returns:
        The profile. If memory ran out it has what was recorded until then, and `error` says so.
    """
    files, recorded = files or Files(), recorded or run
    if device is None:
        tensors = state_tensors(model) if isinstance(model, nn.Module) else iter(())
        device = next((t.device for t in tensors), torch.device("cpu"))
    p = Profiler(device)
    error = ""
    try:
        with torch.no_grad():
            with p.memory(files.snapshot):
                loaded = model if isinstance(model, nn.Module) else model(p.phase)
                p.watch(loaded)
                with p.dequant():
                    recorded(loaded, p.phase)
            with p.warm_up():
                run(loaded, p.phase)
            with p.clock():
                run(loaded, p.phase)
            with p.kernels():
                recorded(loaded, p.phase)
    except torch.OutOfMemoryError as caught:
        error = f"out of memory: {str(caught).splitlines()[0]}"
    if files.trace is not None:
        p.write_trace(files.trace)
    return build(
        title or (type(model).__name__ if isinstance(model, nn.Module) else "model"),
        describe(p.device),
        p.found.layers,
        spans=p.spans,
        reads=p.tracer.reads if p.tracer is not None else (),
        written=p.tracer.written if p.tracer is not None else (),
        ran=p.tracer.ran if p.tracer is not None else (),
        caches=p.tracer.caches if p.tracer is not None else (),
        events=p.memory_events,
        memory_base=p.memory_base,
        trace=p.trace,
        ceiling_gb_s=None if error else read_ceiling(p.device),
        few_tokens=few_tokens,
        tokens=tokens,
        recorded_tokens=recorded_tokens,
        error=error,
    )


def read_ceiling(device: torch.device) -> float:
    """GB/s at which this device reads memory that no cache holds: the median of five readings."""
    size = _CEILING_BYTES[device.type]
    calls = read_calls(size, device)[:2]
    warm_up(calls, device)
    turn = turn_of(calls, device)
    us = statistics.median(turn() for _ in range(5))
    synchronize(device)
    return size / us / 1e3


def describe(device: torch.device) -> dict[str, str]:
    """Device and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["processor"]
    out = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        out["cuda"] = str(torch.version.cuda)
    else:
        out["threads"] = str(torch.get_num_threads())
    return out
