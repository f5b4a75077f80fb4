"""The command roofline: ReLU -> Linear against the ceilings of this machine, line by line, its file and its plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

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
from lowbit.tools.bench_linear import LAYERS, parse_scheme
from lowbit.tools.bench_plot import check_plot, write_roofline
from lowbit.tools.bench_roofline import Plan, bench_roofline, document, measure_ceilings
from lowbit.tools.bench_rows import about
from lowbit.tools.roofline import SQUARES, Ceilings, RooflineRow, Shape, llama_shapes

_RECIPES_HELP = f"A config's short name, or weight+activation such as int8:row+int8:row. {MANY}"
_SHAPES_HELP = f"MxKxN; default: M = K = N from 1024 to 16384. {MANY}"
_TOKENS_HELP = f"Numbers of tokens of --llama. {MANY}"
_RECIPES = ["float8dq-row"]
_TOKENS = ["1", "16", "128", "1024", "4096"]


@command
def roofline(
    recipe: Annotated[list[str], typer.Option("--recipe", "-r", metavar="RECIPE", help=_RECIPES_HELP)] = _RECIPES,
    shape: Annotated[list[str] | None, typer.Option("--shape", "-s", metavar="MxKxN", help=_SHAPES_HELP)] = None,
    llama: Annotated[bool, typer.Option("--llama", help="The layers of Llama-3.1-8B, instead or beside.")] = False,
    tokens: Annotated[list[str], typer.Option("--tokens", "-m", metavar="M", help=_TOKENS_HELP)] = _TOKENS,
    seconds: Seconds = 300.0,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Operations over intensity: .svg, .png or .pdf.")] = None,
    device: MaybeDevice = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """What ReLU -> Linear should take on this machine, what it takes, and where the gap lies.

    Ceilings are measured first: reads of several sizes, matmuls, an empty kernel.

    Exit code 1 if a recipe does not run.
    """
    shapes = [parse_shape(w) for w in words(shape or [])]
    if llama:
        shapes += llama_shapes({n: LAYERS[n] for n in ("qkv", "o", "gate_up", "down")},
                               [positive("--tokens", w) for w in words(tokens)])  # fmt: skip
    plan = Plan(shapes or list(SQUARES), {w: parse_scheme(w) for w in words(recipe)}, choose_device(device), seconds)
    if not plan.recipes:
        raise ValueError("roofline: give at least one --recipe" + see("bad-option"))
    if plot is not None:
        check_plot(plot)
    facts = about(plan.device, command_line())
    hardware = f"{facts['gpu'] or facts['processor']}, torch {facts['torch']}"
    live = LiveTable(stderr() if as_json else stdout(), _COLUMNS, _LEFT, {"recipe": plan.recipes})
    say("[dim]measuring ceilings ...[/]")
    ceilings = measure_ceilings(plan.device)
    live.heading(*_heading(hardware, ceilings))
    results: Results[RooflineRow] = Results(lambda rows, left_out: document(facts, ceilings, rows, left_out), out)

    def keep(row: RooflineRow) -> None:
        _show(live, row)
        results.add(row)

    _, left_out = bench_roofline(plan, ceilings, keep)
    content = results.write(left_out)
    for gone in left_out:
        say(f"left out, {escape(gone.reason)}: {gone.layer} {escape(gone.scheme)}")
    if plot is not None and any(r.b_q_e2e_s for r in results.rows):
        write_roofline(results.rows, ceilings, plot, f"{hardware}, {facts['date']}; medians")
    live.end(content, (out, plot), as_json)
    return FAILED if any(r.error for r in results.rows) else OK


def parse_shape(word: str) -> Shape:
    """M, K and N of `MxKxN`.

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", word)
    if match:
        return Shape(int(match[1]), int(match[2]), int(match[3]))
    raise ValueError(f"--shape {word}: give MxKxN, such as 16x4096x28672" + see("bad-option"))


# The table, line by line -------------------------------------------------------------------------

_COLUMNS = (
    ("recipe", 6), ("layer", 7), ("fwd_M", 6), ("fwd_K", 6), ("fwd_N", 6), ("kernel", 18), ("r_bf16", 9),
    ("b_bf16", 9), ("r_q", 9), ("b_q", 9), ("r_spdp", 6), ("b_spdp", 6), ("b/r", 5), ("gap gemm", 9), ("ovhd", 8),
    ("rest", 8), ("launch", 6),
)  # fmt: skip
_LEFT = ("recipe", "layer", "kernel")


def _heading(hardware: str, ceilings: Ceilings) -> list[str]:
    peaks = ", ".join(f"{unit} {peak / 1e12:.4g} TFLOP/s" for unit, peak in ceilings.peaks.items())
    reading = f"reading {ceilings.bandwidth / 1e9:.0f} GB/s, launch {ceilings.launch_s * 1e6:.2f} us"
    missing = [f"no ceiling of {unit}: {reason}" for unit, reason in ceilings.missing.items()]
    return [f"{hardware}; measured: {reading}, {peaks}; times in us", *missing]


def _show(live: LiveTable, row: RooflineRow) -> None:
    live.line(row_cells(row), "red" if row.error else "green" if (row.b_q_e2e_spdp or 0) >= 1 else "")
    if row.error:
        live.note(row.error)


def row_cells(row: RooflineRow) -> list[str]:
    """One line of the table as text: microseconds of ReLU and Linear together, expected (`r`) and observed (`b`).

    A gap is what is observed beyond what is expected. An `*` behind the kernel: the layer quantized for itself.
    """
    own = "" if row.fused or not row.act else "*"
    return [
        row.recipe, row.name or "-", str(row.fwd_M), str(row.fwd_K), str(row.fwd_N), (row.kernel or "-") + own,
        _us(row.r_bf16_e2e_s), _us(row.b_bf16_e2e_s), _us(row.r_q_gemm_and_ovhd_s), _us(row.b_q_e2e_s),
        number(row.r_q_gemm_and_ovhd_spdp, 2), number(row.b_q_e2e_spdp, 2), number(row.spdp_ratio, 2),
        _us(row.gap_gemm_s), _us(row.gap_ovhd_s), _us(row.gap_rest_s),
        percent(row.launch_share),
    ]  # fmt: skip


def _us(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e6, 1)
