"""The processes of a run: how they compare values, wait for each other, and end."""

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

# Words in an error of JAX or Orbax that mean that another process does not answer. The heartbeat
# reports it too, but perhaps a minute later.
_WAITS_IN_VAIN = re.compile("Gloo|NCCL|barrier|coordination service", re.IGNORECASE)
GO_ON = "the same command goes on from the newest checkpoint"


class ProcessError(UserError):
    """Why the processes of a run cannot work together."""


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, by process number; every process must call it."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # An all-gather needs arrays of one shape, so the lengths come first.
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, lengths.max() - text.size))
    pairs = zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    return [json.loads(bytes(text[:length])) for text, length in pairs]


class Processes:
    """The processes of one training, which all make the same calls. A single one never waits.

    JAX aborts a process when another is lost: killed, silent for the heartbeat time-out, or ended
    by an error. A process that hangs in a step prints its stacks and exits (`watch`).
    """

    def __init__(self, folder: Path = Path(), stall_timeout: float = 600) -> None:
        self.count = jax.process_count() if jax.distributed.is_initialized() else 1
        self.is_first = self.count == 1 or jax.process_index() == 0
        """Whether this is process 0, which alone writes and prints."""
        self._stall_timeout = stall_timeout
        self._arrived = folder / ".arrived"
        """Where process 0 writes the session's id and the number of waits that it has reached."""
        self._sitting, self._times = self.from_first(uuid.uuid4().hex), 0

    def from_first(self, value: Any = None, slow: bool = False) -> Any:
        """Broadcasts process 0's `value`, a JSON value, to every process; tuples become lists.

        slow: process 0 may be busy for long. The others wait for a file in the run folder before
          they enter the collective, which would time out.
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
        """Raises ProcessError in every process if one's `value` differs from process 0's."""
        if self.count == 1:
            return
        first, *others = gather(value)
        messages = []
        for number, other in enumerate(others, start=1):
            if fields := differences(first, other):
                more = f"; and {len(fields) - most} more" if len(fields) > most else ""
                messages.append(
                    f"process {number} differs from process 0 in {what} (process 0 -> it): "
                    f"{'; '.join(fields[:most])}{more}"
                )
        if messages:
            raise ProcessError(
                messages[0] + (f"; so do {len(messages) - 1} more" if messages[1:] else "")
            )

    def watch(self) -> None:
        """Starts or restarts the stall timer. When it expires, the process prints each thread's
        stack and exits. A single process has no timer."""
        if self.count > 1:
            faulthandler.dump_traceback_later(self._stall_timeout, exit=True)

    def unwatch(self) -> None:
        """Stops the stall timer."""
        if self.count > 1:
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Wraps all work of the processes; at its end all shut JAX's runtime down together.

        An error is printed, and ends the process at once with its exit code. A normal exit of
        Python would wait for the other processes, and JAX would blame a healthy one.
        """
        try:
            yield
            self.from_first(slow=True)  # process 0 may translate and report for long
        except Stopped:  # all processes have stopped
            self._close()
            raise
        except BaseException as error:
            if isinstance(error, ProcessError):  # raised in all: none may be taken for lost
                self._close()
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
    """Prints the error as Python would, and exits without Python's clean-up."""
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
