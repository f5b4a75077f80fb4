"""Pickles under every name that weights have: refused, and nothing in them runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from faults.mutations import pickles
from faults.outcome import Outcome
from faults.subjects import net
from lowbit import load, verify
from lowbit.checkpoint import read
from lowbit.models import load_model

#: Lists that take down what Python does, while there are any; a hook of `sys` cannot be taken out again.
_WATCHING: list[list[str]] = []


def _hook(event: str, arguments: Any) -> None:
    if _WATCHING and event in ("pickle.find_class", "os.mkdir", "os.system", "subprocess.Popen"):
        _WATCHING[-1].append(f"{event} {arguments!r:.100}")


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What a pickle would need to do harm, as long as it is looked at."""
    _WATCHING.append([])
    try:
        yield _WATCHING[-1]
    finally:
        _WATCHING.pop()


def run(cases: int, directory: Path) -> Outcome:
    outcome = Outcome()
    harm = directory / "harm"
    for i, (name, content) in enumerate(list(pickles(str(harm)).items())[:cases]):
        file = directory / str(i) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        place = file if file.suffix == ".gguf" else file.parent
        if place.is_dir():
            (place / "config.json").write_text("{}")
        outcome.add(_wrong(file, place) or (f"{name} ran" if list(directory.glob("harm*")) else None))
    return outcome


def _wrong(file: Path, place: Path) -> str | None:
    model = net()
    before = dict(model.state_dict())
    calls = [lambda: load(model, place), lambda: read(place), lambda: load_model(place), lambda: _verify(place)]
    for call in calls if place.is_dir() else calls[2:3]:
        with watched() as seen:
            told = _refusal(call)
        if told is None:
            return f"{file.name} was read"
        if seen:
            return f"{file.name}: {seen}"
        if file.name not in told and str(place) not in told:
            return f"{file.name} is not named: {told}"
    return None if all(before[n] is t or before[n].equal(t) for n, t in _state(model)) else f"{file.name} changed it"


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    return list(model.state_dict().items())


def _refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def _verify(place: Path) -> None:
    found = verify(place)
    if not found.ok:
        raise ValueError(str(found))
