"""What commands that measure share: options, a table that grows line by line, and a file that grows with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape

from lowbit.cli.output import emit_json
from lowbit.errors import see
from lowbit.tools.bench_rows import LeftOut, write_json

MANY = "May be repeated, or a list with commas."
Seconds = Annotated[float, typer.Option(help="No new row is started after so many seconds.")]
Out = Annotated[Path | None, typer.Option(help="JSON file, written again after every row.")]
MaybeDevice = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: the GPU where there is one.")]

RowT = TypeVar("RowT")


def words(values: list[str]) -> list[str]:
    """`-l a,b -l c` as the words a, b, c, each once."""
    return list(dict.fromkeys(w for value in values for w in value.split(",") if w))


def positive(option: str, word: str) -> int:
    """The number that a word stands for.

    Raises:
        ValueError: it is none, or not positive.
    """
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"{option} {word}: give positive numbers" + see("bad-option"))
    return int(word)


def choose_device(word: str | None) -> torch.device:
    device = torch.device(word or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no CUDA GPU here; use --device cpu")
    return device


def command_line() -> str:
    """This command as it was typed, for files of results."""
    return " ".join(["lowbit", *sys.argv[1:]])


class Results(Generic[RowT]):
    """Rows of a benchmark, and a file that has all of them after every one."""

    def __init__(self, document: Callable[[list[RowT], list[LeftOut]], dict[str, Any]], out: Path | None) -> None:
        self.document, self.out = document, out
        self.rows: list[RowT] = []

    def add(self, row: RowT) -> None:
        self.rows.append(row)
        self.write([])

    def write(self, left_out: list[LeftOut]) -> dict[str, Any]:
        """The document of all rows, written if a file was asked for."""
        content = self.document(self.rows, left_out)
        if self.out is not None:
            write_json(self.out, content)
        return content


class LiveTable:
    """Rows as they come: rich prints whole tables only, so columns have fixed widths."""

    def __init__(
        self,
        console: Console,
        columns: Sequence[tuple[str, int]],
        left: Sequence[str],
        fit: Mapping[str, Iterable[str]],
    ) -> None:
        """
        Args:
            columns: title and least width of each.
            left: titles of the columns that are aligned to the left.
            fit: columns by title, and all that will stand in them.
        """
        self.console, self.titles, self.left = console, [title for title, _ in columns], left
        self.widths = [max([width, *map(len, fit.get(title, ()))]) for title, width in columns]

    def heading(self, *facts: str) -> None:
        for fact in facts:
            self.console.print(f"[dim]{escape(fact)}[/]", soft_wrap=True)
        self.console.print(f"[bold]{self._line(self.titles)}[/]", soft_wrap=True)

    def line(self, cells: Sequence[str], style: str) -> None:
        self.console.print(escape(self._line(cells)), style=style, soft_wrap=True)

    def note(self, text: str, style: str = "red") -> None:
        """Below a line."""
        self.console.print(escape(f"  {text}"), style=style, soft_wrap=True)

    def end(self, content: dict[str, Any], files: Iterable[Path | None], as_json: bool) -> None:
        """The document on stdout, or where the files are."""
        if as_json:
            emit_json(content)
            return
        for file in files:
            if file is not None and file.exists():
                self.console.print(f"written: [bold]{escape(str(file))}[/]")

    def _line(self, cells: Sequence[str]) -> str:
        columns = zip(cells, self.titles, self.widths, strict=True)
        return " ".join(f"{c:<{w}}" if title in self.left else f"{c:>{w}}" for c, title, w in columns).rstrip()


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
