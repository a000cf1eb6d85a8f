"""Figures of the benchmark: ratios as bars with their range, laws of cost as lines."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.reporting.style import (
    DASHES,
    INK,
    LINES,
    MUTED,
    alone,
    inline,
    label,
    legend,
    panels,
)


def bars(records: list[dict[str, Any]]) -> str:
    """One SVG: the peer's seconds over ours, a bar a row, the goal as a tick."""
    size = (8.5, 0.9 + 0.34 * len(records))
    figure, (axes,) = panels("How many times as fast as the peer", size=size)
    for place, r in enumerate(reversed(records)):
        colour = LINES[2] if r["ratio"] >= 1 else LINES[1]
        axes.barh(place, r["ratio"], height=0.62, color=colour)
        axes.plot([r["low"], r["high"]], [place, place], color=INK, lw=1.2)
        axes.plot([r["goal"]] * 2, [place - 0.38, place + 0.38], color=MUTED, lw=1.6)
        axes.annotate(f"{r['ratio']:.2f}", (max(r["ratio"], r["high"]), place), (6, 0),
                      textcoords="offset points", va="center", fontsize=9, color=INK)  # fmt: skip
    names = [f"{r['id']}   {r['peer'].split(' (')[0]}" for r in reversed(records)]
    axes.set_yticks(range(len(records)), names)
    axes.axvline(1, color=MUTED, lw=1, ls=DASHES)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1, y=0.02)
    label(axes, "peer's seconds / tfm's (dashed: equal; thick mark: the goal; line: range)", "")
    return _alone(figure, "bench", "Ratios of the peers' seconds to this library's.")


def laws(curves: dict[str, dict[str, list[float]]]) -> str:
    """One SVG: seconds and bytes of a token against each factor, measured (points) and by the law
    (lines), each relative to its least.

    curves: factor -> {"values", "seconds", "seconds_law", "bytes", "bytes_law"}.
    """
    figure, axes = panels(*(f"More {factor}" for factor in curves), size=(2.9 * len(curves), 2.9))
    for plot, (factor, curve) in zip(axes, curves.items(), strict=True):
        for (key, name), colour in zip(
            (("seconds", "time"), ("bytes", "memory")), LINES, strict=False
        ):
            least = min(curve[key])
            points, line = (np.array(curve[k]) / least for k in (key, f"{key}_law"))
            plot.plot(curve["values"], line, color=colour, lw=1.6, label=f"{name}, law")
            plot.plot(curve["values"], points, "o", color=colour, ms=4.5)
        plot.set_xscale("log", base=2)
        plot.set_yscale("log", base=2)
        plot.set_xticks(curve["values"], [f"{v}" for v in curve["values"]])
        plot.yaxis.set_major_formatter("{x:g}")
        plot.minorticks_off()
        label(plot, factor, "")
    label(axes[0], next(iter(curves)), "a real token's cost, relative")
    legend(axes[0])
    return _alone(figure, "cost", "Cost of a token against width, depth, length and batch.")


def _alone(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG file of its own."""
    width, height = figure.get_size_inches() * 72
    return alone(inline(figure, name, description), (0, 0, width, height), description)
