"""A profile as one HTML file that opens offline, and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lowbit.tools.page import COLOURS, figure, finite, render_template, svg
from lowbit.tools.profile.kernels import kind_of
from lowbit.tools.profile.memory import PhaseMemory, Point
from lowbit.tools.profile.result import Profile, document
from lowbit.tools.profile.suggest import megabytes
from lowbit.tools.profile.verdict import Verdict, groups

#: Colours of verdicts, kinds of kernels and phases in turn.
VERDICT_COLOURS = {
    Verdict.FUSED: "--table", Verdict.CHUNKED: "--int", Verdict.UNFUSED: "--bad", Verdict.NOT_RUN: "--muted",
    Verdict.NOT_QUANTIZED: "--original",
}  # fmt: skip
_KINDS = {"matrix product": "--float", "copy or elementwise": "--int", "other": "--original"}
_PHASES = ("--original", "--block", "--float", "--table", "--int")
_BANDS, _KERNELS = 12, 12


def write_report(profile: Profile, html: Path) -> None:
    """Write the page."""
    html.write_text(render(profile), encoding="utf-8")


def write_json(profile: Profile, file: Path) -> None:
    """Write the data. JSON has no NaN or Inf: they are null."""
    file.write_text(json.dumps(finite(document(profile)), indent=1) + "\n", encoding="utf-8")


def render(profile: Profile) -> str:
    """The page.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    phase = profile.busiest_phase
    shown = [k for k in profile.kernels if k.phase == phase and k.share >= 0.005][:_KERNELS]
    return render_template(
        "profile.html.j2",
        p=profile,
        cards=_cards(profile),
        verdicts=[_verdict_row(members) for members in groups(profile.verdicts.layers)],
        phases=[_phase_row(profile, t.phase) for t in profile.phases],
        memory_plot=memory_plot(profile) if profile.timeline.points else "",
        kernel_plot=_kernel_plot(profile, shown) if shown else "",
        kinds=[(title, colour) for title, colour in _KINDS.items() if any(kind_of(k.name) == title for k in shown)],
        layer_plot=_layer_plot(profile, phase) if profile.layer_times(phase) else "",
        phase=phase,
        verdict_colours=[(v.value, c) for v, c in VERDICT_COLOURS.items() if profile.verdicts.of(v)],
        spikes=_spike_rows(profile),
        idle=[g for g in profile.gaps if g.phase],
    )


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


# Cards and tables --------------------------------------------------------------------------------


def _cards(p: Profile) -> list[dict[str, str]]:
    """The findings at a glance."""
    quantized = p.verdicts.quantized
    good = "var(--bad)" if p.unfused else "var(--table)"
    if quantized:
        figure_ = (
            f"{len(p.unfused)} of {len(quantized)} dequantize" if p.unfused else f"0 of {len(quantized)} dequantize"
        )
    else:
        figure_ = "nothing is quantized"
    cards = [{"title": "quantized layers", "figure": figure_, "text": p.verdicts.summary, "colour": good}]
    if p.timeline.phases:
        top = max(p.timeline.phases, key=lambda x: x.peak)
        text = f"in {top.phase or 'the beginning'}; it found {megabytes(top.before)} in use"
        cards.append({"title": "peak memory", "figure": megabytes(top.peak), "text": text, "colour": "var(--accent)"})
    for t in p.phases:
        if p.tokens.get(t.phase):
            speed = f"{p.tokens[t.phase] / t.seconds:,.1f} tokens/s"
            text = f"{p.tokens[t.phase]} tokens in {seconds(t.seconds)}"
            cards.append({"title": t.phase, "figure": speed, "text": text, "colour": "var(--accent)"})
    times = [t for t in p.layer_times(p.busiest_phase) if t.share is not None]
    if times and p.ceiling_gb_s:
        share = statistics.median(100 * (t.share or 0) for t in times)
        text = (
            f"median of {len(times)} layers in {p.busiest_phase}; reading alone reaches {p.ceiling_gb_s:,.0f} GB/s here"
        )
        cards.append({"title": "share of the memory's speed", "figure": f"{share:.0f} %", "text": text,
                      "colour": "var(--accent)"})  # fmt: skip
    return cards


