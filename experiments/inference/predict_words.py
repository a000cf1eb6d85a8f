"""Words on standard input, pronunciations on standard output, line for line."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator

from experiments.inference.lines import lines_of
from experiments.inference.predict_config import PredictConfig
from experiments.inference.pronouncer import Pronouncer, UnpronounceableError, load
from experiments.streams import to_reader

LINES_AT_ONCE = 4096  # sorted by length within; enough to fill batches, little to hold
LONGEST = 1 << 12  # bytes of a line that are looked at; the rest of a longer one is dropped


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
    """Standard input to standard output, with a run of pronunciation."""
    pronouncer = load(config.run, config.int8, config.functions)
    if config.alpha is not None:
        pronouncer = dataclasses.replace(pronouncer, alpha=config.alpha)
    at_once = 1 if sys.stdin.isatty() else LINES_AT_ONCE  # a person waits for each answer
    output = sys.stdout.buffer  # UTF-8 whatever the locale: the input is UTF-8 too
    for line in predict(pronouncer, lines_of(sys.stdin.buffer, LONGEST), config, at_once):
        with to_reader():
            output.write(line.encode() + b"\n")
            if at_once == 1:
                output.flush()
    with to_reader():
        output.flush()
