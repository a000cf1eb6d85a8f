"""Batches of texts of any length in a few static shapes, so that few programs are compiled."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Batch(NamedTuple):
    """The texts of one batch."""

    members: list[int]  # indices of the texts
    filled: list[int]  # with copies of the last: a row of padding would decode to its limit
    width: int  # tokens per row


@dataclasses.dataclass(frozen=True)
class Batching:
    """The limits of a batch, chosen for memory and speed."""

    shortest: int = 16
    """Tokens of the narrowest batch; the widths double from there."""
    rows: int = 64
    """Most texts of a batch."""
    tokens: int = 4096
    """Most texts × width, for memory."""
    logits: int = 128
    """Most texts × hypotheses: more were slower, as logits are [B, W, V]."""
    scored: int = 2048
    """Most texts × width in scoring, where logits are [B, T, V]."""

    def width_of(self, length: int, most: int) -> int:
        """The narrowest of 16, 32, 64, … and `most` that holds `length` tokens.

        Raises ValueError where `length` exceeds `most`.
        """
        if length > most:
            raise ValueError(f"{length} tokens do not fit into {most}")
        width = self.shortest
        while width < length:
            width *= 2
        return min(width, most)

    def rows_to_decode(self, width: int, hypotheses: int = 1) -> int:
        """The number of texts in a full batch of decoding."""
        return max(1, min(self.rows, self.tokens // width, self.logits // hypotheses))

    def rows_to_score(self, width: int) -> int:
        """The number of pairs in a full batch of scoring."""
        return max(1, min(self.rows, self.scored // width))

    def batches(
        self, lengths: Sequence[int], most: int, rows_of: Callable[[int], int]
    ) -> Iterator[Batch]:
        """Batches of texts of similar length, short ones first; every text is in one batch.

        `rows_of(width)` is the number of rows in a full batch. Texts that do not fill a batch of
        their width go into the next width, so only the last batch is not full; it has 1, 4, 16, …
        rows. Raises ValueError where a text is longer than `most` tokens.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        widths = [self.width_of(lengths[i], most) for i in order]
        start = 0
        while start < len(order):
            end = start + 1
            # As many as fit at the width of the last one; the widths are sorted.
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
"""For words, which are short and have few symbols: one width, so one compilation."""
