"""Where in someone's Python code something happened: call stacks without the frames of PyTorch and of this tool."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SKIPPED = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)
_DEPTH = 12


@dataclass(frozen=True)
class Frame:
    """A line of a call stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{short_path(self.file)}:{self.line} in {self.function}"


Stack = tuple[Frame, ...]


def current_stack() -> Stack:
    """The innermost frames first."""
    out: list[Frame] = []
    frame = sys._getframe(1)
    while frame is not None and len(out) < _DEPTH:  # type: ignore[redundant-expr]
        file = frame.f_code.co_filename
        if not _skip(file):
            out.append(Frame(file, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(out)


def recorded_stack(frames: Iterable[Mapping[str, Any]]) -> Stack:
    """The frames of CUDA's allocator history, which come innermost first, as a stack of Python lines."""
    kept = (f for f in frames if str(f.get("filename", "")).endswith(".py") and not _skip(str(f["filename"])))
    return tuple(Frame(str(f["filename"]), int(f["line"]), str(f["name"])) for f in kept)[:_DEPTH]


def _skip(file: str) -> bool:
    return file.startswith((*_SKIPPED, "<"))


def short_path(file: str) -> str:
    """What follows `site-packages`, or the path below the current directory, or its last three parts."""
    _, found, rest = file.rpartition(f"site-packages{os.sep}")
    if found:
        return rest
    path = Path(file)
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(Path(*path.parts[-3:])) if path.is_absolute() else file
