"""Lines on standard input, answers on standard output: what predict and score share."""

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
    """What is wrong with one line."""


def lines_of(stream: BinaryIO, longest: int) -> Iterator[bytes]:
    """The lines of a stream, split at \\n alone; of one longer than `longest` the beginning."""
    while line := stream.readline(longest):
        rest = line
        while len(rest) == longest and not rest.endswith(b"\n"):
            rest = stream.readline(longest)
        yield line


class Tally(collections.Counter):
    """Says what is wrong with a line on standard error, and counts what was said."""

    def tell(self, number: int, why: str, kind: str) -> None:
        """One line of standard error; `kind` says in the summary what so many lines were."""
        print(f"line {number}: {why}", file=sys.stderr)
        self[kind] += 1

    def sum_up(self) -> None:
        """A line for each kind on standard error."""
        for kind, count in self.items():
            print(f"{count} {'line' if count == 1 else 'lines'} {kind}", file=sys.stderr)


def text_of(number: int, line: bytes) -> str:
    """The text of a line, without the characters that end it.

    Raises LineError: invalid UTF-8, or too long.
    """
    if len(line) >= LONGEST:
        raise LineError(f"longer than {LONGEST} bytes")
    try:
        # utf-8-sig: a byte order mark before the first word is no letter of it.
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise LineError("invalid UTF-8") from None


def chunks(lines: Iterable[bytes], at_once: int) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines, at most `at_once` together, and few where they are long."""
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
    """`text` with spaces for what would begin another line or column."""
    return text.translate(dict.fromkeys(map(ord, "\r\n\t"), " "))


def lines_ahead(stream: BinaryIO) -> int | None:
    """How many lines a file still has; None where it is no file that can be looked ahead in."""
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
    """Writes the answers to each chunk of lines to standard output, as soon as they are there.

    A chunk is of `at_once` lines at most; a person at a terminal gets each answer at once.
    """
    at_once = 1 if sys.stdin.isatty() else at_once
    output, tally = sys.stdout.buffer, Tally()  # UTF-8 whatever the locale: the input is UTF-8 too
    # On a terminal the answers themselves show how far it is.
    with ProgressBar(verb, lines_ahead(sys.stdin.buffer), silent=sys.stdout.isatty()) as bar:
        for chunk in chunks(lines, at_once):
            text = "".join(f"{answer}\n" for answer in answers(chunk, tally, bar.advance))
            with to_reader():
                output.write(text.encode())
                output.flush()
            bar.reached(chunk[-1][0])
    tally.sum_up()
