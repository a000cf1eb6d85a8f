"""What a model answers: hypotheses, and how likely it finds given targets."""

import dataclasses
import itertools
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A target that a model makes of a source. Of a source in parts, `parts` are theirs."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, each part's end symbol included."""
    score: float
    """What hypotheses are ranked by: ln P / lp(n); of a sample, ln P. Of parts, the sum."""
    log_prob: float
    """ln P(tokens | source), forced tokens included."""
    ended: bool = True
    """False where no end symbol came within the most tokens that a target may have."""
    parts: tuple["Hypothesis", ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """A given target, with its probabilities."""

    ids: tuple[int, ...]
    """Its tokens, the end symbol included."""
    log_probs: tuple[float, ...]
    """ln P of each, given the source and those before it."""

    @property
    def log_prob(self) -> float:
        """ln P of all."""
        return math.fsum(self.log_probs)


def joined(parts: Sequence[Hypothesis]) -> Hypothesis:
    """The target of a source out of those of its parts."""
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


def best_of_parts(found: Sequence[list[Hypothesis]], n: int) -> list[Hypothesis]:
    """The n best targets of a source, each part's in any rank, by the sum of the scores."""
    best: list[tuple[float, tuple | None]] = [(0.0, None)]  # (score, (what came before, the last))
    for hypotheses in found:
        longer = [(score + h.score, (before, h)) for score, before in best for h in hypotheses]
        best = sorted(longer, key=lambda one: -one[0])[:n]
    return [joined(_in_order(last)) for _, last in best]


def _in_order(last: tuple | None) -> list[Hypothesis]:
    """The hypotheses of a chain of (what came before, the last)."""
    parts = []
    while last is not None:
        last, hypothesis = last
        parts.append(hypothesis)
    return parts[::-1]


def pharaoh(links: Sequence[tuple[int, int]]) -> str:
    """An alignment as the field writes it: `i-j` for source piece i and target piece j."""
    return " ".join(f"{i}-{j}" for i, j in links)
