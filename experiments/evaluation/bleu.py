"""BLEU and chrF by sacrebleu, with their signatures and bootstrap intervals; 0 to 100."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

RESAMPLES = 1000
_SEED = 12345  # sacrebleu's default, which an environment variable could change

Tokenize = Literal["13a", "intl", "zh", "char", "none"]
"""sacrebleu's tokenizers that need no further package and no download."""


# Scripts written without spaces between words, by the ranges of their letters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\uaa60-\uaa7f]"
)  # Thai, Lao; Tibetan; Burmese; Khmer; kana; Burmese, extended
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]")


def tokenizer_for(references: Sequence[str]) -> Tokenize:
    """The tokenizer by the script that most letters of the references are of.

    "char" for Thai, Lao, Tibetan, Burmese, Khmer and Japanese, "zh" for other text in Han
    characters, else "13a": it splits at spaces, and would take a sentence of those for a word.
    """
    text = "".join(references)
    unspaced, han = len(_UNSPACED.findall(text)), len(_HAN.findall(text))
    if 2 * (unspaced + han) <= sum(map(str.isalpha, text)):
        return "13a"
    return "char" if 20 * unspaced > han else "zh"  # Japanese has kana in every sentence


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score of a whole corpus, 0 to 100."""

    score: float
    mean: float
    """Mean over bootstrap resamples of the sentences."""
    half_width: float
    """Half the width of the interval that holds 95 % of the resamples."""
    signature: str
    """sacrebleu's signature: the settings that reproduce the number."""

    def __str__(self) -> str:
        return f"{self.score:.2f} ({self.mean:.2f} ± {self.half_width:.2f}) {self.signature}"

    def to_json(self) -> dict[str, Any]:
        """All fields, for `json.dump`."""
        return dataclasses.asdict(self)


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: Tokenize = "13a"
) -> Measure:
    """BLEU of plain text, tokenized by sacrebleu: comparable between papers.

    "13a" is for languages with spaces, "zh" for Chinese, "char" for others without spaces: see
    `tokenizer_for`.

    Raises:
      ValueError: no sentences, or not as many hypotheses as references.
    """
    return _measure(BLEU(tokenize=tokenize, force=True), hypotheses, references)


def bleu_pretokenized(hypotheses: Sequence[str], references: Sequence[str]) -> Measure:
    """BLEU of text that is split at spaces alone: not comparable with `bleu`.

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
    # Not `corpus_score`, which holds all resamples at once: 72 kB per sentence.
    statistics = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    result = metric._aggregate_and_compute(statistics)
    counts, rng = np.array(statistics, np.float32), np.random.default_rng(_SEED)
    resampled = [
        metric._compute_score_from_stats(counts[rng.choice(len(counts), len(counts))].sum(0))
        for _ in range(RESAMPLES)
    ]
    if {type(one.score) for one in resampled} >= {float, np.float32}:
        for one in resampled:  # sacrebleu cannot mix the two types, and returns a zero as a float
            one.score = float(one.score)
    result.estimate_ci(resampled)
    metric.n_bootstrap, metric.seed = RESAMPLES, str(_SEED)  # for the signature
    figures = map(float, (result.score, result._mean, result._ci))
    return Measure(*figures, str(metric.get_signature()))
