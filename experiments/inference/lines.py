"""Reads lines of standard input and writes answers to standard output, for predict and score."""

import collections
import io
import os
import select
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from experiments.errors import UserError
from experiments.progress import ProgressBar
from experiments.streams import to_reader

BYTES_AT_ONCE = 1 << 22
LONGEST = 1 << 20  # bytes of a line; a longer one is refused


class LineError(UserError):
    """One line cannot be processed; the message says why."""


class Lines(Iterator[bytes]):
    """The lines of a stream, split at \\n only and without it; one over `longest` bytes is
    truncated."""

    BLOCK = 1 << 16
    PAUSE = 0.02  # seconds without a further byte, after which nothing more is waiting

    def __init__(self, stream: BinaryIO, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._lines: collections.deque[bytes] = collections.deque()
        self._rest, self._ended = b"", False

    def __next__(self) -> bytes:
        while not self._lines and not self._ended:
            self._read()
        if not self._lines:
            raise StopIteration
        return self._lines.popleft()

    def waiting(self) -> bool:
        """Whether a further line has arrived. A program may wait for an answer to the last one."""
        while not self._lines and not self._ended and self._readable():
            self._read()
        return bool(self._lines)

    def _readable(self) -> bool:
        try:
            return bool(select.select([self._stream.fileno()], [], [], self.PAUSE)[0])
        except (OSError, ValueError):  # no stream of the system's: nobody waits
            return True

    def _read(self) -> None:
        block = self._stream.read1(self.BLOCK)
        *ends, rest = block.split(b"\n")
        for end in ends:
            self._lines.append((self._rest + end)[: self._longest])
            self._rest = b""
        self._rest = (self._rest + rest)[: self._longest]
        if not block:
            self._ended = True
            self._lines.extend([self._rest] if self._rest else [])


class Tally(collections.Counter):
    """Reports problems with lines on standard error, and counts them by kind."""

    def tell(self, number: int, why: str, kind: str) -> None:
        """Prints a problem with a line, and counts it under `kind` for the summary."""
        print(f"line {number}: {why}", file=sys.stderr)
        self[kind] += 1

    def sum_up(self) -> None:
        """Prints the count of each kind on standard error."""
        for kind, count in self.items():
            print(f"{count} {'line' if count == 1 else 'lines'} {kind}", file=sys.stderr)


def text_of(number: int, line: bytes) -> str:
    """The text of a line, without a carriage return at its end.

    Raises LineError: invalid UTF-8, or too long.
    """
    if len(line) >= LONGEST:
        raise LineError(f"longer than {LONGEST} bytes")
    try:
        # utf-8-sig drops a byte order mark before the first word.
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise LineError("invalid UTF-8") from None


def chunks(lines: Lines, at_once: int) -> Iterator[list[tuple[int, bytes]]]:
    """Chunks of at most `at_once` numbered lines: fewer where they are long, or where no more have
    arrived."""
    numbered = enumerate(lines, start=1)
    for first in numbered:
        chunk, size = [first], len(first[1])
        while len(chunk) < at_once and size <= BYTES_AT_ONCE and lines.waiting():
            chunk.append(next(numbered))
            size += len(chunk[-1][1])
        yield chunk


def one_line(text: str) -> str:
    """`text` with spaces in the place of line ends and tabs."""
    return text.translate(dict.fromkeys(map(ord, "\r\n\t"), " "))


def lines_ahead(stream: BinaryIO) -> int | None:
    """The number of lines left in a file; None where the stream is not a seekable file."""
    try:
        descriptor = stream.fileno()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        place, lines, last = os.lseek(descriptor, 0, os.SEEK_CUR), 0, b"\n"
        while block := os.pread(descriptor, 1 << 20, place):
            place, lines, last = place + len(block), lines + block.count(b"\n"), block[-1:]
        return lines + (last != b"\n")
    except (OSError, io.UnsupportedOperation):
        return None


Answers = Callable[[list[tuple[int, bytes]], Tally, Callable[[int], None]], Iterable[str]]


def greet(run: Path) -> None:
    """Tells a person at a terminal what is going on, and how to end."""
    if sys.stdin.isatty():
        print(f"loading {run}; then a line at a time, Ctrl-D ends", file=sys.stderr)


def _prompt() -> None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)


def serve(verb: str, answers: Answers, at_once: int) -> None:
    """Answers the lines of standard input on standard output, at most `at_once` together.

    What has arrived is answered as soon as no more is waiting.
    """
    lines = Lines(sys.stdin.buffer, LONGEST)
    output, tally = sys.stdout.buffer, Tally()  # bytes: UTF-8 in every locale
    # No bar where the answers go to a terminal, since they show the progress.
    with ProgressBar(verb, lines_ahead(sys.stdin.buffer), silent=sys.stdout.isatty()) as bar:
        _prompt()
        for chunk in chunks(lines, at_once):
            text = "".join(f"{answer}\n" for answer in answers(chunk, tally, bar.advance))
            with to_reader():
                output.write(text.encode())
                output.flush()
            bar.reached(chunk[-1][0])
            _prompt()
    tally.sum_up()
