"""The command that looks at a run from inside: profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lowbit.cli.output import FAILED, OK, Debug, Device, Dtype, Json, Model, command, emit_json, say, stdout
from lowbit.cli.weights import Config, quantize_as_asked
from lowbit.errors import see
from lowbit.specs import parse_config
from lowbit.tools.page import require_packages
from lowbit.tools.profile import Files, Profile, document
from lowbit.tools.profile import profile as profile_model
from lowbit.tools.profile.language import RECORDED, reads_and_generates
from lowbit.tools.profile.report import seconds, write_json, write_report
from lowbit.tools.profile.session import Phase
from lowbit.tools.profile.suggest import megabytes
from lowbit.tools.profile.verdict import Verdict, groups
from lowbit.tools.sources import find_source, parse_dtype, rules_for

#: Exit code where the thing that --fail-on names was found.
FOUND = 3
FAIL_ON = "unfused-dequant"
_STYLES = {Verdict.FUSED: "green", Verdict.CHUNKED: "yellow", Verdict.UNFUSED: "bold red"}


@command
def profile(
    model: Model,
    config: Config = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is read.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it, one at a time.")] = 16,
    html: Annotated[
        Path | None,
        typer.Option(help="Page to write; beside it .json, .trace.json.gz for Perfetto, on a GPU .snapshot.pickle."),
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(metavar="WHAT", help=f"{FAIL_ON}: exit code {FOUND} if a layer is dequantized.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Whether quantized weights stay packed while the model runs, and where memory and time go.

    Exit code 3 if --fail-on finds what it names, 1 if memory runs out; what was seen until then is reported.
    """
    if fail_on not in (None, FAIL_ON):
        raise ValueError(f"--fail-on {fail_on}: there is only {FAIL_ON}" + see("bad-option"))
    for option, value in (("--prompt-tokens", prompt_tokens), ("--new-tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}" + see("bad-option"))
    if config is not None:
        parse_config(config)
    source = find_source(model)
    if source.kind == "checkpoint" and config is not None:
        raise ValueError(f"{source.path} is quantized already; leave --config out" + see("already-quantized"))
    if html is not None:
        require_packages()
        html.parent.mkdir(parents=True, exist_ok=True)

    def load(phase: Phase) -> nn.Module:
        with phase("load") as count:
            loaded = source.model(parse_dtype(dtype), device)
            count(loaded)
        if config is not None:
            with phase("quantize"):
                quantize_as_asked(source, loaded, rules_for(loaded, config), device)
        return loaded

    cuda = torch.device(device).type == "cuda"
    files = Files(
        html.with_suffix(".trace.json.gz") if html is not None else None,
        html.with_suffix(".snapshot.pickle") if html is not None and cuda else None,
    )
    title = f"{source.name} {config}" if config is not None else source.name
    tokens = {"prefill": prompt_tokens, "decode": new_tokens}
    found = profile_model(
        load, reads_and_generates(prompt_tokens, new_tokens), device=device, title=title, tokens=tokens, files=files,
        recorded=reads_and_generates(prompt_tokens, min(new_tokens, RECORDED)),
        recorded_tokens=tokens | {"decode": min(new_tokens, RECORDED)},
    )  # fmt: skip
    written = []
    if html is not None:
        write_report(found, html)
        write_json(found, html.with_suffix(".json"))
        written = [f for f in (html, html.with_suffix(".json"), files.trace, files.snapshot) if f is not None]
    if as_json:
        emit_json(document(found))
    else:
        show(found, stdout())
        for file in written:
            stdout().print(f"written: [bold]{escape(str(file))}[/]")
    if found.error:
        say(f"[bold red]error:[/] {escape(found.error)}")
        return FAILED
    if fail_on is not None and found.unfused:
        say(f"[bold red]{len(found.unfused)} layers are dequantized as a whole[/]")
        return FOUND
    return OK


def show(p: Profile, console: Console) -> None:
    """The profile in the terminal: verdicts, phases, kernels, suggestions."""
    machine = ", ".join(f"{name} {value}" if name != "device" else value for name, value in p.machine.items())
    console.print(f"[bold]{escape(p.title)}[/]  [dim]{escape(machine)}[/]")
    console.print(_verdict_table(p))
    console.print(_phase_table(p))
    shown = [k for k in p.kernels if k.phase == p.busiest_phase][:8]
    if shown:
        table = Table(box=box.SIMPLE_HEAD, title=f"kernels in {p.busiest_phase}", title_justify="left")
        table.add_column("kernel", max_width=60, no_wrap=True)
        for title in ("ms", "calls", "share"):
            table.add_column(title, justify="right")
        for k in shown:
            table.add_row(escape(k.name), f"{k.us / 1e3:.2f}", str(k.calls), f"{100 * k.share:.0f} %")
        console.print(table)
    slow = {phase: f"{factor:.1f} times" for phase, factor in p.slowdown.items() if factor > 1.2}
    if slow:
        words = ", ".join(f"{phase} {factor}" for phase, factor in slow.items())
        console.print(f"[dim]recording made phases take longer: {words}; kernels and GB/s are as recorded[/]")
    for i, s in enumerate(p.suggestions, 1):
        console.print(f"[bold]{i}. {escape(s.gain)}[/]", soft_wrap=True)
        console.print(f"   {escape(s.text)}.", soft_wrap=True)


def _verdict_table(p: Profile) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=escape(p.verdicts.summary))
    for title in ("layer", "scheme", "bits", "verdict", "copy", "how"):
        table.add_column(title, justify="right" if title in ("bits", "copy") else "left")
    for members in groups(p.verdicts.layers):
        v = members[0]
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        style = _STYLES.get(v.verdict, "dim")
        table.add_row(
            escape(v.layer.name + more), escape(v.layer.scheme), f"{v.layer.bits:.2f}",
            f"[{style}]{v.verdict.value}[/]", megabytes(v.copy_bytes) if v.copy_bytes else "", escape(v.why),
        )  # fmt: skip
    return table


def _phase_table(p: Profile) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("phase")
    for title in ("time", "tokens/s", "in use before", "peak", "GB/s of weights", "share", "idle"):
        table.add_column(title, justify="right")
    memory = {m.phase: m for m in p.timeline.phases}
    idle = {g.phase: f"{100 * g.idle:.0f} %" for g in p.gaps}
    for t in p.phases:
        speed = f"{p.tokens[t.phase] / t.seconds:,.1f}" if t.phase in p.tokens else ""
        m = memory.get(t.phase)
        gb_s = share = ""
        layers = p.layer_times(t.phase)
        if layers and (us := sum(x.us * x.calls for x in layers)):
            read = sum(x.gb_s * x.us * x.calls for x in layers) / us
            gb_s = f"{read:.1f}"
            share = f"{100 * read / p.ceiling_gb_s:.0f} %" if p.ceiling_gb_s else ""
        table.add_row(
            t.phase, seconds(t.seconds), speed, megabytes(m.before) if m else "", megabytes(m.peak) if m else "",
            gb_s, share, idle.get(t.phase, ""),
        )  # fmt: skip
    return table
