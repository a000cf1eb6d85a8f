"""What the reports share: one HTML page that loads nothing and runs no script."""

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


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


def page(title: str, intro: str, command: str, tiles: str, sections: Sequence[Section]) -> str:
    """The whole page; sections without a body are left out."""
    sections = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.anchor}">{section.title}</a>' for section in sections)
    # The policy makes the browser hold the page to its promise: nothing is loaded, nothing runs.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
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
<nav>{links}</nav>
</header>
<main>
{"".join(section.html() for section in sections)}
</main>
<footer>Written by tfm. This page loads nothing and runs no script.</footer>
</body>
</html>
"""
