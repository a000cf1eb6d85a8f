"""Edit distance, and the error rates and confusions based on it."""

from collections import Counter
from collections.abc import Sequence

GAP = "∅"
"""stands for the missing side of an insertion or deletion in `confusions`"""


def _table(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """d[i][j] = the edit distance of a[:i] and b[:j].

    d[i][j] = min(d[i-1][j] + 1, d[i][j-1] + 1, d[i-1][j-1] + [a_i ≠ b_j])
    """
    table = [list(range(len(b) + 1))]
    for i, x in enumerate(a, start=1):
        above, row = table[-1], [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
        table.append(row)
    return table


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions that turn `a` into `b`."""
    return _table(a, b)[-1][-1]


def edit_operations(
    hypothesis: Sequence[str], reference: Sequence[str]
) -> list[tuple[str | None, str | None]]:
    """A shortest alignment, as (reference, hypothesis) pairs from left to right.

    (None, x) is an insertion, (x, None) a deletion; pairs of unequal symbols substitutions.
    """
    table = _table(hypothesis, reference)
    i, j = len(hypothesis), len(reference)
    pairs: list[tuple[str | None, str | None]] = []
    while i or j:
        different = i and j and hypothesis[i - 1] != reference[j - 1]
        if i and j and table[i][j] == table[i - 1][j - 1] + different:
            i, j = i - 1, j - 1
            pairs.append((reference[j], hypothesis[i]))
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
            pairs.append((None, hypothesis[i]))
        else:
            j -= 1
            pairs.append((reference[j], None))
    return pairs[::-1]


def closest_reference(
    hypothesis: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[int, Sequence[str]]:
    """(distance, reference) of the closest reference, the first of equally close ones."""
    distances = [edit_distance(hypothesis, reference) for reference in references]
    best = distances.index(min(distances))
    return distances[best], references[best]


def _check_pairs(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> None:
    """ValueError where the lengths differ, there are no words, or a word has no reference."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses, but {len(references)} words to score")
    if not references or not all(references):
        raise ValueError("nothing to score against: every word needs a reference")


def word_error_rate(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> float:
    """The fraction of words whose hypothesis equals none of its references."""
    _check_pairs(hypotheses, references)
    wrong = sum(
        all(list(hypothesis) != list(reference) for reference in alternatives)
        for hypothesis, alternatives in zip(hypotheses, references, strict=True)
    )
    return wrong / len(references)


def phone_error_rate(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> float:
    """Σ distance to the closest reference / Σ length of that reference (a fraction)."""
    _check_pairs(hypotheses, references)
    closest = [closest_reference(h, r) for h, r in zip(hypotheses, references, strict=True)]
    return sum(d for d, _ in closest) / sum(len(reference) for _, reference in closest)


def confusions(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> Counter[tuple[str, str]]:
    """The count of each aligned (reference, hypothesis) pair of unequal phones; ∅ is a gap."""
    _check_pairs(hypotheses, references)
    counts: Counter[tuple[str, str]] = Counter()
    for hypothesis, alternatives in zip(hypotheses, references, strict=True):
        _, reference = closest_reference(hypothesis, alternatives)
        for expected, got in edit_operations(hypothesis, reference):
            if expected != got:
                counts[GAP if expected is None else expected, GAP if got is None else got] += 1
    return counts
