"""How the claims' figures look: seeds as points or a band, the rule's threshold drawn."""

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.figures import GRID, INK, LINES, MUTED, inline

_WIDTH, _HEIGHT = 11.1, 2.5  # inches of up to three panels, which share the width


def panels(*titles: str) -> tuple[Figure, list[Axes]]:
    """A figure with one plain plot for each title, side by side."""
    width = _WIDTH * min(1, len(titles) / 3)
    figure = Figure(figsize=(width, _HEIGHT), dpi=72, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, len(titles))))
    for plot, title in zip(axes, titles, strict=True):
        plot.set_title(title, fontsize=11, color=INK, loc="left", weight="bold")
        plot.spines[["top", "right"]].set_visible(False)
        plot.spines[["bottom", "left"]].set_color(MUTED)
        plot.grid(axis="y", color=GRID, linewidth=0.8)
        plot.set_axisbelow(True)
        plot.tick_params(length=0, which="both", colors=MUTED, labelsize=9)
        plot.xaxis.label.set_color(MUTED)
        plot.yaxis.label.set_color(MUTED)
    return figure, axes


def label(axes: Axes, x: str, y: str) -> None:
    """Names both axes, with their units."""
    axes.set_xlabel(x, fontsize=9.5)
    axes.set_ylabel(y, fontsize=9.5)


def bands(axes: Axes, x: Sequence[float], values: dict[str, Any]) -> None:
    """A line for the mean of each name's values [seeds, len(x)], a band from least to largest."""
    for (name, drawn), colour in zip(values.items(), LINES, strict=False):
        drawn = np.asarray(drawn)
        axes.fill_between(x, drawn.min(0), drawn.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, drawn.mean(0), color=colour, lw=1.6, label=name)
    legend(axes)


def points(axes: Axes, values: dict[str, Any]) -> None:
    """A column of points for each name, one a seed, and a bar at their mean."""
    for place, drawn in enumerate(values.values()):
        drawn, colour = np.asarray(drawn), LINES[place % len(LINES)]
        spread = np.linspace(-0.12, 0.12, len(drawn)) if len(drawn) > 1 else np.zeros(1)
        axes.plot(place + spread, drawn, "o", ms=4, color=colour, alpha=0.75)
        axes.plot([place - 0.28, place + 0.28], [drawn.mean()] * 2, color=colour, lw=2)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_xlim(-0.6, len(values) - 0.4)


def level(axes: Axes, height: float, text: str) -> None:
    """A dashed horizontal line with its meaning, such as a threshold or the chance level."""
    axes.axhline(height, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.annotate(text, (1, height), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8.5, color=MUTED)  # fmt: skip


def legend(axes: Axes) -> None:
    """The names of the lines, without a box."""
    axes.legend(frameon=False, fontsize=9, labelcolor=MUTED, handlelength=1.4)


_ROW, _LEFT, _RIGHT, _PLOT = 34, 330, 150, 320  # pixels of a strip
_COLOURS = {"supported": "var(--right, #18794e)", "not supported": "var(--wrong, #c62a2f)"}


def _strip(top: float, subclaim: dict[str, Any]) -> str:
    """One sub-claim: its effect as a dot, its interval as a bar, its threshold as a dashed line."""
    effect, (low, high) = subclaim["effect"], subclaim["interval"]
    threshold = subclaim["threshold"]
    least, most = min(low, threshold, 0.0), max(high, threshold, 0.0)
    room = (most - least or 1.0) * 0.12
    least, most = least - room, most + room

    def x(value: float) -> float:
        return _LEFT + _PLOT * (value - least) / (most - least)

    colour = _COLOURS.get(subclaim["verdict"].split(",")[0], "var(--muted, #63686e)")
    middle = top + _ROW / 2
    said = wrap(("caveat: " if subclaim["caveat_of"] else "") + subclaim["statement"], 52)
    said = [*said[:1], said[1] + " …"] if len(said) > 2 else said
    first = middle + 4 - 6.5 * (len(said) - 1)
    words = "".join(
        f'<text x="0" y="{first + 13 * i:.1f}" class="claim-say">{escape(line)}</text>'
        for i, line in enumerate(said)
    )
    end = _LEFT + _PLOT + 12
    figures = f"{effect:.3g}, δ = {threshold:g}"
    if "bound" in subclaim:
        figures = f"error {subclaim['largest_error']:.2g}, bound {subclaim['bound']:g}"
    return (
        f"<g><title>{escape(subclaim['rule'])}</title>{words}"
        f'<path d="M{_LEFT} {middle}h{_PLOT}" class="claim-axis"/>'
        f'<path d="M{x(threshold):.1f} {middle - 12}v24" class="claim-delta"/>'
        f'<path d="M{x(low):.1f} {middle}H{x(high):.1f}" style="stroke:{colour};stroke-width:5" '
        f'stroke-linecap="round" opacity="0.45"/>'
        f'<circle cx="{x(effect):.1f}" cy="{middle}" r="4.5" style="fill:{colour}"/>'
        f'<text x="{end}" y="{middle - 2}" style="fill:{colour}" class="claim-verdict">'
        f"{subclaim['verdict']}</text>"
        f'<text x="{end}" y="{middle + 11}" class="claim-small">{figures}</text></g>'
    )


def evidence(figure: Figure, name: str, description: str, subclaims: Sequence[dict]) -> str:
    """What was seen, and below it every sub-claim's effect, interval and threshold: an SVG file.

    It stands alone on white, and inside a page it takes the page's colours.
    """
    above, (width, height) = inline(figure, name, description), figure.get_size_inches() * 72
    full = _LEFT + _PLOT + _RIGHT
    shown = height * full / width if width > full else height
    strips = "".join(_strip(shown + 26 + _ROW * i, s) for i, s in enumerate(subclaims))
    total = shown + 34 + _ROW * len(subclaims)
    place = f'<svg x="0" y="0" width="{min(width, full):g}" height="{shown:.1f}"'
    style = (
        ".claim-say,.claim-small{font-size:11px;fill:var(--ink,#1c1e21)}.claim-small{fill:var(--muted,#63686e)}"
        ".claim-verdict{font-size:11.5px;font-weight:600}.claim-axis{stroke:var(--line,#e3e5e8);stroke-width:1}"
        ".claim-delta{stroke:var(--ink,#1c1e21);stroke-dasharray:3 2}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -10 {full + 24} {total + 20:.0f}" '
        f'font-family="sans-serif" role="img" aria-label="{escape(description)}">'
        f"<style>{style}</style>"
        f'<rect x="-12" y="-10" width="100%" height="100%" style="fill:var(--card,#fff)"/>'
        f"{above.replace('<svg', place, 1)}"
        f'<text x="{_LEFT}" y="{shown + 18:.1f}" class="claim-small">effect (dot) and 95 % '
        f"interval (bar); dashed: the threshold δ</text>{strips}</svg>\n"
    )
