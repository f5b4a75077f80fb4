"""What commands share: where output goes, progress bars, JSON, and errors as one message and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

OK, FAILED, BAD_INPUT = 0, 1, 2

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Of float weights and activations: bfloat16 (default), float16, float32.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face directory, .gguf file, lowbit checkpoint, or demo.")
]


def stdout() -> Console:
    """For results. A pipe or a file has no width; tables get room there."""
    return Console(width=None if sys.stdout.isatty() else 180, highlight=False)


def stderr() -> Console:
    """For progress bars."""
    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Print a message to stderr, in one line however long it is."""
    stderr().print(message, soft_wrap=True)


def emit_json(document: Any) -> None:
    """Print one JSON document. JSON has no Inf and NaN: they become the strings "inf" and "-inf", and null."""
    sys.stdout.write(json.dumps(plain(document), indent=1, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """Dataclasses, tuples, paths and non-finite numbers as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, (Path, torch.dtype, torch.device)) else value


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Turns a function into a command: its errors become a message and an exit code.

    ValueError, TypeError, a missing file or package: bad input, 2. Anything that failed while running: 1. The
    function returns the exit code of what it found (None: 0).
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = function(*args, **kwargs)
        except (ValueError, TypeError, ImportError, FileNotFoundError, NotADirectoryError) as error:
            code = _report(error, BAD_INPUT, kwargs)
        except (RuntimeError, OSError) as error:  # NotImplementedError and out of memory are RuntimeErrors
            code = _report(error, FAILED, kwargs)
        raise typer.Exit(code or OK)

    return run


def _report(error: Exception, code: int, kwargs: dict[str, Any]) -> int:
    if kwargs.get("debug"):
        raise error
    message = str(error).strip() or type(error).__name__
    if kwargs.get("as_json"):
        emit_json({"error": message, "kind": type(error).__name__})
    else:
        say(f"[bold red]error:[/] {escape(message)}")
    return code


# Progress ----------------------------------------------------------------------------------------


class MemoryColumn(ProgressColumn):
    """Memory that this process uses now, on the GPU and off it."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        text = f"{resident_bytes() / 2**30:.1f} GiB"
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            text += f" + {torch.cuda.memory_allocated() / 2**30:.1f} GPU"
        return Text(text, style="progress.data.speed")


def resident_bytes() -> int:
    """Resident memory of this process; its peak where the system tells no current figure; 0 where it tells none."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def progress_bar(title: str, console: Console | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr with time left and memory; yields `update(done, total, what)`. Invisible in pipes."""
    console = console or stderr()
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn(),
        MemoryColumn(), TextColumn("[dim]{task.fields[what]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, what="")

        def update(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=total, what=escape(what))

        yield update


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
