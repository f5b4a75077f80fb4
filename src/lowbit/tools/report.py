"""The demo's result as one HTML file that needs nothing else, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from lowbit.tools.demo import DemoResult, DemoRow
from lowbit.tools.page import COLOURS, figure, finite, render_template, svg


class Family(NamedTuple):
    """Configs shown in one colour."""

    variable: str
    title: str


ORIGINAL = Family("--original", "original")
FLOAT8, INTEGER = Family("--float", "float8"), Family("--int", "integers")
BLOCK, TABLE = Family("--block", "MX and NVFP4"), Family("--table", "tables")
_FAMILIES = (("float8", FLOAT8), ("mx", BLOCK), ("nvfp4", BLOCK), ("nf4", TABLE), ("fp4", TABLE), ("codebook", TABLE))


def family(row: DemoRow) -> Family:
    """The family of a row, by the beginning of its config's name."""
    if not row.sqnr_db:
        return ORIGINAL
    return next((f for start, f in _FAMILIES if row.config.startswith(start)), INTEGER)


def write_report(result: DemoResult, html: Path, data: Path) -> None:
    """Write both files. JSON has no NaN or Inf: they are null."""
    html.write_text(render(result), encoding="utf-8")
    data.write_text(json.dumps(finite(dataclasses.asdict(result)), indent=1) + "\n", encoding="utf-8")


def render(result: DemoResult) -> str:
    """The page.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
        ValueError: the result has no rows.
    """
    if not result.rows:
        raise ValueError("the report needs at least one measured row")
    quantized = [r for r in result.rows if r.sqnr_db]
    return render_template(
        "demo.html.j2",
        result=result,
        rows=[_table_row(r, result) for r in result.rows],
        cards=_cards(result),
        families=list(dict.fromkeys(family(r) for r in result.rows)),
        size_plot=_size_plot(result) if quantized else "",
        speed_plot=_speed_plot(result),
        layer_plot=_layer_plot(quantized) if quantized else "",
    )


# The table and the cards -------------------------------------------------------------------------


def _table_row(row: DemoRow, result: DemoResult) -> dict[str, Any]:
    """What the template shows, with the lengths of bars in percent."""
    q, original = row.quality, not row.sqnr_db
    speeds = [r.tokens_per_second for r in result.rows if math.isfinite(r.tokens_per_second)]
    return {
        "row": row,
        "family": family(row),
        "original": original,
        "quality": q,
        "size": row.model_bytes / 1e6,
        "size_bar": 100 * row.model_bytes / result.rows[0].model_bytes,
        "bits_bar": 100 * row.bits_per_weight / result.rows[0].bits_per_weight,
        "kl_bar": 0.0 if original else _log_share(q.kl_mean or 0.0),
        "speed": row.tokens_per_second if math.isfinite(row.tokens_per_second) else None,
        "speed_bar": 100 * row.tokens_per_second / max(speeds) if math.isfinite(row.tokens_per_second) else 0.0,
        "top1": None if original or q.top1_agreement is None else 100 * q.top1_agreement,
        "digits": 2 if q.perplexity < 1000 else 0,
        "change": "" if original or q.perplexity_ratio is None else _change(q.perplexity_ratio),
        "worst": min(row.sqnr_db.values()) if row.sqnr_db else None,
        "median": statistics.median(row.sqnr_db.values()) if row.sqnr_db else None,
    }


def _change(ratio: float) -> str:
    """A ratio as people say it: +3.2 %, or 14 times."""
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 10 else f"{ratio:,.0f} times"


def _perplexity(row: DemoRow) -> str:
    value = row.quality.perplexity
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _log_share(kl: float) -> float:
    """Length of a bar for a KL divergence: 0.001 nats and less are nothing, 10 nats are all of it."""
    return 100 * min(max((math.log10(max(kl, 1e-9)) + 3) / 4, 0.0), 1.0)


def _cards(result: DemoResult) -> list[dict[str, str]]:
    """Three findings, computed from the rows."""
    original, quantized = result.rows[0], [r for r in result.rows if r.sqnr_db and r.quality.kl_mean is not None]
    if not quantized:
        return []

    def kl(row: DemoRow) -> float:
        return row.quality.kl_mean or 0.0

    def card(title: str, row: DemoRow) -> dict[str, str]:
        smaller = original.model_bytes / row.model_bytes
        return {
            "title": title,
            "config": row.config,
            "figure": f"{smaller:.2f}x smaller",
            "text": f"{row.bits_per_weight:.2f} bits per weight, KL {kl(row):.3g} nats, "
            f"perplexity {_perplexity(row)} (original {_perplexity(original)})",
        }

    cards = [card("closest to the original", min(quantized, key=kl))]
    four = [r for r in quantized if 3.5 <= r.bits_per_weight < 5]
    if four:
        cards.append(card("closest with 4-bit codes", min(four, key=kl)))
    cards.append(card("smallest, and its price", min(quantized, key=lambda r: r.model_bytes)))
    return cards


# Plots -------------------------------------------------------------------------------------------


