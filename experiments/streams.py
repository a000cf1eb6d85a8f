"""Standard output and error whose reader may close the pipe early."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from experiments.errors import UserError


def discard_further(stream: TextIO) -> None:
    """Discards all further output of a stream, its buffer included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Talk:
    """A text stream that never fails: once its reader has gone, output is discarded, and what its
    encoding lacks is shown as ?.

    A training must not end or lose its results because its terminal or log is gone, or is of
    another alphabet.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

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
    """For writing results to standard output: exits quietly if the reader has gone (`| head`).

    Raises UserError for other errors of the system, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        discard_further(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        raise UserError(f"standard output: {error.strerror}") from None
