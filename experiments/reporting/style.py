"""The style of all figures and pages: one palette, light and dark, and the plot settings."""

import io
import re
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = {
    "page": ("#f6f6f3", "#111316"),
    "card": ("#ffffff", "#191c20"),
    "well": ("#f1f2f4", "#22262b"),
    "line": ("#e3e4e6", "#30353b"),
    "ink": ("#1b1e23", "#eceef0"),
    "muted": ("#646a73", "#9aa1aa"),
    "accent": ("#2b62d9", "#7aa7ff"),
    "second": ("#c2570c", "#f5a35c"),
    "third": ("#18794e", "#5bd394"),
    "fourth": ("#8a3fb0", "#c99bea"),
    "fifth": ("#8a6d00", "#d8bd4a"),
    "right": ("#18794e", "#5bd394"),
    "wrong": ("#c62a2f", "#ff8b8b"),
    "wrong-soft": ("#fde3e3", "#4a2427"),
}
"""By role: the colour on a light page and on a dark one."""
SERIES = ("accent", "second", "third", "fourth", "fifth")
"""The roles of the compared series in a plot, in order."""
FONT = "system-ui, sans-serif"
DASHES = (0, (4, 3))
DPI = 72  # a pixel is then a point, the unit of font sizes

# matplotlib has no CSS variables: it draws with placeholder colours, and the SVG gets variables in
# their place. So a figure follows the page's light or dark mode; on its own it is light.
_STAND_INS = {role: f"#{number:06x}" for number, role in enumerate(PALETTE, start=1)}
INK, MUTED, GRID = (_STAND_INS[role] for role in ("ink", "muted", "line"))
LINES = tuple(_STAND_INS[role] for role in SERIES)


def paint(role: str) -> str:
    """A CSS colour: the page's variable, with the light colour as its fallback."""
    return f"var(--{role}, {PALETTE[role][0]})"


def css_variables() -> str:
    """The palette as CSS variables; light or dark by the reader's preference."""
    light, dark = (
        " ".join(f"--{role}: {colours[side]};" for role, colours in PALETTE.items())
        for side in (0, 1)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )


def settings(colours: dict[str, str]) -> dict[str, Any]:
    """matplotlib's settings with the given colours by role."""
    ink, muted, line = (colours[role] for role in ("ink", "muted", "line"))
    ticks = {
        f"{axis}tick.{name}": value
        for axis in "xy"
        for name, value in {
            "color": muted, "labelsize": 9, "major.size": 0, "minor.size": 0, "major.pad": 5,
        }.items()
    }  # fmt: skip
    return ticks | {
        "axes.prop_cycle": matplotlib.cycler(color=[colours[role] for role in SERIES]),
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": muted,
        "axes.labelcolor": muted, "axes.labelsize": 9.5,
        "axes.titlecolor": ink, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": line, "grid.linewidth": 0.8,
        "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 4,
        "legend.frameon": False, "legend.fontsize": 9, "legend.labelcolor": muted,
        "legend.handlelength": 1.4,
    }  # fmt: skip


def in_svg() -> Any:
    """A context for figures that `inline` will write."""
    return matplotlib.rc_context(settings(_STAND_INS))


def in_light() -> dict[str, Any]:
    """The settings of figures that are always light."""
    return settings({role: light for role, (light, _) in PALETTE.items()})


def panels(*titles: str, size: tuple[float, float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with one plot for each title, side by side.

    size: in inches. None: the width of three plots on a page, shared by all.
    """
    size = size or (11.1 * min(1, len(titles) / 3), 2.5)
    with in_svg():
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        axes = list(np.atleast_1d(figure.subplots(1, len(titles))))
        for plot, title in zip(axes, titles, strict=True):
            plot.set_title(title)
    return figure, axes


def label(axes: Axes, x: str, y: str) -> None:
    """Labels both axes."""
    axes.set(xlabel=x, ylabel=y)


def legend(axes: Axes) -> None:
    """The names of the lines, without a box."""
    with in_svg():
        axes.legend()


def level(axes: Axes, height: float, text: str) -> None:
    """A labelled dashed horizontal line, such as a threshold or the chance level."""
    muted = axes.yaxis.label.get_color()
    axes.axhline(height, color=muted, lw=1, ls=DASHES)
    axes.annotate(text, (1, height), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=9, color=muted)  # fmt: skip


def inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element that scales with the page and fetches nothing."""
    buffer = io.StringIO()
    # Text stays text, in the page's font; the salt makes the ids unique to a figure.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    _, body = svg[svg.index("<svg") :].split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")  # the prefix needs a declaration outside HTML
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # these ids are not referenced
    body = re.sub(r' font-family: [^;"]*;?', "", body)  # the page has one
    for role, stand_in in _STAND_INS.items():
        body = body.replace(stand_in, paint(role))
    width, height = figure.get_size_inches() * 72
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(description)}">{body.strip()}'
    )


def alone(content: str, box: tuple[float, float, float, float], description: str) -> str:
    """An SVG file of elements in a box (x, y, width, height), light where no page surrounds it."""
    x, y, width, height = box
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{x:g} {y:g} {width:g} {height:g}" '
        f'font-family="{FONT}" role="img" aria-label="{escape(description)}">'
        f'<rect x="{x:g}" y="{y:g}" width="100%" height="100%" fill="{paint("card")}"/>'
        f"{content}</svg>\n"
    )
