"""The progress bar of all long-running work."""

import sys
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

GAP = "  "


class ProgressBar:
    """Progress and remaining time on standard error: a bar on a terminal, else a line now and then.
    Use as a context manager.

    The remaining time is estimated from the steps after the first, which may compile, and is shown
    from the second step on. The bar is full only when the context is left: work after the last step
    shows as a bar without an end, named by `now`.
    """

    SECONDS_BETWEEN_LINES = 30
    WIDE = 100  # columns of a terminal in which all stands in one row
    NARROWEST_BAR, WIDEST_BAR = 8, 40

    def __init__(
        self,
        what: str,
        total: float | None = None,
        done: float = 0,
        *,
        silent: bool = False,
        counted: bool = True,
        first_counts: bool = False,
        console: Console | None = None,
    ) -> None:
        """
        Args:
          what: the work, such as "scoring test words".
          total: the number of steps. None: unknown.
          done: steps that were done before, such as those of a resumed run.
          silent: prints nothing, for all but one of several processes.
          counted: False hides M/N, where a step is not a unit that means something to the user.
          first_counts: the first step takes no longer than the others.
        """
        self._what = self._doing = what
        self._total, self._done, self._status = total, done, ""
        self._silent, self._counted = silent, counted
        self._begun = self._reached = self._last_line = time.monotonic()
        self._pace_from = (self._begun, done) if first_counts else None
        self._open, self._has_spoken = True, False
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        if not silent and self._console.is_terminal and not self._console.is_dumb_terminal:
            # A print goes above the bar, unless standard output goes to a file.
            to_terminal = sys.stdout.isatty()
            self._live = Live(self, console=self._console, redirect_stdout=to_terminal)

    def __enter__(self) -> "ProgressBar":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open, self._doing = False, self._what
        if self._live:
            self._live.stop()

    def advance(self, count: float = 1) -> None:
        """`count` more steps are done."""
        self.reached(self._done + count)

    def reached(self, done: float) -> None:
        """Sets the number of steps done. It costs microseconds, so every step may call it."""
        self._doing = self._what
        if moved := done != self._done:
            self._done, self._reached = done, time.monotonic()
            self._pace_from = self._pace_from or (self._reached, done)
        if not self._status:  # else the line is printed with the next status
            self._log(at_once=moved and self._complete and self._has_spoken)

    def update(self, status: str) -> None:
        """Shows a status, such as the loss."""
        first, self._status = not self._status, status
        self._log(at_once=first or self._complete)

    def now(self, doing: str) -> None:
        """Names work between the steps, or before or after them; the next step clears it."""
        self._doing = doing

    def say(self, line: str) -> None:
        """Prints a permanent line above the bar."""
        if not self._silent:
            self._console.print(Text(line), soft_wrap=True)

    @property
    def _complete(self) -> bool:
        return self._total is not None and self._done >= self._total

    def _log(self, at_once: bool) -> None:
        now = time.monotonic()
        if not self._live and (at_once or now - self._last_line >= self.SECONDS_BETWEEN_LINES):
            parts = [self._doing, self._count(), self._status, *self._times()]
            self.say(GAP.join(filter(None, parts)))
            self._last_line, self._has_spoken = now, True

    def _count(self) -> str:
        if not self._counted:
            return ""
        return f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"

    def _times(self) -> list[str]:
        elapsed = f"elapsed {_clock(time.monotonic() - self._begun)}"
        remaining = self._remaining()
        return [elapsed] if remaining is None else [elapsed, f"remaining {_clock(remaining)}"]

    def _remaining(self) -> float | None:
        """The remaining seconds; None where they are unknown or no step remains."""
        if self._total is None or self._complete or self._pace_from is None:
            return None
        begun, first = self._pace_from
        if self._done <= first:
            return None
        # The time of a running evaluation counts, since there will be more evaluations.
        until = self._reached if self._doing == self._what else time.monotonic()
        return (until - begun) / (self._done - first) * (self._total - self._done)

    def __rich__(self) -> RenderableType:
        """One row; two in a narrow terminal, with the status in the second."""
        width, times = self._console.width, self._times()
        if self._open and self._total is not None and not self._complete and len(times) == 1:
            times.append("remaining –")
        wide = width >= self.WIDE
        after = filter(None, [self._count(), self._status if wide else "", *times])
        before, *after = texts = [Text(text, no_wrap=True) for text in (self._doing, *after)]
        below = [] if wide or not self._status else [Text(self._status)]
        room = width - sum(text.cell_len + len(GAP) for text in texts)
        if room < self.NARROWEST_BAR:
            return Group(Text(GAP.join(text.plain for text in texts)), *below)
        row = Table.grid(padding=(0, len(GAP), 0, 0))
        row.add_row(before, self._bar(min(room, self.WIDEST_BAR)), *after)
        return Group(row, *below)

    def _bar(self, width: int) -> Bar:
        endless = self._open and (self._total is None or self._complete)
        # A closed bar without a total is shown full.
        total = self._done or 1 if self._total is None else self._total
        done = total if self._total is None else self._done
        return Bar(total=total, completed=done, width=width, pulse=endless)


def _clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
