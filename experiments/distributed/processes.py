"""The processes of a run, as each sees the others: what they compare, wait for, and end by."""

import contextlib
import faulthandler
import json
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.checkpoints.differences import differences
from experiments.checkpoints.run_folder import write_text
from experiments.errors import UserError, exit_code, told_in_one_line
from experiments.training.stopping import Stopped

# What stands in an error of JAX or Orbax when another process does not answer. The heartbeat says
# so too, but maybe only a minute later.
_WAITS_IN_VAIN = re.compile("Gloo|NCCL|barrier|coordination service", re.IGNORECASE)
GO_ON = "the same command goes on from the newest checkpoint"


class ProcessError(UserError):
    """Why the processes of a run cannot work together."""


def gather(value: Any) -> list[Any]:
    """What each process brings, by number, in every process; `value` is what JSON can say."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # All must bring arrays of one shape: so lengths first.
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, lengths.max() - text.size))
    pairs = zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    return [json.loads(bytes(text[:length])) for text, length in pairs]


class Processes:
    """Those that train together, each at the same point of the program. Alone, nothing waits.

    JAX ends a process, by an abort that says so, where another is lost: killed, silent for the
    heartbeat time-out, or gone with an error. A process that stands still in a step prints where
    and ends (`watch`).
    """

    def __init__(self, folder: Path = Path(), stall_timeout: float = 600) -> None:
        self.count = jax.process_count() if jax.distributed.is_initialized() else 1
        self.is_first = self.count == 1 or jax.process_index() == 0
        """Whether this is process 0, which alone writes and speaks."""
        self._stall_timeout = stall_timeout
        self._arrived = folder / ".arrived"
        """How often process 0 has come to where the others wait for it, and in which sitting."""
        self._sitting, self._times = self.from_first(uuid.uuid4().hex), 0

    def from_first(self, value: Any = None, slow: bool = False) -> Any:
        """Process 0's `value`, which JSON can say, in every process; tuples arrive as lists.

        slow: process 0 may have long been busy, so the others wait for a file in the run folder
          before they go into a collective, which may give up.
        """
        if self.count == 1:
            return json.loads(json.dumps(value))
        if slow:
            self._wait_for_first()
        return gather(value if self.is_first else None)[0]

    def _wait_for_first(self) -> None:
        self._times += 1
        if self.is_first:
            write_text(self._arrived, f"{self._sitting} {self._times}")
        while not self._has_arrived():
            time.sleep(0.2)

    def _has_arrived(self) -> bool:
        try:
            sitting, times = self._arrived.read_text().split()
        except (OSError, ValueError):
            return False
        return sitting == self._sitting and int(times) >= self._times

    def check_equal(self, what: str, value: dict[str, Any], most: int = 8) -> None:
        """Raises ProcessError in every process where one's `value` is not process 0's."""
        if self.count == 1:
            return
        first, *others = gather(value)
        told = []
        for number, other in enumerate(others, start=1):
            if fields := differences(first, other):
                more = f"; and {len(fields) - most} more" if len(fields) > most else ""
                told.append(
                    f"process {number} differs from process 0 in {what} (process 0 -> it): "
                    f"{'; '.join(fields[:most])}{more}"
                )
        if told:
            raise ProcessError(told[0] + (f"; so do {len(told) - 1} more" if told[1:] else ""))

    def watch(self) -> None:
        """From now on, and anew with each call: after the stall time-out without another call this
        process prints the stack of each of its threads, and ends. Alone it may take its time."""
        if self.count > 1:
            faulthandler.dump_traceback_later(self._stall_timeout, exit=True)

    def unwatch(self) -> None:
        """From now on this process may take as long as it likes."""
        if self.count > 1:
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Around all that they do: at its end all leave JAX together.

        An error is printed, and ends the process at once with its exit code: the end of Python
        would wait for the others, and JAX there blame one that is well.
        """
        try:
            yield
            self.from_first(slow=True)  # process 0 may translate and report for long
        except Stopped:  # all of them have
            self._close()
            raise
        except BaseException as error:
            if self.count > 1:
                _leave(error)
            raise
        self._close()

    def _close(self) -> None:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        if self.is_first:
            self._arrived.unlink(missing_ok=True)


def _leave(error: BaseException) -> NoReturn:
    """Prints the error as the end of Python would, and ends the process without that."""
    lost = _WAITS_IN_VAIN.search(str(error))
    if isinstance(error, told_in_one_line()):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, SystemExit | KeyboardInterrupt):
        traceback.print_exception(error)
    if lost:
        print(f"error: another task was lost, for which this one waited; {GO_ON}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if lost else exit_code(error))
