"""Sentences of all lengths in batches of a few static shapes, so that little is compiled."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

SHORTEST = 16  # tokens of the narrowest batch; each wider one is twice as wide
ROWS = 64  # sentences of a batch at most
TOKENS = 4096  # sentences times width at most, for memory
LOGITS = 128  # sentences times hypotheses at most: more were slower, and logits are [B, W, V]
SCORED = 2048  # sentences times width at most where logits are [B, T, V]


class Batch(NamedTuple):
    """What is computed together."""

    members: list[int]  # which sentences
    filled: list[int]  # the same, and copies of the last: rows of padding would babble on
    width: int  # tokens that each has room for


def width_of(length: int, most: int) -> int:
    """The narrowest of 16, 32, 64, … and `most` that holds `length` tokens.

    Raises ValueError where `most` does not.
    """
    if length > most:
        raise ValueError(f"{length} tokens do not fit into {most}")
    width = SHORTEST
    while width < length:
        width *= 2
    return min(width, most)


def rows_to_decode(width: int, hypotheses: int = 1) -> int:
    """The sentences of a full batch that is decoded."""
    return max(1, min(ROWS, TOKENS // width, LOGITS // hypotheses))


def rows_to_score(width: int) -> int:
    """The pairs of a full batch that is scored."""
    return max(1, min(ROWS, SCORED // width))


def batches(
    lengths: Sequence[int], most: int, rows_of: Callable[[int], int] = rows_to_decode
) -> Iterator[Batch]:
    """Every sentence once, those of like lengths together, short ones first.

    `rows_of` a width is the rows of a full batch. What is left of one width goes on to the next, so
    that only the last batch is not full; it has 1, 4, 16, … rows. Raises ValueError where a
    sentence is longer than `most` tokens.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    widths = [width_of(lengths[i], most) for i in order]
    start = 0
    while start < len(order):
        end = start + 1
        # As many as fit at the width of the last of them; widths only grow.
        while end < len(order) and end - start < rows_of(widths[end]):
            end += 1
        members, width = order[start:end], widths[end - 1]
        rows = 1
        while rows < len(members):
            rows *= 4
        copies = [members[-1]] * (min(rows, rows_of(width)) - len(members))
        yield Batch(members, members + copies, width)
        start = end
