"""Words on standard input, pronunciations on standard output, line for line."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from experiments.pronouncer import Pronouncer, UnpronounceableError, load
from experiments.streams import to_reader

LINES_AT_ONCE = 4096  # sorted by length within; enough to fill batches, little to hold
LONGEST = 1 << 12  # bytes of a line that are looked at; the rest of a longer one is dropped


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Reads words, one a line, and writes one pronunciation a line."""

    run: Path = Path("runs/pronounce")
    """Folder of a finished (or stopped) run."""
    beam: int | None = None
    """Beam width. None: that of the run, or nbest where that is larger."""
    nbest: int | None = None
    """Write the N best, a line each: word, score and pronunciation, separated by tabs."""
    int8: bool = False
    """Multiply by matrices in 8 bits (`tfm.quantize`): faster where the processor has such
    products; a few answers differ."""

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.beam is not None and self.nbest is not None and self.nbest > self.beam:
            raise ValueError(f"nbest={self.nbest} must be at most beam={self.beam}")


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream, split at \\n alone; of one longer than `LONGEST` the beginning."""
    while line := stream.readline(LONGEST):
        rest = line
        while len(rest) == LONGEST and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST)
        yield line


def _decode_line(pronouncer: Pronouncer, number: int, line: bytes) -> str | None:
    """The word of a line, or None with the reason on standard error."""
    if len(line) == LONGEST:
        print(f"line {number}: longer than {LONGEST} bytes", file=sys.stderr)
        return None
    try:
        # utf-8-sig: a byte order mark before the first word is no letter of it.
        word = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
        pronouncer.encode(word)
        return word
    except UnicodeDecodeError:
        print(f"line {number}: invalid UTF-8", file=sys.stderr)
    except UnpronounceableError as error:
        print(f"line {number}: {error}", file=sys.stderr)
    return None


def predict(
    pronouncer: Pronouncer,
    lines: Iterable[bytes],
    config: PredictConfig,
    at_once: int = LINES_AT_ONCE,
) -> Iterator[str]:
    """One line for each line of input (`nbest` lines where that is asked for).

    A line that cannot be pronounced gives empty ones, so that input and output stay in step.
    """
    n = config.nbest or 1
    numbered = enumerate(lines, start=1)
    while chunk := list(itertools.islice(numbered, at_once)):
        words = [_decode_line(pronouncer, number, line) for number, line in chunk]
        good = [word for word in words if word is not None]
        found = iter(pronouncer.nbest(good, n, config.beam) if good else [])
        for word in words:
            if word is None:
                yield from [""] * n
            elif config.nbest is None:
                yield str(next(found)[0])
            else:
                yield from (f"{word}\t{p.score:.4f}\t{p}" for p in next(found))


def run(config: PredictConfig) -> None:
    """Standard input to standard output."""
    pronouncer = load(config.run, config.int8)
    at_once = 1 if sys.stdin.isatty() else LINES_AT_ONCE  # a person waits for each answer
    output = sys.stdout.buffer  # UTF-8 whatever the locale: the input is UTF-8 too
    for line in predict(pronouncer, lines_of(sys.stdin.buffer), config, at_once):
        with to_reader():
            output.write(line.encode() + b"\n")
            if at_once == 1:
                output.flush()
    with to_reader():
        output.flush()
