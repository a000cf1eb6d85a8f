"""Filters parallel text for training, and counts what is left out."""

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from experiments.data.text import CorpusError, Pair, chunks

_CHUNK = 2**14  # pairs that are cleaned together
_SLACK = 20  # added to both lengths before comparison, as short sentences vary more


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits on a pair of sentences to train on."""

    characters: int = 2000
    """Most characters on a side. A limit in tokens follows once there is a vocabulary."""
    ratio: float = 3.0
    """Most times that one side may be as long as the other, after adding 20 to both. A pair is left
    out where its characters and its bytes of UTF-8 both exceed it: Chinese says much in a
    character, and Burmese or Tamil take three bytes for each."""

    def __post_init__(self) -> None:
        if self.characters < 1:
            raise ValueError(f"characters={self.characters} must be at least 1")
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio} must be at least 1 and finite")


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """The number of pairs read, and of pairs left out by reason; each pair counts once."""

    limits: Limits
    pairs: int = 0
    empty: int = 0
    """A side with nothing but whitespace."""
    too_long: int = 0
    """More characters than the limit."""
    ratio: int = 0
    """One side is too much longer than the other, in characters and in bytes."""
    held_out: int = 0
    """The pair is in the validation or test data, too."""
    duplicates: int = 0
    """The same pair came before."""
    too_many_tokens: int = 0
    """More tokens than the limit, counted when the text is encoded."""
    tokens: tuple[int, int] | None = None
    """The limit in tokens of source and target, end symbols included."""

    @property
    def kept(self) -> int:
        """The pairs to train on."""
        left_out = self.empty + self.too_long + self.ratio + self.held_out + self.duplicates
        return self.pairs - left_out - self.too_many_tokens

    def __str__(self) -> str:
        reasons = {
            "empty": self.empty,
            f"over {self.limits.characters:,} characters": self.too_long,
            f"of a length ratio over {self.limits.ratio:g}": self.ratio,
            "in the validation or test data": self.held_out,
            "duplicates": self.duplicates,
        }
        if self.tokens:
            reasons["over {}+{} tokens".format(*self.tokens)] = self.too_many_tokens
        left_out = ", ".join(f"{count:,} {why}" for why, count in reasons.items() if count)
        return f"{self.pairs:,} pairs, {self.kept:,} kept; left out: {left_out or 'none'}"

    def to_json(self) -> dict[str, Any]:
        """All counts and limits, for `json.dump`."""
        return dataclasses.asdict(self) | {"kept": self.kept}

    @classmethod
    def from_json(cls, counts: dict[str, Any]) -> "Cleaned":
        """The inverse of `to_json`."""
        fields = {name: value for name, value in counts.items() if name != "kept"}
        return cls(**fields | {"limits": Limits(**counts["limits"])})


class Clean:
    """The pairs of a corpus that pass the limits, in order; itself a corpus.

    Duplicates are found by a hash of 64 bits: 8 bytes a pair (16 at times), 80 MB for ten million
    pairs. The chance that two different pairs among those have the same hash is 3 in a million.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        limits: Limits | None = None,
        held_out: Iterable[Pair] = (),
    ) -> None:
        self._pairs, self.limits = pairs, limits or Limits()
        self._held_out = _keys(held_out)
        self.cleaned = Cleaned(self.limits)
        """The counts of the last full iteration."""

    def __iter__(self) -> Iterator[Pair]:
        """Raises CorpusError at the end where no pair was left, with the counts."""
        counts: collections.Counter[str] = collections.Counter()
        seen = _Seen()
        for chunk in chunks(self._pairs, _CHUNK):
            faults = [_fault(*pair, self.limits) for pair in chunk]
            counts.update(pairs=len(chunk))
            counts.update(filter(None, faults))
            sound = [pair for pair, fault in zip(chunk, faults, strict=True) if not fault]
            keys = _keys(sound)
            fresh = ~np.isin(keys, self._held_out)
            counts.update(held_out=int((~fresh).sum()))
            first = seen.add(keys[fresh])
            counts.update(duplicates=int((~first).sum()))
            fresh[fresh] = first
            yield from itertools.compress(sound, fresh.tolist())
        self.cleaned = Cleaned(self.limits, **counts)
        if not self.cleaned.kept:
            raise CorpusError(f"no pair is left to train on: {self.cleaned}")


def _fault(source: str, target: str, limits: Limits) -> str | None:
    """The field of `Cleaned` that counts this pair's fault, or None where it has none."""
    if not (source.strip() and target.strip()):
        return "empty"
    if max(len(source), len(target)) > limits.characters:
        return "too_long"
    lengths = (len(source), len(target)), (len(source.encode()), len(target.encode()))
    uneven = all(max(both) + _SLACK > limits.ratio * (min(both) + _SLACK) for both in lengths)
    return "ratio" if uneven else None


def _keys(pairs: Iterable[Pair]) -> np.ndarray:
    """[N] uint64: a hash of each pair, without the whitespace around its sides."""
    digests = b"".join(
        # No text contains a NUL, so it can separate the sides.
        hashlib.blake2b(f"{source.strip()}\0{target.strip()}".encode(), digest_size=8).digest()
        for source, target in pairs
    )
    return np.frombuffer(digests, "<u8")


class _Seen:
    """A growing set of 64-bit keys, 8 bytes each: sorted arrays, each half as long as the last.

    Python's own set would take some 80 bytes a key.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds the keys; returns [N] bool, which of them are new."""
        unique, first = np.unique(keys, return_index=True)
        fresh = np.ones(len(unique), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            fresh &= run[places] != unique
        mask = np.zeros(len(keys), bool)
        mask[first[fresh]] = True
        new = unique[fresh]
        while self._runs and len(self._runs[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self._runs.pop(), new]))
        if len(new):
            self._runs.append(new)
        return mask
