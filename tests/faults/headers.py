"""Safetensors files with headers that lie."""

from __future__ import annotations

import random
from pathlib import Path

from faults.mutations import any_header
from faults.outcome import Outcome
from faults.subjects import OWN, net, on_meta, own, untouched
from lowbit import load
from lowbit.checkpoint import CheckpointError


def run(cases: int, directory: Path) -> Outcome:
    """Every file is refused by name. Without checksums, too, nothing worse can happen than other values: an error is
    lowbit's own, and what loads fits the model."""
    rng, outcome = random.Random(0), Outcome()
    files = [f for c in OWN for f in sorted(own(directory / c, c).glob("*.safetensors"))]
    for i in range(cases):
        file = files[i % len(files)]
        content = file.read_bytes()
        while (changed := any_header(rng, content)) == content:
            pass
        file.write_bytes(changed)
        outcome.add(_wrong(file, outcome))
        file.write_bytes(content)
    return outcome


def _wrong(file: Path, outcome: Outcome) -> str | None:
    for check in (True, False):
        model = on_meta(net)
        try:
            load(model, file.parent, verify=check)
            if check:
                return f"{file.name}: loaded"
            outcome.counts["read with verify=False"] += 1
        except CheckpointError as error:
            if not untouched(model):
                return f"{file.name}: the model was changed: {error}"
            if check and file.name not in str(error):
                return f"{file.name} is not named: {error}"
        except Exception as error:
            return f"{file.name}, verify={check}: {type(error).__name__}: {error}"
    return None
