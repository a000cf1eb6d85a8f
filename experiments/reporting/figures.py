"""The report's figures, as SVG inside HTML."""

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)

from experiments.reporting.style import DPI, LINES, alone, in_svg, inline, paint

_LABEL_HEIGHT = 25  # points that the two lines of a label at a curve's end take
_END = "</s>"  # drawn as a small square
_CELL = 14  # the side of a heat map's cell


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small plot over the training steps."""

    title: str
    note: str
    lines: dict[str, str]
    """key in metrics.jsonl -> label at the end of its line; '' for a single line"""
    value: str
    """format of a line's last value"""
    tick: str
    """format of the values on the axis"""
    scale: Literal["linear", "log"] = "linear"


PANELS = (
    Panel("Loss", "Nats a sound, logarithmic; lower is better.",
          {"loss": "training", "valid_loss": "validation"}, "{:.2f}", "{:g}", "log"),
    Panel("Words wrong", "Greedy WER, validation words.", {"valid_wer": ""}, "{:.1%}", "{:.0%}"),
    Panel("Sounds wrong", "Greedy PER, validation words.", {"valid_per": ""}, "{:.1%}", "{:.0%}"),
    Panel("Learning rate", "The size of a step, as scheduled.", {"learning_rate": ""},
          "{:.2g}", "{:.2g}"),
    Panel("Gradient norm", "Before clipping; a spike is a hard batch.", {"gradient_norm": ""},
          "{:.2f}", "{:.2g}"),
    Panel("Speed", "Tokens a second.", {"tokens_per_second": ""}, "{:,.0f}", "{:,.0f}"),
)  # fmt: skip


def _tidy(axes: Axes, panel: Panel) -> None:
    """Formats the ticks and hides the left spine."""
    axes.spines["left"].set_visible(False)
    axes.set_yscale(panel.scale)
    if panel.scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(StrMethodFormatter(panel.tick.replace("{:", "{x:")))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes (step, value, text, colour) right of each end; labels that would touch move apart."""
    heights = [axes.transData.transform((step, value))[1] for step, value, _, _ in ends]
    closeness = _LABEL_HEIGHT - abs(heights[0] - heights[-1]) if len(ends) > 1 else 0
    upper = heights.index(max(heights))
    for index, (step, value, text, colour) in enumerate(ends):
        shift = max(closeness, 0) / 2 * (1 if index == upper else -1)
        axes.annotate(
            text, (step, value), (7, shift), textcoords="offset points", color=colour,
            fontsize=10, va="center", annotation_clip=False,
        )  # fmt: skip


def learning_curve(panel: Panel, metrics: Sequence[dict[str, Any]]) -> str:
    """The panel as SVG, from the objects of metrics.jsonl; '' where none of its keys was logged."""
    with in_svg():
        figure = Figure(figsize=(3.9, 2.2), dpi=DPI)
        axes = figure.add_axes((0.13, 0.13, 0.66, 0.8))
    ends, descriptions = [], []
    for (key, name), colour in zip(panel.lines.items(), LINES, strict=False):
        # Values that were not finite were logged as null.
        points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        # Markers show the measurements where there are few.
        axes.plot(steps, values, color=colour, lw=1.6, ms=3.5,
                  marker="o" if len(points) < 40 else "", clip_on=False)  # fmt: skip
        last = panel.value.format(values[-1])
        ends.append((steps[-1], values[-1], f"{name}\n{last}".strip(), colour))
        descriptions.append(f"{name} from {panel.value.format(values[0])} to {last}".strip())
    if not ends:
        return ""
    _tidy(axes, panel)
    axes.set_xlim(0, max(m["step"] for m in metrics))
    _label_ends(axes, ends)
    return inline(figure, panel.title, f"{panel.title}: {', '.join(descriptions)}")


def learning_curves_file(
    metrics: Sequence[dict[str, Any]], panels: Sequence[Panel] = PANELS[:2]
) -> str:
    """Panels (loss and error rate) side by side, as an SVG file that stands alone."""
    width, height, top = 281, 158, 34  # of one panel, as `learning_curve` draws it
    parts = []
    for index, panel in enumerate(panels):
        curve = learning_curve(panel, metrics)
        place = f'<svg x="{width * index}" y="{top}" width="{width}" height="{height}"'
        parts.append(curve.replace("<svg", place, 1))
        at = f'x="{width * index + 8}" fill="{paint("ink")}"'
        parts.append(f'<text {at} y="14" font-size="11" font-weight="bold">{panel.title}</text>')
        parts.append(f'<text {at} y="28" font-size="9.5">{panel.note}</text>')
    box = (0, 0, width * len(panels), height + top)
    return alone("".join(parts), box, " and ".join(panel.title for panel in panels))


def attention_map(letters: Sequence[str], sounds: Sequence[str], weights: np.ndarray) -> str:
    """A heat map as SVG; weights [len(sounds), len(letters)] in [0, 1] are the cells' opacity.

    Written by hand: a hundred small plots take matplotlib seconds, and its cells have no tooltips.
    """
    longest = max((len(sound) for sound in sounds if sound != _END), default=1)
    left, right, bottom = 8 * longest + 5, _CELL * len(letters), _CELL * len(sounds)
    parts = [f'<rect class="well" x="{left}" width="{right}" height="{bottom}"/>']
    for row, sound in enumerate(sounds):
        y = _CELL * row
        parts.append(_label(sound, left - 4, y + 10.5, "sound"))
        for column, letter in enumerate(letters):
            weight = weights[row, column]
            if weight >= 0.02:  # smaller weights are invisible, and would be most of the file
                parts.append(
                    f'<rect class="cell" x="{left + _CELL * column + 0.5}" y="{y + 0.5}" '
                    f'width="{_CELL - 1}" height="{_CELL - 1}" opacity="{weight:.2f}">'
                    f"<title>{escape(sound)} looks at {escape(letter)}: {weight:.2f}</title></rect>"
                )
    for column, letter in enumerate(letters):
        parts.append(_label(letter, left + _CELL * (column + 0.5), bottom + 11.5, "letter"))
    width, height = left + right, bottom + _CELL
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width:{1.6 * width:.0f}px" '
        f'role="img" aria-label="attention from sounds to letters">{"".join(parts)}</svg>'
    )


def _label(symbol: str, x: float, y: float, axis: str) -> str:
    if symbol == _END:
        return f'<text class="{axis} end" x="{x}" y="{y - 1}">■</text>'
    return f'<text class="{axis}" x="{x}" y="{y}">{escape(symbol)}</text>'
