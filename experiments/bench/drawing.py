"""The benchmark as a picture: a bar for each ratio, from its least to its largest."""

from typing import Any

from experiments.claims.drawing import label, panels
from experiments.figures import INK, LINES, MUTED, inline


def bars(records: list[dict[str, Any]]) -> str:
    """One SVG: the peer's seconds over ours, a bar a row, the goal as a tick."""
    figure, (axes,) = panels("How many times as fast as the peer")
    figure.set_size_inches(8.5, 0.9 + 0.34 * len(records))
    for place, r in enumerate(reversed(records)):
        colour = LINES[2] if r["ratio"] >= 1 else LINES[1]
        axes.barh(place, r["ratio"], height=0.62, color=colour)
        axes.plot([r["low"], r["high"]], [place, place], color=INK, lw=1.2)
        axes.plot([r["goal"]] * 2, [place - 0.38, place + 0.38], color=MUTED, lw=1.6)
        axes.annotate(f"{r['ratio']:.2f}", (max(r["ratio"], r["high"]), place), (6, 0),
                      textcoords="offset points", va="center", fontsize=9, color=INK)  # fmt: skip
    names = [f"{r['id']}   {r['peer'].split(' (')[0]}" for r in reversed(records)]
    axes.set_yticks(range(len(records)), names)
    axes.axvline(1, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1, y=0.02)
    label(axes, "peer's seconds / tfm's (dashed: equal; thick mark: the goal; line: range)", "")
    drawn = inline(figure, "bench", "Ratios of the peers' seconds to this library's.")
    alone = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" '
    return drawn.replace("<svg ", alone, 1)
