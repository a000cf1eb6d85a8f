"""Reads lines of standard input and writes answers to standard output, for predict and score."""

import collections
import io
import itertools
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from experiments.errors import UserError
from experiments.progress import ProgressBar
from experiments.streams import to_reader

BYTES_AT_ONCE = 1 << 22
LONGEST = 1 << 20  # bytes of a line; a longer one is refused


class LineError(UserError):
    """One line cannot be processed; the message says why."""


def lines_of(stream: BinaryIO, longest: int) -> Iterator[bytes]:
    """The lines of a stream, split at \\n only; a line over `longest` bytes is truncated."""
    while line := stream.readline(longest):
        rest = line
        while len(rest) == longest and not rest.endswith(b"\n"):
            rest = stream.readline(longest)
        yield line


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
    """The text of a line, without the characters that end it.

    Raises LineError: invalid UTF-8, or too long.
    """
    if len(line) >= LONGEST:
        raise LineError(f"longer than {LONGEST} bytes")
    try:
        # utf-8-sig drops a byte order mark before the first word.
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise LineError("invalid UTF-8") from None


def chunks(lines: Iterable[bytes], at_once: int) -> Iterator[list[tuple[int, bytes]]]:
    """Chunks of at most `at_once` numbered lines, and fewer where the lines are long."""
    numbered = enumerate(lines, start=1)
    for first in numbered:
        chunk, size = [first], len(first[1])
        for number, line in itertools.islice(numbered, at_once - 1):
            chunk.append((number, line))
            size += len(line)
            if size > BYTES_AT_ONCE:
                break
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


def serve(verb: str, answers: Answers, lines: Iterable[bytes], at_once: int) -> None:
    """Writes the answers to each chunk of lines to standard output, and flushes them.

    A chunk has at most `at_once` lines, and a single one where a person types at a terminal.
    """
    at_once = 1 if sys.stdin.isatty() else at_once
    output, tally = sys.stdout.buffer, Tally()  # bytes: UTF-8 in every locale
    # No bar where the answers go to a terminal, since they show the progress.
    with ProgressBar(verb, lines_ahead(sys.stdin.buffer), silent=sys.stdout.isatty()) as bar:
        for chunk in chunks(lines, at_once):
            text = "".join(f"{answer}\n" for answer in answers(chunk, tally, bar.advance))
            with to_reader():
                output.write(text.encode())
                output.flush()
            bar.reached(chunk[-1][0])
    tally.sum_up()