def _size_plot(result: DemoResult) -> str:
    """Size of the model against KL divergence; down and to the left is better."""
    plot, axes = figure(6.0, 4.9)
    rows = sorted((r for r in result.rows if r.sqnr_db), key=lambda r: r.quality.kl_mean or 0.0)
    points = [(r.model_bytes / 1e6, max(r.quality.kl_mean or 0.0, 1e-5), r) for r in rows]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, which="major", color=COLOURS["--line"], linewidth=0.6)
    for x, y, r in points:
        axes.errorbar(x, y, yerr=r.quality.kl_stderr or 0.0, color=COLOURS[family(r).variable], marker="o",
                      markersize=7, markeredgecolor=COLOURS["--card"], markeredgewidth=1, linewidth=1.2)  # fmt: skip
    sizes, divergences = [p[0] for p in points], [p[1] for p in points]
    room = max(sizes) - min(sizes) or max(sizes)
    axes.set_xlim(min(sizes) - 0.05 * room, max(sizes) + 0.34 * room)
    axes.set_ylim(min(divergences) / 1.7, max(divergences) * 1.7)
    low, high = (math.log(v) for v in axes.get_ylim())
    heights = [(math.log(y) - low) / (high - low) for _, y, _ in points]
    places = _spread(list(zip(sizes, heights)), 0.05, 0.25 * room)
    for (x, y, r), place in zip(points, places):
        # To the right of every point at the label's height.
        near = [p for p, h in zip(sizes, heights) if x <= p < x + 0.2 * room and abs(h - place) < 0.06]
        at = (max([x, *near]) + 0.035 * room, math.exp(low + place * (high - low)))
        axes.annotate(r.config, (x, y), at, fontsize=9.5, color=COLOURS["--text"], va="center",
                      arrowprops={"arrowstyle": "-", "color": COLOURS["--muted"], "linewidth": 0.5, "shrinkA": 0,
                                  "shrinkB": 4})  # fmt: skip
    axes.set_xlabel("size of the whole model, MB", color=COLOURS["--muted"])
    axes.set_ylabel("KL divergence from the original, nats per token", color=COLOURS["--muted"])
    return svg(plot, "Size against KL divergence")


def _spread(points: list[tuple[float, float]], gap: float, reach: float) -> list[float]:
    """Heights of labels beside points `(x, height)` sorted by height: labels within `reach` of each other in x keep
    at least `gap` apart, and as a group stay around their points."""
    places = [y for _, y in points]
    for _ in range(200):
        moved = False
        for i in range(len(points)):
            for j in range(i + 1, len(points)):
                short = gap - (places[j] - places[i])
                if abs(points[i][0] - points[j][0]) < reach and short > 1e-6:
                    places[i] -= short / 2
                    places[j] += short / 2
                    moved = True
        if not moved:
            break
    return [min(max(p, 0.02), 0.98) for p in places]


def _speed_plot(result: DemoResult) -> str:
    """Tokens per second while generating, one bar per config."""
    rows = list(reversed(result.rows))
    plot, axes = figure(6.0, max(2.0, 0.75 + 0.3 * len(rows)))
    speeds = [r.tokens_per_second if math.isfinite(r.tokens_per_second) else 0.0 for r in rows]
    axes.barh([r.config for r in rows], speeds, height=0.62, color=[COLOURS[family(r).variable] for r in rows])
    axes.set_xlim(0, (max(speeds) or 1.0) * 1.1)
    for i, speed in enumerate(speeds):
        axes.annotate(f"{speed:.1f}", (speed, i), (5, 0), textcoords="offset points", va="center", fontsize=9,
                      color=COLOURS["--text"],
                      bbox={"facecolor": COLOURS["--card"], "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.axvline(speeds[-1], color=COLOURS["--original"], linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["--text"])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"tokens per second, one sequence, {result.device}", color=COLOURS["--muted"])
    return svg(plot, "Generation speed")


def _layer_plot(rows: list[DemoRow]) -> str:
    """One strip per config: how far the SQNR of each layer, first to last, is from the config's median."""
    plot, axes = figure(11, 0.95 + 0.27 * len(rows))
    names = list(rows[0].sqnr_db)
    # A layer that is held exactly has infinite SQNR; 100 dB are as good.
    values = [[min(r.sqnr_db.get(name, math.nan), 100.0) for name in names] for r in rows]
    medians = [statistics.median(strip) for strip in values]
    reach = max(1.0, *(abs(v - m) for strip, m in zip(values, medians) for v in strip))
    for i, (strip, median) in enumerate(zip(values, medians)):
        mesh = axes.pcolormesh([j for j in range(len(names) + 1)], [i + 0.06, i + 0.94], [[v - median for v in strip]],
                               cmap="viridis", vmin=-reach, vmax=reach, rasterized=True)  # fmt: skip
        axes.annotate(f"{min(strip):.1f}  ·  {median:.1f}", (1.008, i + 0.5), xycoords=("axes fraction", "data"),
                      va="center", fontsize=9, color=COLOURS["--text"], annotation_clip=False)  # fmt: skip
    axes.annotate("lowest · median dB", (1.008, -0.35), xycoords=("axes fraction", "data"), va="center", fontsize=8,
                  color=COLOURS["--muted"], annotation_clip=False)  # fmt: skip
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [r.config for r in rows])
    starts = _blocks(names)
    shown = starts[:: max(1, len(starts) // 10)]
    axes.set_xticks([start for _, start in shown], [label for label, _ in shown])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["--text"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("decoder layer; within each: " + ", ".join(_kinds(names)), color=COLOURS["--muted"], fontsize=9)
    bar = plot.colorbar(mesh, ax=axes, pad=0.11, fraction=0.016, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=COLOURS["--line"], labelcolor=COLOURS["--muted"], labelsize=9)
    bar.set_label("dB from the median layer", color=COLOURS["--muted"], fontsize=9)
    return svg(plot, "Signal to quantization noise per layer")


def _blocks(names: list[str]) -> list[tuple[str, int]]:
    """Number and first position of each decoder layer; positions alone where names have no number."""
    starts: dict[str, int] = {}
    for i, name in enumerate(names):
        number = next((part for part in name.split(".") if part.isdigit()), None)
        starts.setdefault(number if number is not None else str(i), i)
    return list(starts.items())


def _kinds(names: list[str]) -> list[str]:
    """The last parts of the layers' names, in order, without repetition."""
    return list(dict.fromkeys(name.rpartition(".")[2].removesuffix("_proj") for name in names))[:10]
