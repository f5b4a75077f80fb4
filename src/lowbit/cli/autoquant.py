"""`lowbit autoquant`: a config and an algorithm for every layer under a budget."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from lowbit.cli.output import Debug, Device, Dtype, Json, Model, command, emit_json, megabytes, progress_bar, stdout
from lowbit.cli.weights import calibration_batches
from lowbit.errors import see
from lowbit.recipe import BY_LAYER, LOWRANK, ROUNDINGS, STEPS, parse_recipe
from lowbit.tools.autoquant import autoquant as measure
from lowbit.tools.autoquant import measured
from lowbit.tools.autoquant_plan import Plan, save_plan
from lowbit.tools.autoquant_plot import plot_front
from lowbit.tools.bench_plot import check_plot
from lowbit.tools.evaluate import held_out_text, reference_of
from lowbit.tools.sources import find_source, parse_dtype


@command
def autoquant(
    model: Model,
    configs: Annotated[str, typer.Option(help="What layers may become, joined by commas.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file for lowbit quantize --rules.")],
    algorithms: Annotated[
        str,
        typer.Option(
            help=f"How they may be quantized, joined by commas: {', '.join(ROUNDINGS)}; before it, joined by +, any of "
            f"{', '.join(s for s in STEPS if s in BY_LAYER)}; behind it, {LOWRANK} or {LOWRANK}-RANK."
        ),
    ] = "rtn",
    budget_mb: Annotated[float | None, typer.Option(help="Megabytes (1e6 bytes) of the layers' weights.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="Milliseconds of the layers' matmuls in a step.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Nats of predicted KL divergence; the smallest then.")] = None,
    tokens: Annotated[int, typer.Option(help="Rows of a matmul whose time is measured.")] = 1,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens that sensitivities are measured on.")] = 256,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text that gptq, awq and lowrank see; default: the packaged prose."),
    ] = None,
    algorithm_tokens: Annotated[int, typer.Option(help="How much of it.")] = 8192,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Size and KL of all plans: svg, png, pdf.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose a config and an algorithm per layer by measured size, time and KL divergence; by speed alone without a
    budget."""
    if sum(b is not None for b in (budget_mb, budget_ms, max_kl)) > 1:
        raise ValueError("give one of --budget-mb, --budget-ms and --max-kl" + see("bad-option"))
    if calibration_tokens < 2 or tokens < 1:
        raise ValueError("--calibration-tokens must be at least 2 and --tokens at least 1" + see("bad-option"))
    if plot is not None:
        check_plot(plot)
    source = find_source(model)
    loaded = source.model(parse_dtype(dtype), device)
    ids = torch.tensor(source.tokenizer().encode(held_out_text()))
    window = min(1024, loaded.config.max_positions)
    words = algorithms.split(",")
    seen = any(parse_recipe(word).takes_batches for word in words)
    batches = calibration_batches(source, loaded, calibration, algorithm_tokens, device) if seen else None
    with progress_bar("measuring") as update:
        found = measure(loaded, ids[-calibration_tokens:], configs.split(","), algorithms=words, batches=batches,
                        tokens=tokens, window=window, progress=update)  # fmt: skip
    plan = found.within(
        max_bytes=None if budget_mb is None else int(budget_mb * 1e6),
        max_us=None if budget_ms is None else budget_ms * 1e3,
        max_kl=max_kl,
    )
    plan = measured(loaded, found, plan, reference_of(loaded, ids[:calibration_tokens], window), batches)
    save_plan(found, plan, out)
    by = "us" if budget_ms is not None else "bytes"
    gap = None if budget_mb is None and budget_ms is None else found.gap(plan, by)
    if plot is not None:
        plot_front(found, found.front()[0], plan, plot)
    uniform = {choice: found.uniform(choice) for choice in found.choices}
    if as_json:
        emit_json({"model": source.path, "out": out, "plan": plan, "gap": gap, "uniform": uniform, "found": found})
        return
    caption = "ms: the sum over layers, and all one after the other; KL in nats: the sum over groups, and the whole"
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for title in ("config", "MB", "ms, sum", "ms measured", "KL predicted", "KL measured"):
        table.add_column(title, justify="left" if title == "config" else "right")
    for name, row in {**uniform, "chosen": plan}.items():
        table.add_row(name, *_cells(row))
    if gap:
        table.caption = f"{table.caption}; a better plan could predict at most {gap:.2g} less"
    counts = Counter(name for group, name in zip(found.groups, plan.choices) for _ in group.layers)
    console = stdout()
    console.print(table)
    console.print("layers: " + ", ".join(f"{n} {spec}" for spec, n in counts.most_common()))
    console.print(f"rules in {out}; try: lowbit quantize {source.path} OUT --rules {out}", markup=False)


def _cells(plan: Plan) -> tuple[str, ...]:
    kl = "" if plan.measured_kl is None else f"{plan.measured_kl:.4f}"
    ms = "" if plan.measured_us is None else f"{plan.measured_us / 1e3:.3f}"
    return megabytes(plan.bytes), f"{plan.us / 1e3:.3f}", ms, f"{plan.kl:.4f}", kl
