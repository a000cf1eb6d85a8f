"""What turns text into ids and back: symbols of a vocabulary, or SentencePiece's (`Subwords`)."""

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
    """Why a text cannot be encoded."""


def shown(text: str) -> str:
    """`text` as a message shows it: quoted, and cut where it is long."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


class Tokenizer(Protocol):
    """Text to ids and back. The id 0 is padding."""

    @property
    def bos(self) -> int:
        """The id that a target begins with."""

    @property
    def eos(self) -> int:
        """The id that every text ends in."""

    @property
    def size(self) -> int:
        """The number of ids V."""

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of all that the ids mean."""

    def check(self, text: str) -> None:
        """Raises InputError where `text` has what no id stands for."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, then `eos`; InputError as `check`."""

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first `eos`."""

    def to_pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, special ones too."""


@dataclasses.dataclass(frozen=True)
class Symbols:
    """A vocabulary as a tokenizer: letters, or sounds."""

    vocabulary: Vocabulary
    spaced: bool = False
    """Symbols stand apart by spaces. False: each character is one, in lower case."""

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
