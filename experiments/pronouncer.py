"""The former module of `load`, with its former result types; kept for this release."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

from experiments.data.tokenizer import InputError as UnpronounceableError  # noqa: F401
from experiments.inference.predictor import Predictor
from experiments.inference.saved import load as load_predictor

warnings.warn(
    "experiments.pronouncer is experiments.inference now: its load gives a Predictor, whose nbest "
    "gives hypotheses",
    FutureWarning,
    stacklevel=2,
)


@dataclasses.dataclass(frozen=True)
class Pronunciation:
    """One hypothesis and its score, ln P / lp(n)."""

    phones: tuple[str, ...]
    score: float

    def __str__(self) -> str:
        return " ".join(self.phones)


@dataclasses.dataclass(frozen=True)
class Pronouncer:
    """A predictor of words, as it was."""

    predictor: Predictor

    def nbest(
        self, words: Sequence[str], n: int, beam: int | None = None
    ) -> list[list[Pronunciation]]:
        """The n best pronunciations of each word, best first."""
        return [
            [Pronunciation(tuple(h.text.split()), h.score) for h in best]
            for best in self.predictor.nbest(words, n, beam)
        ]

    def __call__(self, words: Sequence[str], beam: int | None = None) -> list[Pronunciation]:
        """The best pronunciation of each word."""
        return [best for (best,) in self.nbest(words, 1, beam)]


def load(run: str | Path, int8: bool = False, functions: str | None = None) -> Pronouncer:
    """As `experiments.inference.saved.load`."""
    return Pronouncer(load_predictor(run, int8, functions))
