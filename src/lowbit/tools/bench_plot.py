"""The plots of `lowbit bench`: of `linear`, one panel per layer and scheme, time over the number of tokens; of
`generate`, one bar per row, what a token's time consists of; and the roofline, one dot per row."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import see
from lowbit.tools.bench_rows import BF16, LOWBIT, GenerateRow, Record, Row
from lowbit.tools.roofline import Ceilings, RooflineRow

SUFFIXES = (".svg", ".png", ".pdf")
_TEXT, _MUTED, _GRID = "#22272e", "#5f6975", "#e3e7ec"
# Colour, marker and width of each provider; others take the spare ones in turn.
_STYLES = {
    BF16: ("#7b8794", "s", 1.6),
    LOWBIT: ("#c8102e", "o", 2.6),
    "torchao": ("#1f77b4", "^", 1.4),
    "gemlite": ("#2a9d6f", "D", 1.4),
    "humming": ("#8458b3", "v", 1.4),
    "bitsandbytes": ("#d98a1f", "P", 1.4),
}
_SPARE = (("#0b8a8f", "X", 1.4), ("#a0522d", "*", 1.4), ("#b5409c", "h", 1.4))
_LEGEND: dict[str, Any] = {"loc": "upper left", "frameon": False, "fontsize": 9, "labelcolor": _TEXT}
_COLUMNS = 4


def check_plot(path: Path) -> None:
    """Say what is missing before minutes of measuring, not after.

    Raises:
        ValueError: the file's suffix is none that can be written.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: the name has to end in {', '.join(SUFFIXES)}" + see("bad-option"))
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'lowbit[cli]'" + see("missing-package"))


