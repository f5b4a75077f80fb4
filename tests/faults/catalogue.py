"""All kinds of faults: what happens, what lowbit promises then, and how often it is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from faults import (
    bit_flips,
    cache_writers,
    configs,
    disk,
    golden,
    guided,
    headers,
    kills,
    memory,
    parsers,
    pickles,
    resumes,
    shapes,
    values,
)
from faults.outcome import Outcome


class Fault(NamedTuple):
    """One kind.

    Attributes:
        run: takes a number of cases and an empty directory; some faults have several cases for each.
        full: how many for docs/reliability.md.
        few: how many for CI.
        needs: a package without which it cannot be brought about.
    """

    name: str
    happens: str
    promise: str
    run: Callable[[int, Path], Outcome]
    full: int
    few: int
    needs: str | None = None

    @property
    def file(self) -> str:
        return f"faults/{self.run.__module__.rpartition('.')[2]}.py"


FAULTS = (
    Fault(
        "bit flips", "one bit of a checkpoint's files flips", "refused; file and tensor named; model unchanged",
        bit_flips.run, 1000, 60,
    ),
    Fault(
        "headers", "a safetensors header lies", "refused by file; model unchanged; without checksums no other error",
        headers.run, 3000, 100,
    ),
    Fault(
        "configs by hand", "a config contradicts the tensors, for each convention that is read",
        "refused for its own reason without checksums; model unchanged", configs.run_by_hand, 40, 40,
    ),
    Fault(
        "configs at random", "anything in a JSON file changes, or in another tool's tensors, for each convention",
        "one kind of error that names the place, or a model; never half of one", configs.run_at_random,
        3600, 120,
    ),
    Fault(
        "language models", "a GGUF file or a Hugging Face config is damaged", "one kind of error that names the file",
        configs.run_language_models, 2000, 60,
    ),
    Fault(
        "pickles", "a pickle lies where weights should be, under any name", "refused; no code runs",
        pickles.run, 12, 12,
    ),
    Fault(
        "kills", "SIGKILL at a random point of quantize and save",
        "the old checkpoint, the new one or none that loads; another run gives equal files", kills.run, 100, 8,
    ),
    Fault(
        "resumes", "SIGKILL at a random point of a quantization with a journal, and again when it goes on",
        "the next run goes on behind the last finished block: bits, report and files of a run without a kill",
        resumes.run, 100, 6,
    ),
    Fault(
        "journals", "one bit of a journal flips, or a file of it is cut short",
        "the block is done again, with a warning, or the run is refused; bits of a run without damage",
        resumes.run_damaged, 500, 12,
    ),
    Fault(
        "disk", "a disk is full, or one request of a save fails, at every request",
        "OSError; the old checkpoint is there, or the new one", disk.run, 200, 24,
    ),
    Fault(
        "memory", "memory runs out (or Ctrl-C comes) at a layer of quantize_",
        "with restore=True the same tensors; else the error lists what is done, and going on gives equal bits",
        memory.run, 99, 2,
    ),
    Fault(
        "loading", "memory runs out (or Ctrl-C comes) at a tensor of load", "a model on the meta device is as it was",
        memory.run_loading, 99, 99,
    ),
    Fault(
        "cache", "16 processes write kernels to the cache and are killed at random", "none lost, none torn",
        cache_writers.run, 200, 20,
    ),
    Fault(
        "weights", "zero, denormal and huge groups side by side, NaN, Inf; all formats",
        "bits of the NumPy definition, finite, zeros exact; NaN and Inf counted and refused", values.run_weights,
        504, 84,
    ),
    Fault(
        "activations", "tokens of zeros, denormal, huge, NaN, Inf; all dynamic configs",
        "zeros give zeros, finite tokens finite outputs; a broken token breaks itself alone", values.run_activations,
        500, 30,
    ),
    Fault(
        "old files", "a checkpoint is older than the library", "equal bits, every scheme", golden.run,
        999, 999,
    ),
    Fault(
        "parsers", "any bytes reach a parser", "read, or refused with ValueError", parsers.run, 5000, 100,
    ),
    Fault(
        "coverage", "the same, led by what of lowbit's code the last bytes reached",
        "read, or refused with ValueError; no input takes 20 seconds", guided.run, 20_000, 300, needs="atheris",
    ),
    Fault(
        "shapes", "N and K are 1, 2, 3, 31, ... 4097, in groups of 32, 64, 128 and K",
        "right as fp32 can be, or an error with a name; no process dies", shapes.run, 784, 60,
    ),
)  # fmt: skip