def _verdict_row(members: Sequence[Any]) -> dict[str, Any]:
    first = members[0]
    witnesses = {}
    for name in dict.fromkeys(n for v in members for n in v.witnesses):
        said = [v.witnesses[name] for v in members if name in v.witnesses]
        witnesses[name] = f"{sum(said)} of {len(said)} copied" if any(said) else "no copy"
    return {
        "names": [v.layer.name or "(the model itself)" for v in members],
        "layer": first.layer,
        "verdict": first.verdict.value,
        "colour": VERDICT_COLOURS[first.verdict],
        "why": first.why,
        "size": megabytes(first.copy_bytes) if first.copy_bytes else "",
        "stack": [str(frame) for frame in first.stack] if first.copy_bytes else [],
        "witnesses": witnesses,
    }


def _phase_row(p: Profile, phase: str) -> dict[str, Any]:
    memory = next((m for m in p.timeline.phases if m.phase == phase), None)
    time = next(t for t in p.phases if t.phase == phase)
    return {
        "phase": phase,
        "seconds": seconds(time.seconds) + (" (recorded)" if time.instrumented else ""),
        "before": megabytes(memory.before) if memory else "",
        "peak": megabytes(memory.peak) if memory else "",
        "allocated": megabytes(memory.allocated) if memory else "",
        "attributed": f"{100 * memory.attributed:.1f} %" if memory else "",
        "slowdown": f"{p.slowdown[phase]:.1f} x" if phase in p.slowdown else "",
    }


def _spike_rows(p: Profile) -> list[dict[str, Any]]:
    rows = []
    for m in p.timeline.phases:
        for s in m.spikes[:3]:
            layers = ", ".join(s.layers[:2]) + (f" and {len(s.layers) - 2} more" if len(s.layers) > 2 else "")
            rows.append({"phase": m.phase, "bytes": megabytes(s.bytes), "count": s.count, "layers": layers,
                         "stack": [str(frame) for frame in s.stack]})  # fmt: skip
    return rows


# Plots -------------------------------------------------------------------------------------------


