"""One bit of a checkpoint is another: found in every file, and the tensor named where it lies in one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from faults.mutations import flipped, header_end
from faults.outcome import Outcome
from faults.subjects import OWN, net, on_meta, own, untouched
from lowbit import load, verify
from lowbit.checkpoint import CheckpointError


def run(cases: int, directory: Path) -> Outcome:
    rng, outcome = random.Random(0), Outcome()
    places = [own(directory / convention, convention) for convention in OWN]
    files = [file for place in places for file in sorted(place.iterdir())]
    for i in range(cases):
        file = files[i % len(files)]
        content = file.read_bytes()
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        file.write_bytes(flipped(content, at, bit))
        tensor = tensor_at(content, at) if file.suffix == ".safetensors" else None
        outcome.counts["in the values of a tensor"] += tensor is not None
        outcome.add(_missed(file, tensor))
        file.write_bytes(content)
    assert all(verify(place).ok for place in places)
    return outcome


def tensor_at(content: bytes, at: int) -> str | None:
    """Which tensor a byte of a safetensors file belongs to; None in the header."""
    end = header_end(content)
    header = json.loads(content[8:end])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] <= at - end < entry["data_offsets"][1]:
            return str(name)
    return None


def _missed(file: Path, tensor: str | None) -> str | None:
    model = on_meta(net)
    try:
        load(model, file.parent)
        return f"{file.name}: loaded"
    except CheckpointError as error:
        told = str(error)
    if not untouched(model):
        return f"{file.name}: the model was changed"
    if verify(file.parent).ok:
        return f"{file.name}: verify found nothing"
    if file.name not in told or str(file.parent) not in told:
        return f"{file.name} is not named: {told}"
    return None if tensor is None or tensor in told else f"{file.name}: {tensor} is not named: {told}"
