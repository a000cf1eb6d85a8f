"""Splits texts that are longer than a model was trained for."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from experiments.data.tokenizer import InputError

# Where to cut a text, best first; punctuation stays with the part that it ends.
SENTENCES = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’»)\]])\s+|(?<=[。！？])(?![”’」』）])\s*")
CLAUSES = re.compile(r"(?<=[,;:–—])\s+|(?<=[，；：、])")
WORDS = re.compile(r"\s+")


class TooLongError(InputError):
    """A text has more tokens than the model was trained for."""


def _packed(pieces: list[str], tokens: list[int], most: int) -> list[str]:
    """Joins neighbouring pieces up to `most` tokens; the end symbol of a group counts once."""
    packed, room = [], 0
    for piece, count in zip(pieces, tokens, strict=True):
        if packed and count - 1 <= room:
            packed[-1] += piece
            room -= count - 1
        else:
            packed.append(piece)
            room = most - count
    return packed


def parts_of(
    text: str,
    count: Callable[[list[str]], list[int]],
    most: int,
    levels: Sequence[re.Pattern] = (SENTENCES, CLAUSES, WORDS),
) -> list[str]:
    """Splits `text` into parts of at most `most` tokens by `count`, without dropping any text.

    A part is a sentence. A sentence that is too long is cut after commas and similar marks, into as
    few parts as possible; else between words, else between characters.

    Raises TooLongError where a single character is too long.
    """
    if count([text])[0] <= most:
        return [text.strip()]
    if levels:
        level, *rest = levels
        places = [0, *(place.end() for place in level.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(places) if text[a:b].strip()]
        if level is not SENTENCES:
            pieces = _packed(pieces, count(pieces), most)
    else:
        rest, middle = (), len(text) // 2
        if not middle:
            raise TooLongError(f"{text!r} alone is more than {most} tokens")
        pieces = [piece for piece in (text[:middle], text[middle:]) if piece.strip()]
    return [part for piece in pieces for part in parts_of(piece, count, most, rest)]
