"""Results of inference: hypotheses, and the log-probabilities of given targets."""

import dataclasses
import itertools
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A target. Where a source was taken in parts, `parts` has their hypotheses."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, each part's end symbol included."""
    score: float
    """The ranking score: ln P / lp(n); for a sample, ln P; for parts, the sum."""
    log_prob: float
    """ln P(tokens | source), forced tokens included."""
    ended: bool = True
    """False where there was no end symbol within the longest target."""
    parts: tuple["Hypothesis", ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """A given target with the model's log-probabilities."""

    ids: tuple[int, ...]
    """Its tokens, the end symbol included."""
    log_probs: tuple[float, ...]
    """ln P of each token, given the source and the tokens before it."""

    @property
    def log_prob(self) -> float:
        """ln P of the whole target."""
        return math.fsum(self.log_probs)


def joined(parts: Sequence[Hypothesis]) -> Hypothesis:
    """Joins the targets of a source's parts."""
    if len(parts) == 1:
        return parts[0]
    return Hypothesis(
        text=" ".join(part.text for part in parts if part.text),
        ids=tuple(itertools.chain.from_iterable(part.ids for part in parts)),
        score=math.fsum(part.score for part in parts),
        log_prob=math.fsum(part.log_prob for part in parts),
        ended=all(part.ended for part in parts),
        parts=tuple(parts),
    )


def best_of_parts(parts: Sequence[list[Hypothesis]], n: int) -> list[Hypothesis]:
    """The n combinations of the parts' hypotheses with the largest sum of scores."""
    best: list[tuple[float, tuple | None]] = [(0.0, None)]  # (score, (chain before, last))
    for hypotheses in parts:
        longer = [(score + h.score, (before, h)) for score, before in best for h in hypotheses]
        best = sorted(longer, key=lambda one: -one[0])[:n]
    return [joined(_in_order(last)) for _, last in best]


def _in_order(last: tuple | None) -> list[Hypothesis]:
    """The hypotheses of a chain (chain before, last hypothesis), first to last."""
    parts = []
    while last is not None:
        last, hypothesis = last
        parts.append(hypothesis)
    return parts[::-1]


def pharaoh(links: Sequence[tuple[int, int]]) -> str:
    """An alignment in the Pharaoh format: `i-j` for source piece i and target piece j."""
    return " ".join(f"{i}-{j}" for i, j in links)
