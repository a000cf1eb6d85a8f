"""Symbols and their ids."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
_FIRST = 3  # the id of the first symbol, after the three special ids


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A bijection between symbols and the ids 3, 4, …; 0, 1, 2 are <pad>, <s>, </s>.

    Raises ValueError where a symbol is repeated, since its id would not be unique.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.symbols)) != len(self.symbols):
            twice = sorted({s for s in self.symbols if self.symbols.count(s) > 1})
            raise ValueError(f"symbols of a vocabulary must be distinct, repeated: {twice}")

    @classmethod
    def of(cls, sequences: Iterable[Sequence[str]]) -> "Vocabulary":
        """The vocabulary of the distinct symbols in `sequences`, sorted."""
        return cls(tuple(sorted({symbol for sequence in sequences for symbol in sequence})))

    @property
    def size(self) -> int:
        """The number of ids V, the three special ones included."""
        return _FIRST + len(self.symbols)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: _FIRST + i for i, symbol in enumerate(self.symbols)}

    def encode(self, symbols: Sequence[str]) -> list[int]:
        """The ids of `symbols`, then EOS; ValueError names the first unknown symbol."""
        try:
            return [self._ids[symbol] for symbol in symbols] + [EOS]
        except KeyError as error:
            raise ValueError(f"unknown symbol {error.args[0]!r}") from None

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The symbols up to the first EOS, without PAD and BOS; ValueError for an unknown id."""
        symbols = []
        for i in map(int, ids):
            if i == EOS:
                break
            symbol = self.piece(i)
            if i >= _FIRST:
                symbols.append(symbol)
        return symbols

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._ids

    def piece(self, i: int) -> str:
        """The symbol of an id; ValueError for an unknown id."""
        if not 0 <= i < self.size:
            raise ValueError(f"id {i} is outside the vocabulary of size {self.size}")
        return SPECIAL[i] if i < _FIRST else self.symbols[i - _FIRST]

    def to_json(self) -> list[str]:
        """The symbols in the order of their ids, for `json.dump`."""
        return list(self.symbols)

    @classmethod
    def from_json(cls, symbols: list[str]) -> "Vocabulary":
        """The inverse of `to_json`."""
        return cls(tuple(symbols))
