"""Commands that measure speed: bench linear, and what bench generate shares with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from lowbit.cli.output import FAILED, OK, Debug, Json, command, emit_json, say, stderr, stdout
from lowbit.errors import see
from lowbit.tools.bench_linear import LAYERS, Plan, bench_linear, environment, name_of, parse_layer, parse_scheme
from lowbit.tools.bench_plot import check_plot, write_plot
from lowbit.tools.bench_rows import BF16, LOWBIT, Record, Row, document, write_json
from lowbit.tools.peers import PEERS, choose_peers

bench = typer.Typer(help="Measure speed, next to bf16 and to other libraries.", no_args_is_help=True)

_DECODER = ["qkv", "o", "gate_up", "down"]
_FORMATS = ["int4:g128", "int8:row", "float8_e4m3:row"]
_TOKENS = ["1", "16", "128", "1024"]
_MANY = "May be repeated, or a list with commas."
_LAYERS_HELP = f"{', '.join(LAYERS)} (of Llama-3.1-8B), or NxK. {_MANY}"
_FORMATS_HELP = f"int4:g128, weight+activation such as int8:row+int8:row, or a config's short name. {_MANY}"
_TOKENS_HELP = f"Numbers of tokens. {_MANY}"
_PEERS_HELP = f"{', '.join(p.name for p in PEERS)}, or none; default: all that are installed. {_MANY}"


def words(values: list[str]) -> list[str]:
    """`-l a,b -l c` as the words a, b, c, each once."""
    return list(dict.fromkeys(w for value in values for w in value.split(",") if w))


@bench.command()
@command
def linear(
    layer: Annotated[list[str], typer.Option("--layer", "-l", metavar="LAYER", help=_LAYERS_HELP)] = _DECODER,
    format: Annotated[list[str], typer.Option("--format", "-f", metavar="FORMAT", help=_FORMATS_HELP)] = _FORMATS,
    tokens: Annotated[list[str], typer.Option("--tokens", "-m", metavar="M", help=_TOKENS_HELP)] = _TOKENS,
    peers: Annotated[list[str] | None, typer.Option("--peers", metavar="PEER", help=_PEERS_HELP)] = None,
    seconds: Annotated[float, typer.Option(help="No new row is started after so many seconds.")] = 240.0,
    out: Annotated[Path | None, typer.Option(help="JSON file, written again after every row.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of time over tokens: .svg, .png or .pdf.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Time of linear layers: lowbit next to bf16, other libraries, and reading the packed weight alone.

    Weights are cold, variants take turns, times are medians; on a GPU inside CUDA graphs.

    Exit code 1 if lowbit does not run a row, or misses the accuracy of its format.
    """
    chosen, missing = choose_peers(None if peers is None else words(peers))
    plan = Plan(
        layers=[parse_layer(w) for w in words(layer)],
        schemes=list(dict.fromkeys(parse_scheme(w) for w in words(format))),
        tokens=[positive("--tokens", w) for w in words(tokens)],
        peers=chosen,
        device=choose_device(device),
        seconds=seconds,
    )
    if not (plan.layers and plan.schemes and plan.tokens):
        raise ValueError("bench linear: give at least one --layer, --format and --tokens" + see("bad-option"))
    if plot is not None:
        check_plot(plot)
    about = environment(plan, " ".join(["lowbit", *sys.argv[1:]])) | {"not_installed": missing}
    live = _Lines(stderr() if as_json else stdout(), plan)
    hardware = about["gpu"] or about["processor"]
    live.heading(f"{hardware}, torch {about['torch']}", missing)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        live.add(row)
        if out is not None:
            write_json(out, document(about, rows, []))

    _, left_out = bench_linear(plan, keep)
    content = document(about, rows, left_out)
    if out is not None:
        write_json(out, content)
    for gone in left_out:
        say(f"left out, {escape(gone.reason)}: {gone.layer} {escape(gone.scheme)} M = {gone.m}")
    if plot is not None and rows:
        write_plot(rows, plot, f"{hardware}, torch {about['torch']}, {about['date']}; medians, band: least to most")
    if as_json:
        emit_json(content)
    else:
        for file in (out, plot):
            if file is not None and file.exists():
                live.console.print(f"written: [bold]{escape(str(file))}[/]")
    return FAILED if any(_failed(row.of(LOWBIT)) for row in rows) else OK


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


