"""The score command: pairs on standard input, log-probabilities on standard output."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from experiments.errors import UserError
from experiments.inference.hypotheses import Scored
from experiments.inference.lines import LineError, Tally, greet, serve, text_of
from experiments.inference.predict import FULL_BATCHES, LEFT_EMPTY
from experiments.inference.predictor import Predictor
from experiments.inference.saved import load_together


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Reads lines `source<TAB>target`, and writes ln P(target | source) and its tokens for each."""

    run: Path = Path("runs/translate")
    """Folder of a finished (or stopped) run, of pronunciation or translation."""
    ensemble: tuple[Path, ...] = ()
    """Folders of further runs with the same vocabularies, to score together with."""
    mean: Literal["log_linear", "linear"] | None = None
    """With ensemble: the mean of the log-probabilities, or (linear) of the probabilities. None:
    log_linear."""
    int8: bool = False
    """Multiply by matrices in 8 bits (`tfm.quantize`)."""
    functions: str | None = None
    """FILE:NAME of the `tfm.Functions` that the run was trained with (my.py:MINE)."""
    per_token: bool = False
    """Two more columns: the pieces of the target, and the log-probability of each."""

    def __post_init__(self) -> None:
        if self.mean is not None and not self.ensemble:
            raise ValueError(f"mean={self.mean} goes with an ensemble")


class Scoring:
    """Answers lines; the answer is empty where a line is empty or refused."""

    def __init__(self, predictor: Predictor, config: ScoreConfig) -> None:
        self._predictor, self._config = predictor, config

    def __call__(
        self, chunk: list[tuple[int, bytes]], tally: Tally, done: Callable[[int], None]
    ) -> Iterator[str]:
        """The answers to numbered lines; problems with a line are reported to `tally`."""
        pairs = [self._read(*line, tally) for line in chunk]
        good = [pair for pair in pairs if pair is not None]
        scored = iter(self._predictor.score(good, done) if good else [])
        for pair in pairs:
            yield "" if pair is None else self._columns(next(scored))

    def _read(self, number: int, line: bytes, tally: Tally) -> tuple[str, str] | None:
        try:
            pair = tuple(text.strip() for text in text_of(number, line).split("\t"))
            if pair == ("",):
                return None
            if len(pair) != 2:
                raise LineError(f"{len(pair)} columns, not source<TAB>target")
            if not all(pair):
                raise LineError(f"an empty {'target' if pair[0] else 'source'}")
            self._predictor.check(*pair)
            return pair
        except UserError as error:
            tally.tell(number, str(error), LEFT_EMPTY)
            return None

    def _columns(self, scored: Scored) -> str:
        columns = [f"{scored.log_prob:.6f}", str(len(scored.ids))]
        if self._config.per_token:
            columns.append(" ".join(self._predictor.target.to_pieces(scored.ids)))
            columns.append(" ".join(f"{value:.6f}" for value in scored.log_probs))
        return "\t".join(columns)


def run(config: ScoreConfig) -> None:
    """Scores standard input. Raises UserError for runs that cannot be loaded."""
    greet(config.run)
    predictor = load_together(
        [config.run, *config.ensemble], config.int8, config.mean, config.functions
    )
    serve("scoring", Scoring(predictor, config), FULL_BATCHES * predictor.batching.rows)
