"""The parsers of parsers.py with bytes that atheris thinks of, led by what of lowbit's code the last ones reached."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from faults import fuzz
from faults.outcome import Outcome
from faults.parsers import PARSERS

#: A parser that takes longer for one input hangs.
SECONDS = 20


def run(cases: int, directory: Path) -> Outcome:
    """`cases` inputs for each parser, in a process of its own; needs the package atheris."""
    outcome = Outcome()
    for name in PARSERS:
        options = [f"-runs={cases}", "-seed=1", f"-timeout={SECONDS}", f"-artifact_prefix={directory}/"]
        command = [sys.executable, fuzz.__file__, "--atheris", name, str(directory / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = done.stderr + done.stdout
        finished = re.search(r"Done (\d+) runs", told)
        ran = int(finished[1]) if finished else 0
        outcome.cases += max(ran, 1)
        outcome.held += ran if done.returncode == 0 else 0
        if done.returncode != 0 or not finished:
            outcome.failures.append(f"{name}: {told[-600:]}")
        outcome.counts["parsers"] += 1
        outcome.counts["places in lowbit's code"] += max((int(n) for n in re.findall(r"cov: (\d+)", told)), default=0)
    return outcome