def _failed(ours: Record) -> bool:
    return bool(ours.error) or _inaccurate(ours)


def _inaccurate(ours: Record) -> bool:
    limit = ours.sqnr_limit_db
    return limit is not None and ours.sqnr_db is not None and not ours.sqnr_db >= limit


# The table, line by line -------------------------------------------------------------------------

_COLUMNS = (
    ("layer", 11), ("format", 10), ("M", 5), ("kernel", 18), ("us", 9), ("GB/s", 6), ("SQNR dB", 7), ("floor", 9),
    ("share", 5), ("bf16", 9), ("ratio", 5), ("best peer", 21), ("ratio", 5), ("other peers", 0),
)  # fmt: skip
_LEFT = ("layer", "format", "kernel", "other peers")


class _Lines:
    """Rows as they come: rich prints whole tables only, so columns have fixed widths."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console, self.plan = console, plan
        width = max(len(name_of(s)) for s in plan.schemes)
        self.widths = [max(w, width) if title == "format" else w for title, w in _COLUMNS]
        self.noted: set[tuple[str, str, str]] = set()

    def heading(self, hardware: str, missing: list[str]) -> None:
        names = ", ".join(p.name + "".join(f" {v}" for v in list(p.versions().values())[:1]) for p in self.plan.peers)
        text = f"[dim]{escape(hardware)}; peers: {escape(names) or 'none'}"
        self.console.print(text + (f"; not installed: {', '.join(missing)}[/]" if missing else "[/]"), soft_wrap=True)
        self.console.print(f"[bold]{self._line([title for title, _ in _COLUMNS])}[/]", soft_wrap=True)

    def add(self, row: Row) -> None:
        ours = row.of(LOWBIT)
        style = "red" if _failed(ours) else "green" if (row.ratio or 2) >= 1 and (ours.speedup or 0) >= 1 else ""
        self.console.print(escape(self._line(row_cells(row))), style=style, soft_wrap=True)
        for r in row.records:
            self._note(r)
        if _inaccurate(ours):
            text = f"  {ours.sqnr_db:.1f} dB, {ours.weight} allows no less than {ours.sqnr_limit_db:.1f} dB"
            self.console.print(escape(text), style="red", soft_wrap=True)

    def _line(self, cells: list[str]) -> str:
        columns = zip(cells, _COLUMNS, self.widths, strict=True)
        return " ".join(f"{c:<{w}}" if title in _LEFT else f"{c:>{w}}" for c, (title, _), w in columns).rstrip()

    def _note(self, r: Record) -> None:
        """What did not run, once for each reason."""
        key = (r.provider, r.scheme, r.error)
        if r.error and key not in self.noted:
            self.noted.add(key)
            self.console.print(escape(f"  {r.provider}: {r.error}"), style="dim", soft_wrap=True)


def row_cells(row: Row) -> list[str]:
    """One line of the table as text: microseconds, and ratios above 1 where lowbit is faster.

    The floor is the time of reading the packed weight alone, the share what part of lowbit's time that is.
    """
    ours, best = row.of(LOWBIT), row.best_peer
    others = sorted((r for r in row.peers if r.us and r is not best), key=lambda r: r.us or 0)
    return [
        ours.layer, ours.scheme, str(ours.m), ours.kernel or "-", _number(ours.us, 1), _number(ours.gb_s, 0),
        _number(ours.sqnr_db, 1), _number(ours.floor_us, 1),
        "-" if ours.floor_share is None else f"{100 * ours.floor_share:.0f} %",
        _number(row.of(BF16).us, 1), _number(ours.speedup, 2), _named(best) if best else "-", _number(row.ratio, 2),
        ", ".join(_named(r) + (" (wrong)" if r.error else "") for r in others),
    ]  # fmt: skip


def _named(r: Record) -> str:
    return f"{r.provider} {_number(r.us, 1)}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
