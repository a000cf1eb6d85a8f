"""How the notebooks' pictures look: light, few colours, every axis named."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.reporting import style

level = style.level

INK, MUTED = (style.PALETTE[role][0] for role in ("ink", "muted"))
BLUE, ORANGE, GREEN, PURPLE, OLIVE = LINES = tuple(style.PALETTE[role][0] for role in style.SERIES)
MANY = 12  # names that an axis has room for in full; more are written smaller


def use_light_theme() -> None:
    """Sets matplotlib up for the pictures of a notebook."""
    plt.rcParams.update(style.in_light())
    plt.rcParams.update({
        "figure.dpi": 84, "figure.facecolor": "white", "savefig.facecolor": "white",
        "figure.constrained_layout.use": True, "axes.facecolor": "white", "axes.grid.axis": "both",
    })  # fmt: skip


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> list[list[Axes]]:
    """Rows of plots, each `width` × `height` inches."""
    size = (width * columns, height * rows)
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    return [list(line) for line in axes]


def row(count: int, width: float = 3.2, height: float = 3.0, **options: Any) -> list[Axes]:
    """`count` plots side by side, each `width` × `height` inches."""
    return grid(1, count, width, height, **options)[0]


_SLANTED = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}


def _names(set_ticks: Any, names: Sequence[str], **options: Any) -> None:
    set_ticks(range(len(names)), names, fontsize=9 if len(names) <= MANY else 7, **options)


def heat(
    axes: Axes,
    values: Any,
    *,
    x: str,
    y: str,
    title: str = "",
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    upright: bool = True,
    most: float | None = None,
    legend: str | None = None,
) -> None:
    """A heat map of values [rows, columns] with both axes named.

    Values that are nowhere negative go from white to blue, others from blue over white to orange;
    both end at `most` (default: the largest there is). `legend` adds a colour bar of that name.
    """
    values = np.asarray(values, np.float32)
    signed = values.min() < 0
    most = float(np.abs(values).max()) if most is None else most
    image = axes.imshow(
        values, cmap="RdBu_r" if signed else "Blues", vmin=-most if signed else 0, vmax=most,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set(xlabel=x, ylabel=y, title=title)
    if columns is not None:
        _names(axes.set_xticks, columns, **({} if upright else _SLANTED))
    if rows is not None:
        _names(axes.set_yticks, rows)
    if legend:
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(legend, color=MUTED)
        bar.outline.set_visible(False)


def show() -> None:
    """Shows the figure drawn last."""
    plt.show()
