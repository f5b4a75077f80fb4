"""Every parser of text that a file or a user brings, and what it may raise. `fuzz.py` runs them for longer."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_layers
import torch
from torch import nn

from faults.mutations import any_bytes, any_json
from faults.outcome import Outcome
from lowbit import parse_config, parse_format
from lowbit.checkpoint import read
from lowbit.checkpoints import bitsandbytes
from lowbit.checkpoints.config_groups import Section
from lowbit.checkpoints.files import Files, read_json
from lowbit.checkpoints.manifest import Manifest, Record, parse_spec
from lowbit.checkpoints.reading import FOREIGN
from lowbit.formats import registered
from lowbit.formats.activation import parse_activation
from lowbit.models.gguf_header import check_header
from lowbit.rules import plan_of
from lowbit.specs import EXAMPLES

Parser = Callable[[bytes], object]
#: One directory for parsers of files; a process fuzzes on its own.
_FOLDER = Path(tempfile.mkdtemp(prefix="lowbit-parsers-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


def _text(parse: Callable[[str], object]) -> Parser:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def _object(parse: Callable[[Any], object]) -> Parser:
    """For parsers that get what JSON was read from: data that is no JSON object is another parser's matter."""

    def call(data: bytes) -> object:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return parse(value) if isinstance(value, dict) else None

    return call


def _file(name: str, parse: Callable[[Path], object]) -> Parser:
    def call(data: bytes) -> object:
        path = _FOLDER / name
        path.write_bytes(data)
        try:
            return parse(path)
        finally:
            path.unlink()

    return call


def _all_tensors(path: Path) -> object:
    files = Files(path.parent)
    for name in files.info:
        files.get(name)
    return files.problems


def _of_a_model(rules: Any) -> object:
    return plan_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), rules)


PARSERS: dict[str, Parser] = {
    "format": _text(parse_format),
    "activation": _text(parse_activation),
    "scheme": _text(parse_spec),
    "config": _text(parse_config),
    "rules": _object(_of_a_model),
    "json": _file("config.json", read_json),
    "manifest": _file("lowbit_manifest.json", lambda p: Manifest.read(p.parent)),
    "record": _text(Record.parse),
    "index": _file("model.safetensors.index.json", lambda p: Files(p.parent)),
    "safetensors": _file("model.safetensors", _all_tensors),
    "directory": _file("config.json", lambda p: read(p.parent)),
    "compressed-tensors": _object(Section),
    "gguf": _file("model.gguf", check_header),
    "quant-state": lambda data: bitsandbytes._state(torch.tensor(list(data), dtype=torch.uint8), "nf4", "a"),
    **{method: _object(reader) for method, reader in FOREIGN.items()},
}


def allowed(name: str) -> tuple[type[Exception], ...]:
    """TypeErrors are for what a user passes in Python, never for what a file says."""
    return (ValueError, TypeError) if name in ("config", "rules") else (ValueError,)


def seeds() -> dict[str, list[bytes]]:
    """What each parser reads without complaint, to begin with."""
    with tempfile.TemporaryDirectory() as folder:
        return _seeds(Path(folder))


def _seeds(folder: Path) -> dict[str, list[bytes]]:
    from faults import subjects

    words = [fmt.spec.encode() for fmt in registered()]
    acts = [act.spec.encode() for spec in EXAMPLES if (act := parse_config(spec).scheme.act)]
    places = [subjects.own(folder / c, c) for c in subjects.OWN]
    places += [subjects.foreign(folder / f"other-{kind}", kind) for kind in subjects.KINDS]
    sections = {
        place: json.loads((place / "config.json").read_text()).get("quantization_config", {}) for place in places
    }
    found: dict[str, list[bytes]] = {
        "format": words, "activation": acts, "scheme": [*words, *(a + b"->int4:g32" for a in acts)],
        "config": [spec.encode() for spec in EXAMPLES], "rules": [b'{"0": "int4wo-32"}', b'{"re:.*": "int8wo"}'],
        "json": [b'{"a": [1, null, "x"]}'],
        "manifest": [(p / "lowbit_manifest.json").read_bytes() for p in places[:2]],
        "record": [Record({}, {"a": "b"}).to_text().encode()],
        "index": [b'{"metadata": {}, "weight_map": {"a": "model.safetensors"}}'],
        "safetensors": [next(p.glob("*.safetensors")).read_bytes() for p in places],
        "directory": [(p / "config.json").read_bytes() for p in places],
        "gguf": [subjects.gguf_file(folder / "seed.gguf").read_bytes()[:4000]],
    }  # fmt: skip
    [state] = [t for name, t in foreign_layers.nf4(True)[0].items() if "quant_state" in name]
    found["quant-state"] = [state.tobytes()]
    for section in sections.values():
        found.setdefault(section["quant_method"], []).append(json.dumps(section).encode())
    for method in FOREIGN:
        found.setdefault(method, [json.dumps({"quant_method": method}).encode()])
    return {name: found[name] for name in PARSERS}


def complaint(name: str, data: bytes) -> str | None:
    """None if the parser read the data or refused it as it should; else what it raised."""
    try:
        PARSERS[name](data)
    except allowed(name):
        return None
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}: {data!r:.400}"
    return None


def run(cases: int, directory: Path) -> Outcome:
    """`cases` inputs for each parser: its seeds, and changes of them on top of each other."""
    rng, outcome = random.Random(0), Outcome()
    for name, known in seeds().items():
        pool = list(known)
        for i in range(cases):
            data = pool[i] if i < len(known) else changed(rng, rng.choice(pool))
            outcome.add(complaint(name, data))
            if rng.random() < 0.1:
                pool.append(data)
        outcome.counts["parsers"] += 1
    return outcome


def changed(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        try:
            return any_json(rng, data)
        except (ValueError, RecursionError, AttributeError, TypeError, IndexError):
            pass
    return any_bytes(rng, data) or b"{"
