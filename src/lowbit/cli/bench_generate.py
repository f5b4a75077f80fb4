"""The command bench generate: the table line by line, its file and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lowbit.cli.bench import bench
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
from lowbit.models.shapes import SHAPES, shape_of
from lowbit.tools.bench_generate import Plan, bench_generate
from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.bench_plot import check_plot, write_budgets
from lowbit.tools.bench_rows import BF16, GenerateRow, Memory, about, document

_CONFIGS = ["int8wo", "float8wo", "int4:g128"]
_CONFIGS_HELP = f"A config's short name, or weight+activation such as int8:row+int8:row; bf16 is always there. {MANY}"


@bench.command()
@command
def generate(
    model: Annotated[str, typer.Option("--model", metavar="SHAPE", help=", ".join(SHAPES))] = "llama-3.1-8b",
    config: Annotated[list[str], typer.Option("--config", "-c", metavar="CONFIG", help=_CONFIGS_HELP)] = _CONFIGS,
    batch: Annotated[list[str], typer.Option("--batch", "-b", help=f"Numbers of sequences. {MANY}")] = ["1"],  # noqa: B006
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help=f"Tokens of a prompt. {MANY}")] = ["128"],  # noqa: B006
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", help="Steps of a generation.")] = 64,
    compiled: Annotated[bool, typer.Option("--compile", help="Also bf16 under plain torch.compile.")] = False,
    seconds: Seconds = 300.0,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of where a token's time goes: .svg, .png or .pdf.")] = None,
    device: MaybeDevice = None,
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
    facts = about(plan.device, command_line())
    hardware = f"{facts['gpu'] or facts['processor']}, torch {facts['torch']}"
    live = LiveTable(
        stderr() if as_json else stdout(), _COLUMNS, ["config"], {"config": [name for name, _ in plan.variants]}
    )
    live.heading(f"{model}, random weights; {hardware}")
    results: Results[GenerateRow] = Results(lambda rows, left_out: document(facts, rows, left_out), out)

    def keep(row: GenerateRow) -> None:
        _show(live, row)
        results.add(row)

    _, left_out = bench_generate(plan, keep, lambda stage: say(f"[dim]{escape(stage)} ...[/]"))
    content = results.write(left_out)
    for gone in left_out:
        say(f"left out, {escape(gone.reason)}: {escape(gone.scheme)}")
    if plot is not None and any(r.step_us for r in results.rows):
        write_budgets(results.rows, plot, f"{model}, {hardware}, {facts['date']}; medians")
    live.end(content, (out, plot), as_json)
    return FAILED if any(r.error for r in results.rows) else OK


# The table, line by line -------------------------------------------------------------------------

_COLUMNS = (
    ("config", 6), ("batch", 5), ("prompt", 6), ("tok/s", 8), ("x bf16", 6), ("step us", 9), ("linears", 9),
    ("floor", 9), ("share", 5), ("GB/s", 5), ("first ms", 8), ("eager", 7), ("model GB", 8), ("make", 6),
    ("prefill", 7), ("decode GB", 9), ("make s", 6), ("quantize", 8), ("capture", 7),
)  # fmt: skip


def _show(live: LiveTable, row: GenerateRow) -> None:
    live.line(row_cells(row), "red" if row.error else "green" if (row.speedup or 0) > 1 else "")
    if row.error:
        live.note(row.error)


def row_cells(row: GenerateRow) -> list[str]:
    """One line of the table as text.

    Step, linears and floor are microseconds of one token: everything, the linear layers alone, reading their bytes
    alone. The share is that of the floor in the step. Memory is the most allocated in a phase.
    """
    return [
        row.config, str(row.batch), str(row.prompt), number(row.tokens_per_second, 1), number(row.speedup, 2),
        number(row.step_us, 1), number(row.linears_us, 1), number(row.floor_us, 1), percent(row.floor_share),
        number(row.gb_s, 0), number(row.first_token_ms, 2), number(row.first_token_eager_ms, 2),
        f"{row.model_bytes / 1e9:.2f}",
        _peak(row.peak_make), _peak(row.peak_prefill), _peak(row.peak_decode), f"{row.make_s:.1f}",
        f"{row.quantize_s:.1f}", f"{row.capture_s:.1f}",
    ]  # fmt: skip


def _peak(memory: Memory | None) -> str:
    return "-" if memory is None else f"{memory.allocated / 1e9:.2f}"
