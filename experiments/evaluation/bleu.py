"""BLEU and chrF by sacrebleu, with their signatures and bootstrap intervals; 0 to 100."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

RESAMPLES = 1000
_SEED = 12345  # sacrebleu's own default; a variable of the environment would change it there

Tokenize = Literal["13a", "intl", "zh", "char", "none"]
"""How BLEU parts words: those of sacrebleu's ways that need no further package and no download."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score of a whole corpus, 0 to 100."""

    score: float
    mean: float
    """Mean over bootstrap resamples of the sentences."""
    half_width: float
    """Half the width of the interval that holds 95 % of the resamples."""
    signature: str
    """What it takes to compute the same number again."""

    def __str__(self) -> str:
        return f"{self.score:.2f} ({self.mean:.2f} ± {self.half_width:.2f}) {self.signature}"

    def to_json(self) -> dict[str, Any]:
        """All fields, for `json.dump`."""
        return dataclasses.asdict(self)


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: Tokenize = "13a"
) -> Measure:
    """BLEU of plain text, which sacrebleu parts into words itself: comparable between papers.

    "13a" is for languages with spaces, "zh" for Chinese, "char" for others without spaces.

    Raises:
      ValueError: no sentences, or not as many hypotheses as references.
    """
    return _measure(BLEU(tokenize=tokenize, force=True), hypotheses, references)


def bleu_pretokenized(hypotheses: Sequence[str], references: Sequence[str]) -> Measure:
    """BLEU of the words as spaces part them in the text: not comparable with `bleu`.

    Raises:
      ValueError: as `bleu`.
    """
    return bleu(hypotheses, references, tokenize="none")


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Measure:
    """chrF2: the F-score, β = 2, of character n-grams up to 6.

    Raises:
      ValueError: as `bleu`.
    """
    return _measure(CHRF(), hypotheses, references)


def _measure(metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str]) -> Measure:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses, but {len(references)} references")
    if not hypotheses:
        raise ValueError("there are no sentences to score")
    # By parts, since `corpus_score` holds all resamples at once: 72 kB for each sentence.
    statistics = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    found = metric._aggregate_and_compute(statistics)
    counts, rng = np.array(statistics, np.float32), np.random.default_rng(_SEED)
    resampled = [
        metric._compute_score_from_stats(counts[rng.choice(len(counts), len(counts))].sum(0))
        for _ in range(RESAMPLES)
    ]
    if {type(one.score) for one in resampled} >= {float, np.float32}:
        for one in resampled:  # the library cannot mix the two, and a zero of its own is a float
            one.score = float(one.score)
    found.estimate_ci(resampled)
    metric.n_bootstrap, metric.seed = RESAMPLES, str(_SEED)  # for the signature
    figures = map(float, (found.score, found._mean, found._ci))
    return Measure(*figures, str(metric.get_signature()))
