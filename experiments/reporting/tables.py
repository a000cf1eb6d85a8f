"""Tables on a terminal, in one style."""

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text


def table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """An empty table with columns of text, then columns of numbers."""
    shown = Text(title, "bold")  # as Text, so that brackets are not markup
    made = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in texts:
        made.add_column(heading)
    for heading in numbers:
        made.add_column(heading, justify="right", no_wrap=True)
    return made