def save(figure: Any, path: Path) -> None:
    """Write a figure: the same bytes whenever that is, and text as text."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowbit"}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _head(figure: Any, title: str, subtitle: str) -> None:
    """The two lines above the legend."""
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.13 * inch, title, fontsize=12.5, fontweight="bold", color=_TEXT, va="top")
    figure.text(0.012, 1 - 0.37 * inch, subtitle, fontsize=8.5, color=_MUTED, va="top")


def _frame(axes: Any, grid: str = "both") -> None:
    """Grid lines of one axis or both, and what is around the axes no stronger than they."""
    axes.grid(True, axis=grid, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_GRID)
    axes.tick_params(which="both", color=_GRID, labelcolor=_MUTED, labelsize=8.5)


# bench linear ------------------------------------------------------------------------------------


def write_plot(rows: Sequence[Row], path: Path, subtitle: str) -> None:
    """Draw the rows into `path`.

    Raises:
        ValueError: no row has a time, or the file's suffix is none that can be written.
        ImportError: matplotlib is not installed.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if any(r.us for r in row.records):
            first = row.records[0]
            panels.setdefault((first.scheme, first.layer), []).append(row)
    if not panels:
        raise ValueError("--plot: nothing was measured, so there is nothing to draw" + see("bad-option"))
    # A line of panels per scheme; a single scheme is wrapped into lines of about the same length.
    schemes = list(dict.fromkeys(scheme for scheme, _ in panels))
    panels = dict(sorted(panels.items(), key=lambda item: schemes.index(item[0][0])))
    layers = len({layer for _, layer in panels})
    columns = layers if len(schemes) > 1 else -(-layers // -(-layers // _COLUMNS))
    lines = -(-len(panels) // columns)
    width, height = max(7.6, 3.3 * columns + 0.7), 2.75 * lines + 1.25
    layout = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 1 - 0.95 / height), wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    handles: dict[str, Any] = {}
    axes: Any = None
    for i, ((scheme, layer), members) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        _panel(axes, members, handles)
        first = members[0].records[0]
        axes.set_title(f"{layer}  {first.n} x {first.k}" if layer != f"{first.n}x{first.k}" else layer, loc="left",
                       fontsize=10, color=_TEXT, fontweight="bold")  # fmt: skip
        axes.set_title(scheme, loc="right", fontsize=8.5, color=_MUTED)
        if i % columns == 0:
            axes.set_ylabel("microseconds", fontsize=9, color=_MUTED)
        if i + columns >= len(panels):
            axes.set_xlabel("tokens M", fontsize=9, color=_MUTED)
    _head(figure, "Time of one linear layer", subtitle)
    figure.legend(list(handles.values()), list(handles), **_LEGEND, bbox_to_anchor=(0.006, 1 - 0.52 / height),
                  ncols=len(handles), handlelength=2.2, columnspacing=1.6, borderpad=0.2)  # fmt: skip
    save(figure, path)


def _panel(axes: Any, rows: list[Row], handles: dict[str, Any]) -> None:
    """One layer and scheme: a line per provider with its spread, and the floor below them."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    series: dict[str, list[Record]] = {}
    for row in sorted(rows, key=lambda row: row.records[0].m):
        for r in row.records:
            if r.us and not r.error:
                series.setdefault(r.provider, []).append(r)
    spare = iter(_SPARE * 3)
    for provider, records in series.items():
        colour, marker, width = _STYLES.get(provider) or next(spare)
        m, us = [r.m for r in records], [r.us for r in records]
        order = 5 if provider == LOWBIT else 3
        axes.fill_between(m, [r.us_min for r in records], [r.us_max for r in records], color=colour, alpha=0.16,
                          linewidth=0, zorder=order - 1)  # fmt: skip
        (line,) = axes.plot(m, us, color=colour, marker=marker, linewidth=width, markersize=2.6 + width,
                            markeredgecolor="white", markeredgewidth=0.6, zorder=order, label=provider)  # fmt: skip
        handles.setdefault(provider, line)
    tokens = sorted({row.records[0].m for row in rows})
    floors = {r.m: r.floor_us for row in rows for r in row.records if r.floor_us}
    if floors:
        m = sorted(floors)
        (line,) = axes.plot(m, [floors[x] for x in m], color=_TEXT, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=2)
        handles.setdefault("reading alone", line)
    _axes_style(axes, tokens)


def _axes_style(axes: Any, tokens: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

    shown = tokens if len(tokens) <= 8 else tokens[:: -(-len(tokens) // 8)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 2000 else (1.0,), numticks=12))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _frame(axes)


# bench generate ----------------------------------------------------------------------------------

_PARTS = (("reading the weights", "#c8102e"), ("the linear layers beyond it", "#e88b98"), ("the rest", "#7b8794"))


def write_budgets(rows: Sequence[GenerateRow], path: Path, subtitle: str) -> None:
    """Draw a bar for every row that has a time: the floor, the linear layers above it, and the rest of a step.

    Raises:
        ValueError: no row has a time, or the file's suffix is none that can be written.
        ImportError: matplotlib is not installed.
    """
    check_plot(path)
    timed = [r for r in rows if r.step_us]
    if not timed:
        raise ValueError("--plot: nothing was measured, so there is nothing to draw" + see("bad-option"))
    from matplotlib.figure import Figure

    height = 1.5 + 0.42 * len(timed)
    figure = Figure(figsize=(9.0, height), facecolor="white")
    axes: Any = figure.add_axes((0.24, 0.62 / height, 0.64, 1 - 1.47 / height))
    for y, row in enumerate(timed):
        left = 0.0
        for (name, colour), part in zip(_PARTS, budget(row), strict=True):
            axes.barh(y, part, left=left, height=0.62, color=colour, label=name if y == 0 else None)
            left += part
        tokens = f" {row.tokens_per_second:.0f} tok/s" if row.tokens_per_second else ""
        axes.text(left, y, tokens, va="center", ha="left", fontsize=9, color=_TEXT)
    axes.set_yticks(range(len(timed)), [f"{r.config}, batch {r.batch}, prompt {r.prompt}" for r in timed])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds of a step", fontsize=9, color=_MUTED)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    _frame(axes, "x")
    axes.spines["left"].set_visible(False)
    _head(figure, "Where a token's time goes", subtitle)
    figure.legend(**_LEGEND, bbox_to_anchor=(0.006, 1 - 0.5 / height), ncols=3)
    save(figure, path)


def budget(row: GenerateRow) -> tuple[float, float, float]:
    """Microseconds of a step: reading, what the linear layers take beyond it, the rest; together the step.

    What was measured apart may be longer than where it is a part: launches overlap, and a read may be slowed by others.
    """
    step = row.step_us or 0.0
    linears = min(step, row.linears_us or 0.0)
    floor = min(linears, row.floor_us or 0.0)
    return floor, linears - floor, step - linears


# roofline ----------------------------------------------------------------------------------------

_UNITS = {"bf16": "#7b8794", "float8": "#1f77b4", "int8": "#2a9d6f"}


def write_roofline(rows: Sequence[RooflineRow], ceilings: Ceilings, path: Path, subtitle: str) -> None:
    """Draw operations per second over operations per byte: a dot per row and recipe, the measured ceilings as lines.

    Raises:
        ValueError: no row has a time, or the file's suffix is none that can be written.
        ImportError: matplotlib is not installed.
    """
    check_plot(path)
    timed = [r for r in rows if r.b_q_e2e_s and r.b_bf16_e2e_s]
    if not timed:
        raise ValueError("--plot: nothing was measured, so there is nothing to draw" + see("bad-option"))
    from matplotlib.figure import Figure

    height = 5.6
    figure = Figure(figsize=(8.6, height), facecolor="white")
    axes: Any = figure.add_axes((0.09, 0.1, 0.88, 1 - 1.55 / height))
    axes.set_xscale("log")
    axes.set_yscale("log")
    least = min(min(r.intensity, r.bf16_intensity) for r in timed) / 2
    most = max(2 * max(ceilings.peaks.values()) / ceilings.bandwidth, 2 * max(r.intensity for r in timed))
    for unit, peak in ceilings.peaks.items():
        knee = peak / ceilings.bandwidth
        axes.plot([least, knee, most], [least * ceilings.bandwidth / 1e12, peak / 1e12, peak / 1e12],
                  color=_UNITS[unit], linewidth=1.4, label=f"ceiling of {unit}", zorder=2)  # fmt: skip
    spare = iter([*list(_STYLES.values())[1:], *_SPARE] * len(timed))
    axes.scatter([r.bf16_intensity for r in timed], [r.operations / (r.b_bf16_e2e_s or 1) / 1e12 for r in timed],
                 s=22, color=_UNITS[BF16], marker="s", label="bf16", zorder=3)  # fmt: skip
    for recipe in dict.fromkeys(r.recipe for r in timed):
        own, (colour, marker, _) = [r for r in timed if r.recipe == recipe], next(spare)
        axes.scatter([r.intensity for r in own], [r.operations / (r.b_q_e2e_s or 1) / 1e12 for r in own], s=34,
                     color=colour, marker=marker, edgecolor="white", linewidth=0.5, label=recipe, zorder=4)  # fmt: skip
    axes.set_xlabel("operations per byte of ReLU and Linear", fontsize=9, color=_MUTED)
    axes.set_ylabel("TFLOP/s", fontsize=9, color=_MUTED)
    _frame(axes)
    _head(figure, "ReLU and a linear layer below the ceilings of this machine", subtitle)
    figure.legend(**_LEGEND, bbox_to_anchor=(0.006, 1 - 0.5 / height), ncols=5)
    save(figure, path)
