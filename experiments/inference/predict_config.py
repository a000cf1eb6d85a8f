"""The flags of predict, for words and for sentences."""

import dataclasses
import math
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Reads words or sentences, one a line, and writes one pronunciation or translation a line."""

    run: Path = Path("runs/pronounce")
    """Folder of a finished (or stopped) run, of pronunciation or translation."""
    beam: int | None = None
    """Beam width. None: that of the run, or nbest where that is larger."""
    nbest: int | None = None
    """Write the N best, a line each, its columns separated by tabs: the word (of a translation, the
    number of the line), the score and the pronunciation or translation."""
    alpha: float | None = None
    """Exponent of the length penalty. None: that of the run."""
    int8: bool = False
    """Multiply by matrices in 8 bits (`tfm.quantize`): faster where the processor has such
    products; a few answers differ."""
    functions: str | None = None
    """FILE:NAME of the `tfm.Functions` that the run was trained with (my.py:MINE)."""
    sample: bool = False
    """Draw at random in the place of a search; nbest draws so many."""
    temperature: float | None = None
    """With sample: above 1 evens the probabilities out, below 1 sharpens them. None: 1."""
    top_k: int | None = None
    """With sample: only the k likeliest tokens may come."""
    top_p: float | None = None
    """With sample: only the smallest set of tokens of at least this probability may come."""
    seed: int | None = None
    """With sample: what is drawn for a line depends on it, the line and its number. None: 0."""
    prefix: Path | None = None
    """A file with what each line's answer begins with, a line each."""
    ensemble: tuple[Path, ...] = ()
    """Folders of further runs with the same vocabularies, to answer together with."""
    mean: Literal["log_linear", "linear"] | None = None
    """With ensemble: the mean of the log-probabilities, or (linear) of the probabilities. None:
    log_linear."""
    align: bool = False
    """One more column, `i-j` for source piece i and target piece j."""
    long: Literal["refuse", "split"] | None = None
    """What becomes of a line longer than the model was trained for. None: refuse
    leaves it empty, and says so; split takes it in parts."""

    def __post_init__(self) -> None:
        self._check_search()
        self._check_sampling()
        if self.mean is not None and not self.ensemble:
            raise ValueError(f"mean={self.mean} goes with an ensemble")

    def _check_search(self) -> None:
        for name in ("beam", "nbest"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.beam is not None and self.nbest is not None and self.nbest > self.beam:
            raise ValueError(f"nbest={self.nbest} must be at most beam={self.beam}")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be at least 0 and finite")

    def _check_sampling(self) -> None:
        for name in ("temperature", "top_k", "top_p", "seed"):
            if getattr(self, name) is not None and not self.sample:
                raise ValueError(f"{name}={getattr(self, name)} goes with sample")
        for name in ("beam", "alpha"):
            if getattr(self, name) is not None and self.sample:
                raise ValueError(f"{name}={getattr(self, name)} is for a search, not for sample")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
