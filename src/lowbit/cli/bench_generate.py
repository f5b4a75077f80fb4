"""The command bench generate: the table line by line, its file and its plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lowbit.cli.bench import bench, choose_device, positive, words
from lowbit.cli.output import FAILED, OK, Debug, Json, command, emit_json, say, stderr, stdout
from lowbit.errors import see
from lowbit.models.shapes import SHAPES, shape_of
from lowbit.tools.bench_generate import Plan, bench_generate
from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.bench_plot import check_plot, write_budgets
from lowbit.tools.bench_rows import BF16, GenerateRow, Memory, about, document, write_json

_CONFIGS = ["int8wo", "float8wo", "int4:g128"]
_MANY = "May be repeated, or a list with commas."
_CONFIGS_HELP = f"A config's short name, or weight+activation such as int8:row+int8:row; bf16 is always there. {_MANY}"


@bench.command()
@command
def generate(
    model: Annotated[str, typer.Option("--model", metavar="SHAPE", help=", ".join(SHAPES))] = "llama-3.1-8b",
    config: Annotated[list[str], typer.Option("--config", "-c", metavar="CONFIG", help=_CONFIGS_HELP)] = _CONFIGS,
    batch: Annotated[list[str], typer.Option("--batch", "-b", help=f"Numbers of sequences. {_MANY}")] = ["1"],  # noqa: B006
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help=f"Tokens of a prompt. {_MANY}")] = ["128"],  # noqa: B006
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", help="Steps of a generation.")] = 64,
    compiled: Annotated[bool, typer.Option("--compile", help="Also bf16 under plain torch.compile.")] = False,
    seconds: Annotated[float, typer.Option(help="No new row is started after so many seconds.")] = 300.0,
    out: Annotated[Path | None, typer.Option(help="JSON file, written again after every row.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of where a token's time goes: .svg, .png or .pdf.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """A whole model's speed and memory: bf16 and configs, random weights in the shape of a known model.

    Every linear layer is quantized, the output projection included.

    Exit code 1 if a config does not run.
    """
    plan = Plan(
        shape=model,
        configs={w: parse_scheme(w) for w in words(config) if w != BF16},
        batches=[positive("--batch", w) for w in words(batch)],
        prompts=[positive("--prompt", w) for w in words(prompt)],
        new_tokens=positive("--new-tokens", str(new_tokens)),
        compiled=compiled,
        device=choose_device(device),
        seconds=seconds,
    )
    longest = max(plan.prompts) + plan.new_tokens + 1
    if longest > (limit := shape_of(model).max_positions):
        raise ValueError(
            f"bench generate: --prompt and --new-tokens make up to {longest} tokens, {model} has a context of {limit}"
            + see("context-exceeded")
        )
    if plot is not None:
        check_plot(plot)
    facts = about(plan.device, " ".join(["lowbit", *sys.argv[1:]]))
    live = _Lines(stderr() if as_json else stdout(), plan)
    hardware = f"{facts['gpu'] or facts['processor']}, torch {facts['torch']}"
    live.heading(f"{model}, random weights; {hardware}")
    rows: list[GenerateRow] = []

    def keep(row: GenerateRow) -> None:
        rows.append(row)
        live.add(row)
        if out is not None:
            write_json(out, document(facts, rows, []))

    _, left_out = bench_generate(plan, keep, lambda stage: say(f"[dim]{escape(stage)} ...[/]"))
    content = document(facts, rows, left_out)
    if out is not None:
        write_json(out, content)
    for gone in left_out:
        say(f"left out, {escape(gone.reason)}: {escape(gone.scheme)}")
    if plot is not None and any(r.step_us for r in rows):
        write_budgets(rows, plot, f"{model}, {hardware}, {facts['date']}; medians")
    if as_json:
        emit_json(content)
    else:
        for file in (out, plot):
            if file is not None and file.exists():
                live.console.print(f"written: [bold]{escape(str(file))}[/]")
    return FAILED if any(r.error for r in rows) else OK


# The table, line by line -------------------------------------------------------------------------

_COLUMNS = (
    ("config", 18), ("batch", 5), ("prompt", 6), ("tok/s", 8), ("x bf16", 6), ("step us", 9), ("linears", 9),
    ("floor", 9), ("share", 5), ("GB/s", 5), ("first ms", 8), ("eager", 7), ("model GB", 8), ("make", 6),
    ("prefill", 7), ("decode GB", 9), ("make s", 6), ("quantize", 8), ("capture", 7),
)  # fmt: skip


class _Lines:
    """Rows as they come: rich prints whole tables only, so columns have fixed widths."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console = console
        self.first = max([len(name) for name, _ in plan.variants] + [len("config")])

    def heading(self, text: str) -> None:
        self.console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)
        self.console.print(f"[bold]{self._line([title for title, _ in _COLUMNS])}[/]", soft_wrap=True)

    def add(self, row: GenerateRow) -> None:
        style = "red" if row.error else "green" if (row.speedup or 0) > 1 else ""
        self.console.print(escape(self._line(row_cells(row))), style=style, soft_wrap=True)
        if row.error:
            self.console.print(escape(f"  {row.error}"), style="red", soft_wrap=True)

    def _line(self, cells: list[str]) -> str:
        widths = [self.first, *(width for _, width in _COLUMNS[1:])]
        first, *rest = (f"{c:>{w}}" if i else f"{c:<{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return " ".join([first, *rest]).rstrip()


def row_cells(row: GenerateRow) -> list[str]:
    """One line of the table as text.

    Step, linears and floor are microseconds of one token: everything, the linear layers alone, reading their bytes
    alone. The share is that of the floor in the step. Memory is the most allocated in a phase.
    """
    share = "-" if row.floor_share is None else f"{100 * row.floor_share:.0f} %"
    return [
        row.config, str(row.batch), str(row.prompt), _number(row.tokens_per_second, 1), _number(row.speedup, 2),
        _number(row.step_us, 1), _number(row.linears_us, 1), _number(row.floor_us, 1), share, _number(row.gb_s, 0),
        _number(row.first_token_ms, 2), _number(row.first_token_eager_ms, 2), f"{row.model_bytes / 1e9:.2f}",
        _peak(row.peak_make), _peak(row.peak_prefill), _peak(row.peak_decode), f"{row.make_s:.1f}",
        f"{row.quantize_s:.1f}", f"{row.capture_s:.1f}",
    ]  # fmt: skip


def _peak(memory: Memory | None) -> str:
    return "-" if memory is None else f"{memory.allocated / 1e9:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
