"""A disk that is full, read-only or broken, at every step of a save."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from faults.outcome import Outcome
from faults.subjects import net
from lowbit import quantize_, save, verify

RULES_BEFORE, RULES_AFTER = {"a": "int8wo"}, {"a": "int4wo-32", "b": "nvfp4wo"}


class _Disk:
    """Counts what a save asks of the disk, and fails at the n-th request, or from there on.

    `full` fails only where new bytes need room: opening files to write and writing to them.
    """

    def __init__(self, fails_at: int, full: bool) -> None:
        self.fails_at, self.full, self.asked, self.failed = fails_at, full, 0, False

    def ask(self, what: str, needs_room: bool) -> None:
        if self.full and not needs_room:
            return
        self.asked += 1
        if self.asked == self.fails_at or (self.full and self.asked > self.fails_at):
            self.failed = True
            raise OSError(errno.ENOSPC if self.full else errno.EIO, f"injected into {what}")


class _File:
    def __init__(self, file: Any, disk: _Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        self._disk.ask("write", True)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def failing(disk: _Disk) -> Iterator[None]:
    real_open, real_unlink = Path.open, Path.unlink

    def opened(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if "w" not in mode:
            return real_open(self, mode, *rest, **named)
        disk.ask("open", True)
        return _File(real_open(self, mode, *rest, **named), disk)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            disk.ask("unlink", False)
        real_unlink(self, missing_ok=missing_ok)

    def counted(function: Any, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            disk.ask(name, False)
            return function(*arguments, **named)

        return call

    with (
        mock.patch.object(Path, "open", opened),
        mock.patch.object(Path, "unlink", unlinked),
        mock.patch.object(os, "replace", counted(os.replace, "replace")),
        mock.patch.object(os, "fsync", counted(os.fsync, "fsync")),
    ):
        yield


def run(cases: int, directory: Path) -> Outcome:
    """A save that fails says of which file, and leaves the checkpoint that was there; all requests take their turn, as
    far as `cases` goes."""
    outcome = Outcome()
    models = [_quantized(RULES_BEFORE), _quantized(RULES_AFTER)]
    new = _saved(models[1], directory / "new")
    for full in (True, False):
        for n in range(1, cases + 1):
            place = directory / f"{full}-{n}"
            before = _saved(models[0], place)
            disk = _Disk(n, full)
            told = None
            with failing(disk):
                try:
                    save(models[1], place, max_shard_bytes=1200)
                except OSError as error:
                    told = str(error)
            if not disk.failed:
                break
            outcome.counts["full" if full else "one request failed"] += 1
            outcome.add(_wrong(place, told, before, new))
            if _saved(models[1], place) != new:
                outcome.failures.append(f"{place.name}: the next save left {_contents(place).keys()}")
                outcome.held -= 1
    return outcome


def _quantized(rules: dict[str, str]) -> nn.Module:
    model = net()
    quantize_(model, rules, measure=False)
    return model


def _contents(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(place.iterdir())}


def _saved(model: nn.Module, place: Path) -> dict[str, bytes]:
    save(model, place, max_shard_bytes=1200)
    return _contents(place)


def _wrong(place: Path, told: str | None, before: dict[str, bytes], new: dict[str, bytes]) -> str | None:
    got = _contents(place)
    visible = {name: content for name, content in got.items() if not name.startswith(".")}
    if told is None:
        return f"{place.name}: the failure went unsaid"
    if not verify(place).ok:
        return f"{place.name}: {verify(place)}"
    if visible not in (before, new):
        return f"{place.name}: neither the old nor the new files: {sorted(got)}"
    return None
