"""The HTML page of all reports, which loads nothing and runs no script."""

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.reporting.figures import Panel, learning_curve
from experiments.reporting.style import css_variables

_STYLE = css_variables() + Path(__file__).with_name("page.css").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page, with a link at its top."""

    anchor: str
    title: str
    intro: str
    body: str
    """'' where there is nothing to show: the section is then left out"""

    def html(self) -> str:
        return (
            f'<section id="{self.anchor}"><h2>{self.title}</h2>'
            f'<p class="intro">{self.intro}</p>{self.body}</section>'
        )


def page(
    title: str, intro: str, command: str, tiles: str, sections: Sequence[Section],
    cautions: Sequence[str] = (),
) -> str:  # fmt: skip
    """The whole page; sections without a body are left out. Cautions stand below the tiles."""
    sections = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.anchor}">{section.title}</a>' for section in sections)
    notes = "".join(f'<p class="note">Note: {escape(line)}.</p>' for line in cautions)
    # The browser loads nothing and runs no script; an attention map is an image inside the page.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="intro">{intro}</p>
<pre>{escape(command)}</pre>
{tiles}
{notes}
<nav>{links}</nav>
</header>
<main>
{"".join(section.html() for section in sections)}
</main>
<footer>Written by tfm. This page loads nothing and runs no script.</footer>
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A key figure at the top of a page."""

    key: str
    """The field of results.json."""
    name: str
    form: str | None
    """format of its value; None: a duration in seconds"""
    note: str


def _duration(seconds: float) -> str:
    """`42 s`, `6 min 42 s` or `1 h 31 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def training_tiles(results: dict[str, Any]) -> list[Tile]:
    """The key figures of every training."""
    rate = results.get("steps", 0) / max(results.get("train_seconds", 0), 1)
    return [
        Tile("parameters", "Parameters", "{:,}", "numbers learned"),
        Tile("train_seconds", "Training time", None, f"{rate:.1f} steps a second"),
        Tile("steps", "Steps", "{:,}", "updates of every parameter"),
        Tile("seed", "Seed", "{}", "the same seed gives the same run"),
    ]


def tiles(results: dict[str, Any], shown: Sequence[Tile]) -> str:
    """The key figures; those that the run did not measure are left out."""
    boxes = (
        f"<div><dt>{t.name}</dt><dd>{(t.form.format if t.form else _duration)(results[t.key])}</dd>"
        f"<dd>{t.note}</dd></div>"
        for t in shown
        if t.key in results
    )
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def learning(metrics: Sequence[dict[str, Any]], panels: Sequence[Panel], remark: str) -> Section:
    """The learning curves, from the objects of metrics.jsonl."""
    drawn = ((panel, learning_curve(panel, metrics)) for panel in panels)
    figures = "".join(
        f"<figure><figcaption>{panel.title}<small>{panel.note}</small></figcaption>{svg}</figure>"
        for panel, svg in drawn
        if svg
    )
    return Section(
        "learning",
        "How it learned",
        "Each curve runs over the training steps and ends in its last value. The training loss "
        "has label smoothing in it (and dropout, where that is on), so it mostly stays above the "
        f"validation loss: watch whether both still fall. {remark}",
        figures and f'<div class="panels">{figures}</div>',
    )


def settings(config: dict[str, Any], results: dict[str, Any]) -> Section:
    """The resolved config and all results, folded."""
    folded = "".join(
        f"<details><summary>{name}</summary>"
        f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre></details>"
        for name, value in (("Resolved config", config), ("All results", results))
    )
    return Section(
        "settings",
        "What was run",
        "Every setting after presets and flags were applied, and every figure at full precision, "
        "as in config.json and results.json beside this page.",
        folded,
    )
