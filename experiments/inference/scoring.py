"""Log-probabilities and alignments of given pairs of source and target."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.data.pronunciations import padded
from experiments.inference.batches import Batch, Batching
from experiments.inference.generation import Done
from experiments.inference.hypotheses import Scored
from experiments.inference.search import Group, Rules, attended, log_probs

Pair = tuple[list[int], list[int]]
"""The ids of a source and of a target."""


def _arrays(
    pairs: Sequence[Pair], limits: tuple[int, int], batching: Batching
) -> Iterator[tuple[Batch, list[np.ndarray], list[np.ndarray]]]:
    """Batches of pairs by the longer side, with the arrays [B, L] of both sides, at most `limits`
    wide, and their lengths [B]."""
    lengths = [max(map(len, pair)) for pair in pairs]
    for batch in batching.batches(lengths, max(limits), batching.rows_to_score):
        sides = list(zip(*(pairs[i] for i in batch.filled), strict=True))
        arrays = [
            padded(side, min(batch.width, limit), len(side))
            for side, limit in zip(sides, limits, strict=True)
        ]
        yield batch, arrays, [np.array([len(ids) for ids in side], np.int32) for side in sides]


def score(
    groups: tuple[Group, ...], rules: Rules, pairs: Sequence[Pair], limits: tuple[int, int],
    batching: Batching, done: Done,
) -> list[Scored]:  # fmt: skip
    """ln P of each token of each pair's target."""
    scored = {}
    for batch, (source, target), (_, lengths) in _arrays(pairs, limits, batching):
        rows = np.asarray(log_probs(groups, source, target, lengths, rules=rules))
        for i, row in zip(batch.members, rows, strict=False):
            ids = pairs[i][1]
            scored[i] = Scored(tuple(ids), tuple(row[: len(ids)].tolist()))
        done(len(batch.members))
    return [scored[i] for i in range(len(pairs))]


def align(
    groups: tuple[Group, ...], rules: Rules, pairs: Sequence[Pair], limits: tuple[int, int],
    batching: Batching,
) -> list[list[int]]:  # fmt: skip
    """The source position that each target token attends to most: see `search.attended`."""
    places = {}
    for batch, arrays, lengths in _arrays(pairs, limits, batching):
        positions = np.asarray(attended(groups, *arrays, *lengths, rules=rules))
        places |= zip(batch.members, positions.tolist(), strict=False)
    return [places[i][: len(target)] for i, (_, target) in enumerate(pairs)]


def numbered_through(parts: Sequence[tuple[Pair, list[int]]], eos: int) -> list[tuple[int, int]]:
    """The links (source piece, target piece) of a source in parts, numbered across the parts.

    Each part is its pair of ids with the positions of `align`; end symbols are left out.
    """
    links, before = [], (0, 0)
    for (source, target), places in parts:
        pieces = len(source) - 1, len(target) - (target[-1:] == [eos])
        if pieces[0]:  # an empty source has no piece to align to
            own = enumerate(itertools.islice(places, pieces[1]))
            links += [(before[0] + i, before[1] + j) for j, i in own]
        before = before[0] + pieces[0], before[1] + pieces[1]
    return links