def _bands(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Consecutive points of a phase."""
    return [(phase, list(members)) for phase, members in groupby(points, key=lambda point: point.phase)]


def memory_plot(p: Profile) -> str:
    """Memory over time. Phases differ in length by orders of magnitude, so each gets the same width, linear inside."""
    plot, axes = figure(11, 3.6)
    bands = [(phase, members) for phase, members in _bands(p.timeline.points) if phase]
    if not 0 < len(bands) <= _BANDS:
        bands = [("", list(p.timeline.points))]
    before = p.timeline.points[0].bytes if p.timeline.points[0].phase == "" else 0
    colours = dict(zip(dict.fromkeys(phase for phase, _ in bands), _PHASES * _BANDS))
    top = max(point.bytes for point in p.timeline.points) / 1e6 or 1.0
    seen: set[str] = set()
    for i, (phase, members) in enumerate(bands):
        start, end = members[0].seconds, members[-1].seconds
        length = (end - start) or 1.0
        x = [i, *(i + (m.seconds - start) / length for m in members), i + 1]
        y = [before / 1e6, *(m.bytes / 1e6 for m in members), members[-1].bytes / 1e6]
        before = members[-1].bytes
        colour = COLOURS[colours[phase]]
        axes.fill_between(x, y, step="post", color=colour, alpha=0.35, linewidth=0)
        axes.step(x, y, where="post", color=colour, linewidth=1.3)
        axes.axvline(i + 1, color=COLOURS["--line"], linewidth=0.8)
        memory = next((m for m in p.timeline.phases if m.phase == phase), None)
        if memory is not None and phase not in seen:
            seen.add(phase)
            at = i + min(max((memory.peak_at - start) / length, 0.0), 1.0)
            _mark(axes, memory, at, i, top)
    axes.set_xlim(0, len(bands))
    axes.set_ylim(0, 1.32 * top)
    spans = [members[-1].seconds - members[0].seconds for _, members in bands]
    axes.set_xticks([i + 0.5 for i in range(len(bands))],
                    [f"{phase}\n{seconds(s)}" for (phase, _), s in zip(bands, spans)])  # fmt: skip
    axes.tick_params(axis="x", length=0, labelcolor=COLOURS["--text"])
    axes.grid(True, axis="y", color=COLOURS["--line"], linewidth=0.6)
    axes.set_ylabel("MB in use", color=COLOURS["--muted"])
    return svg(plot, "Memory over time by phase")


def _mark(axes: Any, memory: PhaseMemory, at: float, band: int, top: float) -> None:
    """The peak of a phase, with what most of it is."""
    y = memory.peak / 1e6
    axes.plot([at], [y], marker="o", markersize=6, color=COLOURS["--bad"], markeredgecolor=COLOURS["--card"])
    text = megabytes(memory.peak)
    if memory.spikes and memory.spikes[0].stack:
        frame = memory.spikes[0].stack[0]
        text += f"\n{megabytes(memory.spikes[0].bytes)} at\n{Path(frame.file).name}:{frame.line}"
    right = at > band + 0.55
    axes.annotate(text, (at, y), (-7 if right else 7, 4), textcoords="offset points", fontsize=8,
                  ha="right" if right else "left", va="bottom", color=COLOURS["--text"], linespacing=1.25)  # fmt: skip


def _kernel_plot(p: Profile, shown: Sequence[Any]) -> str:
    rows = list(reversed(shown))
    plot, axes = figure(6.0, max(2.0, 0.75 + 0.3 * len(rows)))
    names = [_shorten(k.name) for k in rows]
    axes.barh(range(len(rows)), [k.us / 1e3 for k in rows], height=0.62,
              color=[COLOURS[_KINDS[kind_of(k.name)]] for k in rows])  # fmt: skip
    longest = max(k.us for k in rows) / 1e3 or 1.0
    for i, k in enumerate(rows):
        axes.annotate(f"{100 * k.share:.0f} %, {k.calls} calls", (k.us / 1e3, i), (5, 0), textcoords="offset points",
                      va="center", fontsize=8.5, color=COLOURS["--text"])  # fmt: skip
    axes.set_xlim(0, 1.35 * longest)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["--text"])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("milliseconds", color=COLOURS["--muted"])
    return svg(plot, "Kernels by time")


def _shorten(name: str) -> str:
    """The name of a kernel without its template's arguments."""
    name = name.removeprefix("void ").partition("<")[0].partition("(")[0] or name
    return name if len(name) <= 34 else f"{name[:33]}…"


def _layer_plot(p: Profile, phase: str) -> str:
    """How fast each layer got its weight, in the order of the model, under the line of what memory can do."""
    order = {name: v for v in p.verdicts.layers for name in v.layer.names}
    times = {t.layer: t for t in p.layer_times(phase)}
    names = [name for name in order if name in times]
    plot, axes = figure(6.0, 3.9)
    colours = [COLOURS[VERDICT_COLOURS[order[name].verdict]] for name in names]
    axes.bar(
        range(len(names)), [times[name].gb_s for name in names], width=0.8 if len(names) < 60 else 1.0, color=colours
    )
    if p.ceiling_gb_s:
        axes.axhline(p.ceiling_gb_s, color=COLOURS["--text"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"reading alone: {p.ceiling_gb_s:,.0f} GB/s", (0, p.ceiling_gb_s), (2, 3),
                      textcoords="offset points", fontsize=8.5, color=COLOURS["--muted"])  # fmt: skip
    most = max([times[name].gb_s for name in names] + ([p.ceiling_gb_s] if p.ceiling_gb_s else []))
    axes.set_ylim(0, 1.12 * most)
    axes.set_xlim(-0.6, len(names) - 0.4)
    if len(names) <= 16:
        axes.set_xticks(range(len(names)), [name.removeprefix("model.layers.") for name in names], rotation=60,
                        ha="right", rotation_mode="anchor", fontsize=8)  # fmt: skip
    else:
        axes.set_xticks([])
        axes.set_xlabel("layers, first to last", color=COLOURS["--muted"])
    axes.set_ylabel("GB/s of stored weight", color=COLOURS["--muted"])
    axes.grid(True, axis="y", color=COLOURS["--line"], linewidth=0.6)
    return svg(plot, "Bandwidth of each layer")
