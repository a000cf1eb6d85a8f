"""The predict command: words or sentences on standard input, answers on standard output."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.data.tokenizer import InputError, Symbols
from experiments.errors import UserError
from experiments.inference.hypotheses import Hypothesis, pharaoh
from experiments.inference.lines import (
    LONGEST,
    LineError,
    Lines,
    Tally,
    greet,
    one_line,
    serve,
    text_of,
)
from experiments.inference.predict_config import PredictConfig
from experiments.inference.predictor import Predictor
from experiments.inference.saved import load_together

FULL_BATCHES = 16  # read at once, to sort lines by length; few, to save memory
LEFT_EMPTY = "left empty"
IN_PARTS = "longer than the model was trained for, and translated in parts"
WITHOUT_END = "whose answer had no end within the most tokens"


class PrefixError(UserError):
    """A file of prefixes does not fit the input."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of input as the model gets it; its text is empty where it is blank or refused."""

    number: int
    text: str
    prefix: str = ""


class Prefixes:
    """Reads one prefix for each line of input. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise PrefixError(f"{path}: {error.strerror}") from None
        self._lines = Lines(self._file, LONGEST)

    def __enter__(self) -> "Prefixes":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def next(self) -> str:
        """The next prefix. Raises PrefixError where the file has ended, or is not text."""
        self._count += 1
        line = next(self._lines, None)
        if line is None:
            raise PrefixError(f"{self._path}: {self._count - 1} lines, and the input has more")
        try:
            return text_of(self._count, line).strip()
        except LineError as error:
            raise PrefixError(f"{self._path}, line {self._count}: {error}") from None

    def check_end(self) -> None:
        """Raises PrefixError where prefixes are left over: they belong to other sentences."""
        if next(self._lines, None) is not None:
            raise PrefixError(f"{self._path}: more lines than the {self._count} of the input")


class Prediction:
    """Answers lines: `n` for each, empty ones where a line is blank or refused."""

    def __init__(
        self, predictor: Predictor, config: PredictConfig, prefixes: Prefixes | None = None
    ) -> None:
        self._predictor, self._config, self._prefixes = predictor, config, prefixes
        self._n = config.nbest or 1

    def __call__(
        self, chunk: list[tuple[int, bytes]], tally: Tally, done: Callable[[int], None]
    ) -> Iterator[str]:
        """The answers to numbered lines; problems with a line are reported to `tally`."""
        lines = self._accepted([self._read(*line, tally) for line in chunk], tally)
        good = [line for line in lines if line.text]
        results = self._hypotheses(good, done) if good else []
        answers = zip(results, self._alignments(good, results), strict=True)
        for line in lines:
            if not line.text:
                yield from self._empty(line)
                continue
            hypotheses, links = next(answers)
            if not all(hypothesis.ended for hypothesis in hypotheses):
                most = self._predictor.settings.target_length
                tally.tell(line.number, f"no end within {most} tokens", WITHOUT_END)
            for hypothesis, column in zip(hypotheses, links, strict=True):
                yield "\t".join(self._columns(line, hypothesis) + column)

    def _read(self, number: int, line: bytes, tally: Tally) -> Line:
        prefix = self._prefixes.next() if self._prefixes else ""
        try:
            text = text_of(number, line).strip()
            if text:
                self._predictor.source.check(text)
                self._check_prefix(prefix)
            return Line(number, text, prefix)
        except (LineError, InputError) as error:
            tally.tell(number, str(error), LEFT_EMPTY)
            return Line(number, "")

    def _check_prefix(self, prefix: str) -> None:
        try:
            self._predictor.forced(prefix)
        except InputError as error:
            raise LineError(f"prefix {error}") from None

    def _accepted(self, lines: list[Line], tally: Tally) -> list[Line]:
        """The lines, with empty text where one is too long and --long is not split."""
        most, accepted = self._predictor.settings.source_length, []
        tokens = iter(self._predictor.lengths([line.text for line in lines if line.text]))
        for line in lines:
            if line.text and (count := next(tokens)) > most:
                why = f"{count} tokens, more than the {most} that the model was trained for"
                if self._config.long == "split":
                    tally.tell(line.number, f"{why}: translated in parts", IN_PARTS)
                else:
                    tally.tell(line.number, f"{why} (see --long split)", LEFT_EMPTY)
                    line = Line(line.number, "")
            accepted.append(line)
        return accepted

    def _hypotheses(self, lines: list[Line], done: Callable[[int], None]) -> list[list[Hypothesis]]:
        config, texts = self._config, [line.text for line in lines]
        options = {"long": config.long or "refuse", "done": done}
        if self._prefixes:
            options["prefixes"] = [line.prefix for line in lines]
        if not config.sample:
            return self._predictor.nbest(texts, self._n, config.beam, alpha=config.alpha, **options)
        return self._predictor.sample(
            texts, self._n, seed=config.seed or 0, lines=[line.number for line in lines],
            temperature=config.temperature or 1.0, top_k=config.top_k, top_p=config.top_p,
            **options,
        )  # fmt: skip

    def _alignments(
        self, lines: list[Line], results: list[list[Hypothesis]]
    ) -> Iterator[list[list[str]]]:
        """The alignment column of each hypothesis of each line; without --align no column."""
        if not self._config.align:
            return ([[]] * len(own) for own in results)
        pairs = [(line.text, h) for line, own in zip(lines, results, strict=True) for h in own]
        columns = iter([[pharaoh(links)] for links in self._predictor.align(pairs)])
        return ([next(columns) for _ in own] for own in results)

    def _columns(self, line: Line, hypothesis: Hypothesis) -> list[str]:
        text = one_line(hypothesis.text)
        if self._config.nbest is None:
            return [text]
        return [self._name(line), f"{hypothesis.score:.4f}", text]

    def _empty(self, line: Line) -> list[str]:
        """The answers to a line without text: with the columns of the others, empty."""
        columns = [""] if self._config.nbest is None else [self._name(line), "", ""]
        return ["\t".join(columns + [""] * self._config.align)] * self._n

    def _name(self, line: Line) -> str:
        return line.text if isinstance(self._predictor.source, Symbols) else str(line.number)


def run(config: PredictConfig) -> None:
    """Answers standard input on standard output.

    Raises UserError: a run that cannot be loaded, an ensemble with different vocabularies, a file
    of prefixes with another number of lines than the input.
    """
    with contextlib.nullcontext() if config.prefix is None else Prefixes(config.prefix) as prefixes:
        runs = [config.run, *config.ensemble]
        greet(config.run)
        predictor = load_together(runs, config.int8, config.mean, config.functions)
        at_once = FULL_BATCHES * predictor.batching.rows
        serve("predicting", Prediction(predictor, config, prefixes), at_once)
        if prefixes:
            prefixes.check_end()
