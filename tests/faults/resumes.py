"""A quantization with a journal is killed at random points and goes on, or its journal is damaged in between.

    python -m faults.resumes CASES DIRECTORY

A program for the same reason as kills.py.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from torch import Tensor

from faults.kills import Lines, contents, killed_after, killed_at_line, run_program
from faults.outcome import Outcome
from faults.subjects import same_state
from lowbit import quantize_
from lowbit.report import LayerReport

SMALL = replace(CONFIG, num_layers=3, hidden_size=32, intermediate_size=32, num_heads=4)
ALGORITHMS = ("gptq", "awq+align", "rotation+smoothquant")
#: What writes and reads a journal: few of the lines that run, and those where a kill could do harm.
JOURNAL = ("journal.py", "resume.py", "checkpoints/files.py")
WHERE = {"at a line": ("",), "at a line of the journal": JOURNAL}


class Result(NamedTuple):
    """All that a run leaves."""

    state: dict[str, Tensor]
    layers: list[LayerReport]
    files: dict[str, bytes]
    from_journal: int

    def same(self, other: Result) -> bool:
        return same_state(self.state, other.state) and self[1:3] == other[1:3]


def quantize(directory: Path, algorithm: str) -> Result:
    model = tiny_llama(SMALL)
    rules = {"_default": "int4wo-16", "re:.*down_proj": "int8dq", "lm_head": "int8wo"}
    report = quantize_(
        model, rules, algorithm=algorithm, batches=[tiny_ids(seed=1), tiny_ids(seed=2)], journal=directory
    )
    return Result(dict(model.state_dict()), report.layers, contents(directory), report.from_journal)


# Kills ----------------------------------------------------------------------------------------------------------------


def run(cases: int, directory: Path) -> Outcome:
    """Every other time the run that goes on is killed as well, and a third one ends it."""
    return run_program("faults.resumes", cases, directory)


class Uninterrupted:
    """What an algorithm gives, and after how many lines and seconds."""

    def __init__(self, algorithm: str, directory: Path) -> None:
        self.algorithm, self.directory = algorithm, directory
        self.lines: dict[str, int] = {}
        self.result = quantize(directory / "warm", algorithm)
        started = time.perf_counter()
        repeated = quantize(directory / "timed", algorithm)
        self.seconds = time.perf_counter() - started
        assert repeated.same(self.result), "two runs without a kill differ"

    def line(self, how: str, rng: random.Random) -> int:
        """A random one of those that are counted."""
        if how not in self.lines:
            lines = Lines(files=WHERE[how])
            sys.settrace(lines)
            quantize(self.directory / how, self.algorithm)
            sys.settrace(None)
            self.lines[how] = lines.count
        return rng.randint(1, self.lines[how])

    def killed(self, directory: Path, how: str, rng: random.Random) -> bool:
        work = functools.partial(quantize, directory, self.algorithm)
        if how in WHERE:
            return killed_at_line(work, Lines(self.line(how, rng), WHERE[how]))
        return killed_after(work, rng.uniform(0, self.seconds))


def main(cases: int, directory: Path) -> Outcome:
    torch.set_num_threads(1)
    rng, outcome, attempts = random.Random(0), Outcome(), 0
    whole = [Uninterrupted(a, directory / a) for a in ALGORITHMS]
    while outcome.cases < cases:
        attempts += 1
        assert attempts <= 3 * cases, "processes end before they are killed"
        wanted, place, how = whole[attempts % len(whole)], directory / str(attempts), rng.choice([*WHERE, "at a time"])
        if not wanted.killed(place, how, rng):
            continue
        outcome.counts[how] += 1
        if attempts % 2 and wanted.killed(place, how, rng):
            outcome.counts["killed again"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill leaves nothing damaged
            got = quantize(place, wanted.algorithm)
        outcome.counts["layers from the journal"] += got.from_journal
        same = got.same(wanted.result)
        outcome.add(None if same else f"{wanted.algorithm}, killed {how}, {place.name}: other bits, rows or files")
    return outcome


# Damage ---------------------------------------------------------------------------------------------------------------


def run_damaged(cases: int, directory: Path) -> Outcome:
    """One bit of one file flips, or a file is cut short, when two of three blocks or all are finished."""
    rng, outcome, algorithm = random.Random(0), Outcome(), "rotation+smoothquant"
    whole = quantize(directory / "whole", algorithm)
    for case in range(cases):
        place = directory / str(case)
        shutil.copytree(directory / "whole", place)
        if case % 2:
            next(place.glob("block-00002-*")).unlink()
        path = rng.choice(sorted(place.iterdir()))
        raw = bytearray(path.read_bytes())
        if case % 4 < 2:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        else:
            raw = raw[: rng.randrange(len(raw))]
        path.write_bytes(raw)
        outcome.add(_used(place, algorithm, path.name, whole, outcome))
        shutil.rmtree(place)
    return outcome


def _used(place: Path, algorithm: str, damaged: str, whole: Result, outcome: Outcome) -> str | None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            got = quantize(place, algorithm)
        except ValueError as error:
            outcome.counts["refused"] += 1
            right = damaged == "run.json" and "has a damaged run.json" in str(error)
            return None if right else f"{damaged}: {error}"
    outcome.counts["blocks done again"] += 1
    if damaged == "run.json" or not any("is damaged or missing" in str(w.message) for w in told):
        return f"{damaged}: used without a word"
    return None if got.same(whole) else f"{damaged}: other bits or files"


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2])).to_json()))
