"""The command eval: what quantization costs a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from lowbit.cli.output import (
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    command,
    emit_json,
    megabytes,
    progress_bar,
    stdout,
)
from lowbit.cli.weights import quantize_as_asked
from lowbit.errors import see
from lowbit.models.llama import Llama
from lowbit.specs import parse_config
from lowbit.tools.evaluate import EvalResult, evaluate, held_out_text, reference_of
from lowbit.tools.sources import find_source, parse_dtype, rules_for, variant, weight_bytes
from lowbit.tools.tasks import TaskResult, run_tasks


@command
def eval_(
    model: Model,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", help="Configs to measure; may be repeated.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="For a quantized checkpoint: the MODEL it was made from, to compare with.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; default: packaged prose.")] = None,
    tokens: Annotated[int, typer.Option(help="Measure on the first so many tokens of the text.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 1024,
    tasks: Annotated[str | None, typer.Option(help="Multiple-choice tasks of lm-eval, joined by commas.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where YAML files define them; default: lm-eval's own.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity, and KL divergence and top-1 agreement against the original model; accuracy on tasks."""
    specs = [parse_config(c).spec for c in config or []]
    source = find_source(model)
    if original is not None and (source.kind != "checkpoint" or specs):
        raise ValueError("--original is for a quantized checkpoint alone; --config compares with MODEL itself")
    if source.kind == "checkpoint" and specs:
        raise ValueError(f"{source.path} is quantized already; leave --config out" + see("already-quantized"))
    if tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {tokens}")
    words = held_out_text() if text is None else text.read_text(encoding="utf-8")
    ids = torch.tensor(source.tokenizer().encode(words))[:tokens]
    results: list[tuple[str, int, EvalResult]] = []
    answers: list[tuple[str, list[TaskResult]]] = []

    def ask(name: str, asked: Llama) -> None:
        if tasks is not None:
            found = run_tasks(asked, source.tokenizer(), tasks.split(","), folder=task_folder, limit=task_limit)
            compared = bool(answers) and against is not None
            answers.append((name, [r.against(o) for r, o in zip(found, answers[0][1])] if compared else found))

    with progress_bar("evaluating") as update:
        base = find_source(original).model(parse_dtype(dtype), device) if original is not None else None
        loaded = source.model(parse_dtype(dtype) if base is None else None, device)
        steps = _Steps(update, len(specs) + 1 + (base is not None or bool(specs)))
        against = base or (loaded if specs else None)
        reference = None
        if against is not None:
            reference = reference_of(against, ids, window, steps.next("reading with the original"))
        if base is not None:
            results.append(("original", weight_bytes(base), evaluate(base, ids, reference, window)))
            ask("original", base)
        results.append((_name(source.kind, loaded), weight_bytes(loaded),
                        evaluate(loaded, ids, reference, window, steps.next(str(source.path)))))  # fmt: skip
        ask(results[-1][0], loaded)
        for spec in specs:
            copy = variant(loaded)
            assert isinstance(copy, Llama)
            quantize_as_asked(source, copy, rules_for(copy, spec), device, spec)
            measured = evaluate(copy, ids, reference, window, steps.next(spec))
            results.append((spec, weight_bytes(copy), measured))
            ask(spec, copy)
            del copy
    if as_json:
        rows: list[dict[str, Any]] = [{"config": c, "bytes": b, **vars(r)} for c, b, r in results]
        emit_json({"model": source.path, "text": text or "packaged prose", "window": window, "results": rows,
                   "tasks": [{"config": name, **vars(r)} for name, found in answers for r in found]})  # fmt: skip
        return
    stdout().print(_eval_table(results))
    if answers:
        stdout().print(_task_table(answers))


class _Steps:
    """One bar over several models: windows of each are shares of a step."""

    def __init__(self, update: Any, total: int) -> None:
        self.update, self.total, self.done = update, total, -1

    def next(self, what: str) -> Any:
        self.done += 1
        done = self.done
        return lambda i, n: self.update(done * n + i, self.total * n, what)


def _name(kind: str, model: Llama) -> str:
    return "quantized" if kind == "checkpoint" else str(model.model.norm.weight.dtype).removeprefix("torch.")


def _eval_table(results: list[tuple[str, int, EvalResult]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=f"{results[0][2].tokens} tokens; +- is one standard error")
    table.add_column("config")
    for title in ("MB", "perplexity", "ratio", "KL (nats)", "KL p99", "top-1 %", "seconds"):
        table.add_column(title, justify="right")
    for name, size, r in results:
        compared = ["", "", "", ""]
        if r.kl_mean is not None and r.kl_p99 is not None and r.top1_agreement is not None:
            compared = [
                f"{r.perplexity_ratio:.4f} +- {r.perplexity_ratio_stderr:.4f}", f"{r.kl_mean:.4f} +- {r.kl_stderr:.4f}",
                f"{r.kl_p99:.3f}", f"{100 * r.top1_agreement:.1f}",
            ]  # fmt: skip
        table.add_row(
            escape(name), megabytes(size), f"{r.perplexity:.2f} +- {r.perplexity_stderr:.2f}", *compared,
            f"{r.seconds:.1f}",
        )  # fmt: skip
    return table


def _task_table(answers: list[tuple[str, list[TaskResult]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption="+- is one standard error; same: answered as the original does")
    for title in ("task", "config", "questions", "accuracy %", "by length %", "same %"):
        table.add_column(title, justify="left" if title in ("task", "config") else "right")
    for name, found in answers:
        for r in found:
            known = [m if m in r.metrics and m in r.stderrs else None for m in ("acc", "acc_norm")]
            cells = ["" if m is None else f"{100 * r.metrics[m]:.1f} +- {100 * r.stderrs[m]:.1f}" for m in known]
            same = "" if r.agreement is None else f"{100 * r.agreement:.1f}"
            table.add_row(escape(r.task), escape(name), str(r.questions), *cells, same)
    return table
