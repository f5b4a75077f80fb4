"""The command bench linear: the table line by line, its file and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lowbit.cli.measure import (
    MANY,
    LiveTable,
    MaybeDevice,
    Out,
    Results,
    Seconds,
    choose_device,
    command_line,
    number,
    percent,
    positive,
    words,
)
from lowbit.cli.output import FAILED, OK, Debug, Json, command, say, stderr, stdout
from lowbit.errors import see
from lowbit.tools.bench_linear import LAYERS, Plan, bench_linear, environment, name_of, parse_layer, parse_scheme
from lowbit.tools.bench_plot import check_plot, write_plot
from lowbit.tools.bench_rows import BF16, LOWBIT, Record, Row, document
from lowbit.tools.peers import PEERS, choose_peers

bench = typer.Typer(help="Measure speed, next to bf16 and to other libraries.", no_args_is_help=True)

_DECODER = ["qkv", "o", "gate_up", "down"]
_FORMATS = ["int4:g128", "int8:row", "float8_e4m3:row"]
_TOKENS = ["1", "16", "128", "1024"]
_LAYERS_HELP = f"{', '.join(LAYERS)} (of Llama-3.1-8B), or NxK. {MANY}"
_FORMATS_HELP = f"int4:g128, weight+activation such as int8:row+int8:row, or a config's short name. {MANY}"
_TOKENS_HELP = f"Numbers of tokens. {MANY}"
_PEERS_HELP = f"{', '.join(p.name for p in PEERS)}, or none; default: all that are installed. {MANY}"


@bench.command()
@command
def linear(
    layer: Annotated[list[str], typer.Option("--layer", "-l", metavar="LAYER", help=_LAYERS_HELP)] = _DECODER,
    format: Annotated[list[str], typer.Option("--format", "-f", metavar="FORMAT", help=_FORMATS_HELP)] = _FORMATS,
    tokens: Annotated[list[str], typer.Option("--tokens", "-m", metavar="M", help=_TOKENS_HELP)] = _TOKENS,
    peers: Annotated[list[str] | None, typer.Option("--peers", metavar="PEER", help=_PEERS_HELP)] = None,
    seconds: Seconds = 240.0,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of time over tokens: .svg, .png or .pdf.")] = None,
    device: MaybeDevice = None,
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
    about = environment(plan, command_line()) | {"not_installed": missing}
    hardware = f"{about['gpu'] or about['processor']}, torch {about['torch']}"
    live = _Lines(stderr() if as_json else stdout(), _COLUMNS, _LEFT, {"format": [name_of(s) for s in plan.schemes]})
    live.heading(f"{hardware}; {_who(plan, missing)}")
    results: Results[Row] = Results(lambda rows, left_out: document(about, rows, left_out), out)

    def keep(row: Row) -> None:
        live.add(row)
        results.add(row)

    _, left_out = bench_linear(plan, keep)
    content = results.write(left_out)
    for gone in left_out:
        say(f"left out, {escape(gone.reason)}: {gone.layer} {escape(gone.scheme)} M = {gone.m}")
    if plot is not None and results.rows:
        write_plot(results.rows, plot, f"{hardware}, {about['date']}; medians, band: least to most")
    live.end(content, (out, plot), as_json)
    return FAILED if any(_failed(row.of(LOWBIT)) for row in results.rows) else OK


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


class _Lines(LiveTable):
    """Rows, and what did not run, once for each reason."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.noted: set[tuple[str, str, str]] = set()

    def add(self, row: Row) -> None:
        ours = row.of(LOWBIT)
        style = "red" if _failed(ours) else "green" if (row.ratio or 2) >= 1 and (ours.speedup or 0) >= 1 else ""
        self.line(row_cells(row), style)
        for r in row.records:
            key = (r.provider, r.scheme, r.error)
            if r.error and key not in self.noted:
                self.noted.add(key)
                self.note(f"{r.provider}: {r.error}", "dim")
        if _inaccurate(ours):
            self.note(f"{ours.sqnr_db:.1f} dB, {ours.weight} allows no less than {ours.sqnr_limit_db:.1f} dB")


def _who(plan: Plan, missing: list[str]) -> str:
    """Whom lowbit is compared with."""
    names = ", ".join(p.name + "".join(f" {v}" for v in list(p.versions().values())[:1]) for p in plan.peers)
    return f"peers: {names or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else "")


def row_cells(row: Row) -> list[str]:
    """One line of the table as text: microseconds, and ratios above 1 where lowbit is faster.

    The floor is the time of reading the packed weight alone, the share what part of lowbit's time that is.
    """
    ours, best = row.of(LOWBIT), row.best_peer
    others = sorted((r for r in row.peers if r.us and r is not best), key=lambda r: r.us or 0)
    return [
        ours.layer, ours.scheme, str(ours.m), ours.kernel or "-", number(ours.us, 1), number(ours.gb_s, 0),
        number(ours.sqnr_db, 1), number(ours.floor_us, 1), percent(ours.floor_share),
        number(row.of(BF16).us, 1), number(ours.speedup, 2), _named(best) if best else "-", number(row.ratio, 2),
        ", ".join(_named(r) + (" (wrong)" if r.error else "") for r in others),
    ]  # fmt: skip


def _named(r: Record) -> str:
    return f"{r.provider} {number(r.us, 1)}"
