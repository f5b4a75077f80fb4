"""Commands that show what there is: doctor and demo."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowbit.cli.output import (
    FAILED,
    OK,
    Debug,
    Device,
    Json,
    command,
    emit_json,
    megabytes,
    progress_bar,
    say,
    stderr,
    stdout,
)
from lowbit.errors import see
from lowbit.tools.demo import FULL, GRID_NOTE, QUICK, DemoResult, DemoRow, best_threads, run_demo
from lowbit.tools.doctor import ConfigCheck, diagnose
from lowbit.tools.sources import find_source


@command
def doctor(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """What this machine supports: its parts, and every config tried on a small layer.

    Exit code 1 if a config does not run.
    """
    with progress_bar("trying configs") as update:
        found = diagnose(device, update)
    if as_json:
        emit_json(found)
        return OK if found.healthy else FAILED
    console = stdout()
    parts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in found.machine.items():
        parts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(parts)
    table = Table(box=box.SIMPLE_HEAD, title=f"configs on {found.device}", title_justify="left")
    table.add_column("config")
    table.add_column("bits/weight", justify="right")
    for title in ("runs", "kernel, 1 token", "kernel, 512 tokens", "how"):
        table.add_column(title)
    for c in found.configs:
        table.add_row(*_check_cells(c))
    console.print(table)
    failed = [c.config for c in found.configs if not c.runs]
    if failed:
        say(f"[bold red]{len(failed)} configs do not run here:[/] {', '.join(failed)}")
        return FAILED
    console.print(f"[bold green]all {len(found.configs)} configs run here[/]")
    return OK


def _check_cells(c: ConfigCheck) -> list[str]:
    kernels = [*c.kernels, "", ""][:2]
    return [c.config, f"{c.bits_per_weight:.3f}", "[green]yes[/]" if c.runs else "[red]no[/]", *kernels, escape(c.how)]


@command
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer configs and tokens: under a minute.")] = False,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Another model: Hugging Face directory or GGUF.")
    ] = "demo",
    out: Annotated[Path, typer.Option(help="The HTML report; its data go beside it as .json.")] = Path(
        "lowbit-demo.html"
    ),
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a real language model in every weight format, measure what it costs, and hear it speak."""
    from lowbit.tools.page import require_packages
    from lowbit.tools.report import write_report

    require_packages()
    console = stderr() if as_json else stdout()
    plan = QUICK if quick else FULL
    started = time.perf_counter()
    if model == "demo":
        say("[dim]SmolLM2-135M-Instruct; the first time it is downloaded (93 MB) into lowbit's cache[/]")
    source = find_source(model)
    if source.kind == "checkpoint":
        raise ValueError(
            f"{source.path} is quantized already; the demo starts from an original model" + see("already-quantized")
        )
    loaded, tokenizer = source.model(device=device), source.tokenizer()
    named = "SmolLM2-135M-Instruct" if model == "demo" else source.path.resolve().name
    if loaded.model.norm.weight.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(best_threads(loaded))
    live = _LiveRows(console)
    with progress_bar("demo", console) as update:
        result = run_demo(
            loaded, tokenizer, plan, name=named, notes=(GRID_NOTE,) if model == "demo" else (), on_row=live.add,
            progress=update,
        )  # fmt: skip
    result = replace(result, seconds=time.perf_counter() - started, command=" ".join(["lowbit", *sys.argv[1:]]))
    data = out.with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(result, out, data)
    if as_json:
        emit_json(result)
        return
    _epilogue(console, result)
    console.print(f"report: [bold]{escape(str(out))}[/]   data: {escape(str(data))}   ({result.seconds:.0f} s)")


_COLUMNS = (
    ("config", 15), ("MB", 7), ("bits/weight", 11), ("perplexity", 15), ("KL (nats/token)", 17), ("top-1 %", 8),
    ("tokens/s", 9),
)  # fmt: skip


class _LiveRows:
    """The table, row by row: rich prints whole tables only, so columns have fixed widths."""

    def __init__(self, console: Console) -> None:
        self.console = console
        console.print("[bold]" + " ".join(f"{t:<{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(_COLUMNS)))
        console.print("[dim]" + "─" * (sum(w for _, w in _COLUMNS) + len(_COLUMNS) - 1))

    def add(self, row: DemoRow) -> None:
        cells = row_cells(row)
        line = " ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, (_, w)) in enumerate(zip(cells, _COLUMNS)))
        self.console.print(escape(line), style=_style(row))


def row_cells(row: DemoRow) -> list[str]:
    """One row of the demo's table as text."""
    q = row.quality
    original = not row.sqnr_db
    kl = "-" if original else f"{q.kl_mean:.4f} ± {q.kl_stderr:.4f}"
    top1 = "-" if original or q.top1_agreement is None else f"{100 * q.top1_agreement:.1f}"
    digits = 2 if q.perplexity < 1000 else 0
    perplexity = f"{q.perplexity:.{digits}f} ± {q.perplexity_stderr:.{digits}f}"
    speed = f"{row.tokens_per_second:.1f}"
    return [row.config, f"{row.model_bytes / 1e6:.1f}", f"{row.bits_per_weight:.3f}", perplexity, kl, top1, speed]


def _style(row: DemoRow) -> str:
    """Green for what nobody will notice, red for what everybody will: KL below 0.02, above 0.5 nats."""
    if not row.sqnr_db or row.quality.kl_mean is None:
        return "bold"
    return "green" if row.quality.kl_mean < 0.02 else "red" if row.quality.kl_mean > 0.5 else ""


def _epilogue(console: Console, result: DemoResult) -> None:
    console.print()
    console.print(f"[bold]{escape(result.prompt)}[/]")
    for row in result.rows:
        console.print(f"[cyan]{row.config:<15}[/] {escape(row.sample)}")
    console.print()
    q = result.rows[0].quality
    console.print(
        f"[dim]{result.model}, {result.parameters / 1e6:.1f} M parameters; MB is the whole model, embedding included "
        f"({megabytes(result.rows[0].model_bytes - result.rows[0].layer_bytes)} MB stay as they are); bits/weight is "
        f"that of the quantized layers. Perplexity and KL on {q.tokens} tokens, ± one standard error.[/]"
    )
    for note in result.notes:
        console.print(f"[dim]{escape(note)}[/]")
