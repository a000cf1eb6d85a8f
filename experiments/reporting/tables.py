"""Tables on a terminal, all in one look."""

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text


def table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """An empty table: columns of texts, and to their right columns of numbers."""
    shown = Text(title, "bold")  # whose brackets are no markup
    made = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in texts:
        made.add_column(heading)
    for heading in numbers:
        made.add_column(heading, justify="right", no_wrap=True)
    return made
