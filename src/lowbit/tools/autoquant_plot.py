"""The plot of `lowbit autoquant`: predicted KL divergence over size, mixed plans as a line, uniform ones as points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowbit.tools.autoquant_plan import FLOAT, Measurements, Plan
from lowbit.tools.bench_plot import check_plot, save


def plot_front(found: Measurements, plans: Sequence[Plan], chosen: Plan, path: Path) -> None:
    """Write it; svg, png or pdf by the name."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # A logarithm has no place for the model that loses nothing.
    line = [p for p in plans if p.kl > 0]
    axes.step([p.bytes / 1e6 for p in line], [p.kl for p in line], where="post", color="#c8102e", label="per layer")
    for choice in [c for c in found.choices if c != FLOAT]:
        uniform = found.uniform(choice)
        if uniform.kl > 0:
            axes.plot(uniform.bytes / 1e6, uniform.kl, "o", color="#5f6975")
            axes.annotate(choice, (uniform.bytes / 1e6, uniform.kl), xytext=(5, 4), textcoords="offset points")
    if chosen.kl > 0:
        axes.plot(chosen.bytes / 1e6, chosen.kl, "D", color="#c8102e", label="chosen")
    axes.set(xlabel="MB of the layers", ylabel="sum of KL divergences, nats (predicted)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
