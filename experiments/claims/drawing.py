"""The claims' figures: seeds as points or a band, with the threshold of the rule."""

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.style import LINES, alone, inline, legend, paint


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


_ROW, _LEFT, _RIGHT, _PLOT = 34, 330, 170, 300  # pixels of a strip
_ROLES = {"supported": "right", "not supported": "wrong"}
_CSS = (
    f".claim-say,.claim-small{{font-size:11px;fill:{paint('ink')}}}"
    f".claim-small{{fill:{paint('muted')}}}.claim-verdict{{font-size:11.5px;font-weight:600}}"
    f".claim-axis{{stroke:{paint('line')};stroke-width:1}}"
    f".claim-delta{{stroke:{paint('ink')};stroke-dasharray:3 2}}"
)


def _strip(top: float, subclaim: dict[str, Any]) -> str:
    """One sub-claim: its effect as a dot, its interval as a bar, its threshold as a dashed line."""
    effect, (low, high) = subclaim["effect"], subclaim["interval"]
    threshold = subclaim["threshold"]
    least, most = min(low, threshold, 0.0), max(high, threshold, 0.0)
    room = (most - least or 1.0) * 0.12
    least, most = least - room, most + room

    def x(value: float) -> float:
        return _LEFT + _PLOT * (value - least) / (most - least)

    colour = paint(_ROLES.get(subclaim["verdict"].split(",")[0], "muted"))
    middle = top + _ROW / 2
    lines = wrap(("caveat: " if subclaim["caveat_of"] else "") + subclaim["statement"], 52)
    lines = [*lines[:1], lines[1] + " …"] if len(lines) > 2 else lines
    first = middle + 4 - 6.5 * (len(lines) - 1)
    words = "".join(
        f'<text x="0" y="{first + 13 * i:.1f}" class="claim-say">{escape(line)}</text>'
        for i, line in enumerate(lines)
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
    """An SVG file: the figure, and below it each sub-claim's effect, interval and threshold.

    On its own it has a white background; inside a page it takes the page's colours.
    """
    above, (width, height) = inline(figure, name, description), figure.get_size_inches() * 72
    full = _LEFT + _PLOT + _RIGHT
    shown = height * full / width if width > full else height
    strips = "".join(_strip(shown + 26 + _ROW * i, s) for i, s in enumerate(subclaims))
    total = shown + 34 + _ROW * len(subclaims)
    place = f'<svg x="0" y="0" width="{min(width, full):g}" height="{shown:.1f}"'
    content = (
        f"<style>{_CSS}</style>{above.replace('<svg', place, 1)}"
        f'<text x="{_LEFT}" y="{shown + 18:.1f}" class="claim-small">effect (dot) and 95 % '
        f"interval (bar); dashed: the threshold δ</text>{strips}"
    )
    return alone(content, (-12, -10, full + 24, round(total + 20)), description)
