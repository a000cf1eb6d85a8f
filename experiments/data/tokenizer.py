"""Tokenizers: text to ids and back, by symbols of a vocabulary or by SentencePiece (`Subwords`)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Protocol

from experiments.data.vocabulary import BOS, EOS, Vocabulary
from experiments.errors import UserError

SHOWN = 60  # characters of a text in a message


class InputError(UserError):
    """A text cannot be encoded; the message says why."""


def shown(text: str) -> str:
    """`text` for a message: quoted, and truncated where it is long."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


class Tokenizer(Protocol):
    """Text to ids and back. The id 0 is padding."""

    @property
    def bos(self) -> int:
        """The id of the start symbol."""

    @property
    def eos(self) -> int:
        """The id of the end symbol."""

    @property
    def size(self) -> int:
        """The number of ids V."""

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the whole vocabulary; equal where all ids mean the same."""

    def check(self, text: str) -> None:
        """Raises InputError where `text` is empty or has a symbol without an id."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, then `eos`; InputError as `check`."""

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first `eos`."""

    def to_pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id, special ones included."""


@dataclasses.dataclass(frozen=True)
class Symbols:
    """A vocabulary as a tokenizer: letters, or sounds."""

    vocabulary: Vocabulary
    spaced: bool = False
    """Symbols are separated by spaces. False: each character is a symbol, in lower case."""

    bos, eos = BOS, EOS

    @property
    def size(self) -> int:
        return self.vocabulary.size

    @functools.cached_property
    def sha256(self) -> str:
        meaning = json.dumps([self.vocabulary.to_json(), self.spaced])
        return hashlib.sha256(meaning.encode()).hexdigest()

    def _symbols(self, text: str) -> list[str]:
        return text.split() if self.spaced else [*text.lower()]

    def check(self, text: str) -> None:
        symbols = self._symbols(text)
        if not symbols:
            raise InputError("an empty text")
        if unknown := [symbol for symbol in symbols if symbol not in self.vocabulary]:
            kind = "symbol" if self.spaced else "character"
            raise InputError(f"{shown(text)}: unknown {kind} {unknown[0]!r}")

    def encode(self, text: str) -> list[int]:
        self.check(text)
        return self.vocabulary.encode(self._symbols(text))

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return (" " if self.spaced else "").join(self.vocabulary.decode(ids))

    def to_pieces(self, ids: Iterable[int]) -> list[str]:
        return [self.vocabulary.piece(i) for i in ids]
