"""How a training is seen while it runs."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """A progress bar on a terminal, a line now and then elsewhere; all on standard error.

    `silent` shows nothing: of several processes one speaks.
    """

    SECONDS_BETWEEN_LINES = 30

    def __init__(self, steps: int, done: int, silent: bool = False) -> None:
        self._console = Console(stderr=True, quiet=silent)
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"), TextColumn("time left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console, disable=silent or not self._console.is_terminal,
            speed_estimate_period=120,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=steps, completed=done, status="compiling …")
        self._steps, self._first, self._started, self._printed = steps, done, time.monotonic(), 0.0

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Moves the bar; costs microseconds, so it may be called at every step."""
        self._progress.update(self._task, completed=step)

    def update(self, step: int, status: str) -> None:
        """Shows how the training goes; `status` is one line of figures."""
        self._progress.update(self._task, status=status)
        now = time.monotonic()
        if not self._progress.disable or self._console.quiet:
            return
        if now - self._printed > self.SECONDS_BETWEEN_LINES or step == self._steps:
            left = (now - self._started) / max(step - self._first, 1) * (self._steps - step)
            print(f"step {step}/{self._steps}  {status}  time left {left:.0f} s", file=sys.stderr)
            self._printed = now

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
