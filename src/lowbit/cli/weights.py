"""Commands about weights: quantize, verify, load, inspect, explain, warmup."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lowbit import checkpoint
from lowbit.calibrate import Statistics, calibrate
from lowbit.cli.output import (
    FAILED,
    OK,
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    command,
    emit_json,
    megabytes,
    progress_bar,
    say,
    stdout,
)
from lowbit.errors import see
from lowbit.explain import explain as explain_model
from lowbit.models.llama import Llama
from lowbit.quantize import quantize_
from lowbit.recipe import LOWRANK, ROUNDINGS, STEPS, parse_recipe
from lowbit.report import LayerReport
from lowbit.report import Report as QuantizeReport
from lowbit.rules import Rule
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor
from lowbit.tools.autoquant_plan import load_plan
from lowbit.tools.inspect import SCHEMES, FloatLayer, QuantizedLayer, inspect_model
from lowbit.tools.sources import Source, export, find_source, is_static, parse_dtype, parse_rules, rules_for
from lowbit.warmup import TOKENS
from lowbit.warmup import warmup as warm

Config = Annotated[str | None, typer.Option("--config", "-c", help="Short name such as int4wo-128, or a format spec.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", "-r", metavar="NAME=CONFIG", help="A layer's own config: NAME is exact or re:PATTERN, "
                 "CONFIG may be none. May be repeated."),
]  # fmt: skip
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint directory.")]


@command
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it is a MODEL itself.")],
    config: Config = None,
    rule: Rules = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configs and algorithms by layer, as autoquant writes them.")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            "--algorithm",
            "-a",
            help=f"How values are chosen: {', '.join(ROUNDINGS)}; before it, joined by +, any of {', '.join(STEPS)}; "
            f"behind it, {LOWRANK} or {LOWRANK}-RANK. Default: what --rules says, else rtn.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text that gptq, awq and others see; default: the packaged prose."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of that text.")] = 16384,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep finished blocks here; the same command goes on behind them."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it as a checkpoint with its tokenizer.

    Every Linear takes --config; the output projection (lm_head) stays as it is unless a rule names it.
    """
    if config is None and not rule and rules is None:
        raise ValueError(
            "quantize: give --config (such as int4wo-128), --rules FILE, or at least one --rule NAME=CONFIG"
        )
    planned, algorithms = ({}, {}) if rules is None else load_plan(rules)
    words = planned | parse_rules(rule or [])
    if config is not None:
        parse_config(config)
    source = find_source(model)
    if source.kind == "checkpoint":
        raise ValueError(f"{source.path} is quantized already; quantize the original model" + see("already-quantized"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file; give a directory")
    if journal is not None and journal.resolve() == out.resolve():
        raise ValueError(f"OUT and --journal are both {out}; give the journal a directory of its own")
    if algorithm is not None and algorithms:
        raise ValueError(f"{rules} says how each layer is rounded; leave --algorithm out" + see("conflicting-rules"))
    # A layer that a --rule takes out of the plan has no use for its algorithm.
    asked = {n: a for n, a in algorithms.items() if words.get(n) is not None} or (algorithm or "rtn")
    recipes = [parse_recipe(a) for a in (asked.values() if isinstance(asked, dict) else (asked,))]
    loaded, batches = source.model(parse_dtype(dtype)), None
    if any(r.takes_batches for r in recipes):
        batches = calibration_batches(source, loaded, calibration, calibration_tokens, device)
    report = quantize_as_asked(
        source, loaded, rules_for(loaded, config, words), device, algorithm=asked, batches=batches, journal=journal
    )
    export(source, loaded, out)
    if journal is not None:
        say(f"{report.from_journal} layers were in the journal {escape(str(journal))}, which is not needed any more")
    if as_json:
        emit_json({"model": source.path, "out": out, **_summary(report)})
        return
    console = stdout()
    console.print(_report_table(report))
    console.print(_totals(report))
    console.print(f"saved to [bold]{escape(str(out))}[/]; try: lowbit generate {escape(str(out))} --prompt '...'")


def quantize_as_asked(
    source: Source, model: Llama, rules: Mapping[str, Rule], device: str, title: str = "quantizing",
    algorithm: str | Mapping[str, str] = "rtn", batches: list[Tensor] | None = None, journal: Path | None = None,
) -> QuantizeReport:  # fmt: skip
    """`quantize_` with a progress bar, calibrated on the packaged text where a config has static scales."""
    configs = [parse_config(c) if isinstance(c, str) else c for c in rules.values() if c is not None]
    static = any(is_static(c) for c in configs)
    statistics = _calibrated(source, model) if static else None
    with progress_bar(title) as update:
        return quantize_(
            model, rules, device=device, calibration=statistics, progress=update,
            algorithm=algorithm, batches=batches, journal=journal,
        )  # fmt: skip


def calibration_batches(source: Source, model: Llama, text: Path | None, tokens: int, device: str) -> list[Tensor]:
    """Windows of ids `(1, T)`: the beginning of a file, or the end of the packaged text."""
    if text is None:
        ids = _end_of_prose(source, tokens)
    else:
        ids = torch.tensor(source.tokenizer().encode(text.read_text(encoding="utf-8")))[:tokens]
    if len(ids) < 2:
        raise ValueError(f"quantize: the calibration text has {len(ids)} tokens; give a longer one" + see("bad-option"))
    windows = list(ids.to(device).view(1, -1).split(_window(model), dim=1))
    say(f"calibrating on {len(ids)} tokens in {len(windows)} windows")
    return windows


def _calibrated(source: Source, model: Llama) -> dict[str, Statistics]:
    window = _window(model)
    say(f"calibrating static activation scales on {window} tokens of the packaged prose")
    return calibrate(model, [_end_of_prose(source, window).view(1, -1)])


def _window(model: Llama) -> int:
    """Tokens that the model sees at once."""
    return min(1024, model.config.max_positions)


def _end_of_prose(source: Source, tokens: int) -> Tensor:
    """Ids `(T,)` of the packaged text's end; `eval` and the demo measure on its beginning."""
    from lowbit.tools.evaluate import held_out_text

    return torch.tensor(source.tokenizer().encode(held_out_text()))[-tokens:]


@command
def verify(directory: Directory, as_json: Json = False, debug: Debug = False) -> int:
    """Compare a checkpoint with its checksums, and every tensor with its dtype and shape.

    Exit code 1 if anything is wrong.
    """
    result = checkpoint.verify(directory)
    if as_json:
        emit_json({**vars(result), "ok": result.ok})
    elif result.ok:
        stdout().print(f"[bold green]ok[/] {escape(str(result))}")
    else:
        say(f"[bold red]damaged[/] {escape(str(result))}")
    return OK if result.ok else FAILED


@command
def load(directory: Directory, as_json: Json = False, debug: Debug = False) -> None:
    """Rebuild every weight of a checkpoint, checksums compared, and list them."""
    state = checkpoint.read(directory)
    rows = [_stored(name, tensor) for name, tensor in state.items()]
    if as_json:
        emit_json({"directory": directory, "tensors": rows, "bytes": _state_bytes(state)})
        return
    table = Table(box=box.SIMPLE_HEAD)
    for title, side in (("tensor", "left"), ("shape", "right"), ("format", "left"), ("activation", "left"),
                        ("bits/weight", "right"), ("MB", "right")):  # fmt: skip
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for r in rows:
        table.add_row(
            escape(r["name"]), "x".join(map(str, r["shape"])), r["format"], r["activation"] or "",
            f"{r['bits_per_weight']:.3g}", megabytes(r["bytes"]),
        )  # fmt: skip
    console = stdout()
    console.print(table)
    quantized = sum(isinstance(t, QuantizedTensor) for t in state.values())
    console.print(f"{len(rows)} tensors, {quantized} quantized, {megabytes(_state_bytes(state))} MB")


def _stored(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    packed = isinstance(tensor, QuantizedTensor)
    size = tensor.nbytes_packed if isinstance(tensor, QuantizedTensor) else tensor.numel() * tensor.element_size()
    return {
        "name": name,
        "shape": list(tensor.shape),
        "format": tensor.format.spec if isinstance(tensor, QuantizedTensor) else str(tensor.dtype)[6:],
        "activation": tensor.act_spec if isinstance(tensor, QuantizedTensor) else None,
        "quantized": packed,
        "bits_per_weight": 8 * size / max(tensor.numel(), 1),
        "bytes": size,
    }


def _state_bytes(state: Mapping[str, torch.Tensor]) -> int:
    distinct = {id(t): t for t in state.values()}
    return sum(_stored("", t)["bytes"] for t in distinct.values())


@command
def inspect(
    model: Model,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", help="Schemes to try on float layers; may be repeated.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Per layer: range, outliers and how well each scheme would hold it; of quantized layers, how codes are used."""
    source = find_source(model)
    schemes = tuple(parse_config(c).spec for c in config) if config else SCHEMES
    loaded = source.model(parse_dtype(dtype), device)
    with progress_bar("inspecting") as update:
        layers = inspect_model(loaded, schemes, update)
    if as_json:
        emit_json({"model": source.path, "layers": layers})
        return
    console = stdout()
    floats = [layer for layer in layers if isinstance(layer, FloatLayer)]
    packed = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
    if floats:
        console.print(_float_table(floats, schemes))
        console.print("[dim]outliers: weights beyond 6 standard deviations; excess kurtosis: 0 for a bell. Columns "
                      "of schemes: signal to quantization noise in dB, 6 dB are one bit.[/]")  # fmt: skip
    if packed:
        console.print(_packed_table(packed))
        console.print("[dim]entropy: bits per code that the codes carry; scales: smallest and largest in effect.[/]")


def _float_table(layers: list[FloatLayer], schemes: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for title in ("shape", "dtype", "lowest", "highest", "outliers", "kurtosis", *schemes):
        table.add_column(title, justify="right")
    for layer in layers:
        rated = [x for x in layer.sqnr_db.values()]
        cells = []
        for spec in schemes:
            value = layer.sqnr_db.get(spec)
            style = "bold" if value is not None and value == max(rated) else ""
            cells.append("" if value is None else f"[{style}]{value:.1f}[/]" if style else f"{value:.1f}")
        table.add_row(
            escape(layer.name), "x".join(map(str, layer.shape)), layer.dtype, f"{layer.lowest:.3g}",
            f"{layer.highest:.3g}", f"{layer.outlier_ratio:.1e}" if layer.outlier_ratio else "0",
            f"{layer.excess_kurtosis:.1f}", *cells,
        )  # fmt: skip
    return table


def _packed_table(layers: list[QuantizedLayer]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for title in ("shape", "format", "activation", "bits/weight", "codes used", "entropy", "scales", "MB"):
        table.add_column(title, justify="right")
    for layer in layers:
        table.add_row(
            escape(layer.name), "x".join(map(str, layer.shape)), layer.format, layer.activation,
            f"{layer.bits_per_weight:.3f}", f"{layer.codes_used} of {layer.codes}", f"{layer.entropy_bits:.2f}",
            f"{layer.scale_range[0]:.2e} - {layer.scale_range[1]:.2e}", megabytes(layer.bytes),
        )  # fmt: skip
    return table


@command
def explain(
    model: Model,
    config: Config = None,
    rule: Rules = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Which kernel would run each layer, for how many tokens, and why not another."""
    source, loaded = _quantized("explain", model, config, rule, device, dtype)
    explanation = explain_model(loaded)
    runs = not any(r.kernel.startswith("none") for layer in explanation.layers for r in layer.ranges)
    if as_json:
        emit_json({"model": source.path, "explanation": explanation})
    else:
        stdout().print(escape(str(explanation)))
    return OK if runs else FAILED


@command
def warmup(
    model: Model,
    tokens: Annotated[
        str, typer.Option("--tokens", "-m", metavar="M,...", help="Numbers of tokens that will run, commas between.")
    ] = ",".join(map(str, TOKENS)),
    config: Config = None,
    rule: Rules = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every kind of layer for given numbers of tokens, so that later processes find its kernels compiled."""
    counts = _counts(tokens)
    source, loaded = _quantized("warmup", model, config, rule, device, dtype)
    with progress_bar("warming up") as update:
        done = warm(loaded, counts, progress=update)
    if as_json:
        emit_json({"model": source.path, "warmup": done})
    else:
        stdout().print(escape(str(done)))


def _counts(words: str) -> list[int]:
    try:
        counts = [int(word) for word in words.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--tokens takes positive numbers, such as 1,2,4; got {words!r}" + see("bad-option"))
    return counts


def _quantized(
    asking: str, model: str, config: str | None, rule: list[str] | None, device: str, dtype: str | None
) -> tuple[Source, Llama]:
    """A checkpoint as it is, or another model quantized as asked."""
    source = find_source(model)
    words = parse_rules(rule or [])
    if source.kind == "checkpoint" and (config or rule):
        raise ValueError(
            f"{source.path} is quantized already; leave --config and --rule out" + see("already-quantized")
        )
    if source.kind != "checkpoint" and not (config or rule):
        raise ValueError(f"{asking}: give --config (such as int4wo-128): the model is not quantized")
    loaded = source.model(parse_dtype(dtype), device)
    if config or rule:
        quantize_as_asked(source, loaded, rules_for(loaded, config, words), device)
    return source, loaded


# Reports -----------------------------------------------------------------------------------------


def _summary(report: QuantizeReport) -> dict[str, Any]:
    return {
        "layers": report.layers,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "seconds": report.seconds,
        "from_journal": report.from_journal,
    }


def _totals(report: QuantizeReport) -> str:
    worst = report.worst
    text = (
        f"{len(report.quantized)} layers quantized, {len(report.skipped)} left alone; "
        f"{megabytes(report.bytes_before)} MB -> [bold]{megabytes(report.bytes_after)} MB[/] in {report.seconds:.1f} s"
    )
    return text if worst is None else f"{text}; lowest SQNR {worst.sqnr_db:.1f} dB in {escape(worst.name)}"


def _report_table(report: QuantizeReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for title, side in (("layer", "left"), ("shape", "right"), ("format", "left"), ("MB before", "right"),
                        ("MB after", "right"), ("SQNR dB", "right"), ("note", "left")):  # fmt: skip
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for r in report.layers:
        table.add_row(
            escape(r.name), "x".join(map(str, r.shape)), r.format or "-", megabytes(r.bytes_before),
            megabytes(r.bytes_after), "" if r.sqnr_db is None else f"{r.sqnr_db:.1f}", escape(_note(r)),
        )  # fmt: skip
    return table


def _note(r: LayerReport) -> str:
    return r.note or (f"skipped: {r.skipped}" if r.skipped else "")
