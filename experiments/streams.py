"""Standard output and error whose reader may leave in the middle."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from experiments.errors import UserError


def discard_further(stream: TextIO) -> None:
    """Lets all that is still written to a stream vanish, what it holds back included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Talk:
    """A text stream that never fails: where its reader has left, nobody is told any more.

    A training is not to end, nor to lose its results, because the terminal or the log that it
    speaks to is gone.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard_further(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_further(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def to_reader() -> Iterator[None]:
    """For writing results to standard output: leaves quietly where the reader has left (`| head`).

    Raises UserError for what else the system refuses, a full disk for one.
    """
    try:
        yield
    except OSError as error:
        discard_further(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        raise UserError(f"standard output: {error.strerror}") from None
