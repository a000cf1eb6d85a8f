"""Texts of all lengths in batches of a few static shapes, so that little is compiled."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Batch(NamedTuple):
    """What is computed together."""

    members: list[int]  # which texts
    filled: list[int]  # the same, and copies of the last: rows of padding would babble on
    width: int  # tokens that each has room for


@dataclasses.dataclass(frozen=True)
class Batching:
    """How many texts, and how long ones, are computed together: by memory and speed."""

    shortest: int = 16
    """Tokens of the narrowest batch; each wider one is twice as wide."""
    rows: int = 64
    """Texts of a batch at most."""
    tokens: int = 4096
    """Texts times width at most, for memory."""
    logits: int = 128
    """Texts times hypotheses at most: more were slower, and logits are [B, W, V]."""
    scored: int = 2048
    """Texts times width at most where logits are [B, T, V]."""

    def width_of(self, length: int, most: int) -> int:
        """The narrowest of 16, 32, 64, … and `most` that holds `length` tokens.

        Raises ValueError where `most` does not.
        """
        if length > most:
            raise ValueError(f"{length} tokens do not fit into {most}")
        width = self.shortest
        while width < length:
            width *= 2
        return min(width, most)

    def rows_to_decode(self, width: int, hypotheses: int = 1) -> int:
        """The texts of a full batch that is decoded."""
        return max(1, min(self.rows, self.tokens // width, self.logits // hypotheses))

    def rows_to_score(self, width: int) -> int:
        """The pairs of a full batch that is scored."""
        return max(1, min(self.rows, self.scored // width))

    def batches(
        self, lengths: Sequence[int], most: int, rows_of: Callable[[int], int]
    ) -> Iterator[Batch]:
        """Every text once, those of like lengths together, short ones first.

        `rows_of` a width is the rows of a full batch. What is left of one width goes on to the
        next, so that only the last batch is not full; it has 1, 4, 16, … rows. Raises ValueError
        where a text is longer than `most` tokens.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        widths = [self.width_of(lengths[i], most) for i in order]
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


SENTENCES = Batching()
WORDS = Batching(shortest=64, rows=512, tokens=1 << 15, logits=1 << 13, scored=1 << 15)
"""Where texts are short and symbols few: one width, and so one compilation."""
