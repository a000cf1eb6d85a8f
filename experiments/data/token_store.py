"""Token ids on disk, written once and mapped into memory, and packed batches of them.

A store is a folder. For each side it has the concatenated ids of all sentences and the offset of
each. A manifest has the SHA-256 of each file and a record of what the store was made from. The
system loads and drops pages of the mapped files as needed. A training keeps 4 bytes per pair and 8
per packed row in memory; planning the rows takes 24 bytes per pair: 240 MB for ten million pairs.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from experiments.checkpoints.manifest import (
    NAME,
    DamagedError,
    sha256,
    verify_manifest,
    write_manifest,
)
from experiments.data.cleaning import Clean
from experiments.data.packing import endless_batches, fit_rows, pack
from experiments.data.subwords import Subwords
from experiments.data.text import CorpusError, chunks
from experiments.errors import UserError
from experiments.progress import ProgressBar

_SIDES = ("source", "target")
_OFFSET = np.dtype("<i8")
_CHUNK = 2**13  # pairs that are encoded together
_FORMAT = 1


class StoreError(UserError):
    """A fault in a store; the message names the folder, and the file or the fact."""


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The sentences of one language, as ids that end in the end symbol."""

    ids: np.ndarray
    """[tokens] of all sentences, mapped from disk."""
    offsets: np.ndarray
    """[N + 1] int64: where each sentence begins, and where the last one ends; mapped from disk."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """[length]: the ids of sentence `i`."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self, chosen: np.ndarray) -> np.ndarray:
        """[n] int64: the number of ids of each of the chosen sentences."""
        return self.offsets[chosen + 1] - self.offsets[chosen]


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """The encoded pairs of a corpus."""

    source: Side
    target: Side
    facts: dict[str, Any]
    """`made_from`, `cleaned` (the counts, as JSON), `longest` (ids of the longest sentences)."""
    sha256: str
    """Of the manifest, and so of all ids and of what they were made from."""

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.source)

    @property
    def tokens(self) -> tuple[int, int]:
        """The number of ids of each side, end symbols included."""
        return len(self.source.ids), len(self.target.ids)


def made_from(
    clean: Clean,
    source: Subwords,
    target: Subwords,
    tokens: tuple[int, int],
    corpora: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides the content of a store, as JSON; `corpora` has the SHA-256s of the text."""
    facts = {
        "format": _FORMAT,
        "corpora": dict(corpora),
        "limits": dataclasses.asdict(clean.limits),
        "tokens": list(tokens),
        "vocabulary_sha256": {"source": source.sha256, "target": target.sha256},
    }
    return json.loads(json.dumps(facts))


def write_store(
    folder: Path,
    clean: Clean,
    source: Subwords,
    target: Subwords,
    tokens: tuple[int, int],
    corpora: Mapping[str, Any],
) -> Store:
    """Encodes a corpus into `folder`; earlier content is replaced once the new one is complete.

    Args:
      tokens: the most ids of a source and of a target, end symbols included; pairs with more are
        left out and counted in `facts["cleaned"]`.
      corpora: the `identity()` of the corpus and of the texts held out of it.

    Raises:
      CorpusError: of the corpus, or no pair is left.
      StoreError: the system refuses to write.
    """
    facts = {"made_from": made_from(clean, source, target, tokens, corpora)}
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted process
        partial.mkdir(parents=True)
        facts |= _encode(partial, clean, (source, target), tokens)
        write_manifest(partial, facts)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(folder)


def _id_type(vocabulary: Subwords) -> np.dtype:
    return np.dtype("<u2" if vocabulary.size <= 2**16 else "<i4")


def _encode(
    folder: Path, clean: Clean, vocabularies: tuple[Subwords, Subwords], tokens: tuple[int, int]
) -> dict[str, Any]:
    """Writes ids and offsets of both sides; returns the counts, longest lengths and id types."""
    most, longest = np.array(tokens), np.zeros(2, np.int64)
    ends, pairs = np.zeros(2, np.int64), 0
    known = clean.cleaned.kept or None  # known if the corpus was read before, for the vocabulary
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(ProgressBar("encoding pairs", known, first_counts=True))
        ids, offsets = (
            [stack.enter_context((folder / f"{side}.{kind}").open("xb")) for side in _SIDES]
            for kind in ("ids", "offsets")
        )
        for file in offsets:
            file.write(np.zeros(1, _OFFSET).tobytes())
        for chunk in chunks(clean, _CHUNK):
            texts = zip(*chunk, strict=True)
            encoded = [v.encode_all(side) for v, side in zip(vocabularies, texts, strict=True)]
            lengths = np.array([[len(s) for s in side] for side in encoded])  # [2, pairs]
            fits = (lengths <= most[:, None]).all(axis=0)
            lengths = lengths[:, fits]
            pairs += lengths.shape[1]
            longest = np.maximum(longest, lengths.max(axis=1, initial=0))
            for i, vocabulary in enumerate(vocabularies):
                kept = [id for j in np.flatnonzero(fits) for id in encoded[i][j]]
                ids[i].write(np.array(kept, _id_type(vocabulary)).tobytes())
                offsets[i].write((ends[i] + np.cumsum(lengths[i])).astype(_OFFSET).tobytes())
            ends += lengths.sum(axis=1)
            bar.advance(len(chunk))
    cleaned = clean.cleaned
    cleaned = dataclasses.replace(
        cleaned, tokens=tuple(tokens), too_many_tokens=cleaned.kept - pairs
    )
    if not pairs:
        raise CorpusError(f"no pair is left to train on: {cleaned}")
    return {
        "cleaned": cleaned.to_json(),
        "longest": longest.tolist(),
        "id_types": [_id_type(vocabulary).str for vocabulary in vocabularies],
    }


def open_store(folder: Path, expected: Mapping[str, Any] | None = None) -> Store:
    """Opens a store, after comparing every byte with its manifest.

    Args:
      expected: `made_from` that the store must have. None: any.

    Raises:
      StoreError: naming a file that is missing, changed or unknown, or the part of `expected` that
        differs.
    """
    try:
        facts = verify_manifest(folder)
        recorded = facts["made_from"]
        for name, value in (expected or recorded).items():
            if name not in recorded or recorded[name] != value:
                raise StoreError(f"{folder}: made from other {name.replace('_', ' ')}")
        sides = [
            Side(
                _mapped(folder / f"{side}.ids", np.dtype(id_type)),
                _mapped(folder / f"{side}.offsets", _OFFSET),
            )
            for side, id_type in zip(_SIDES, facts["id_types"], strict=True)
        ]
        return Store(*sides, facts, sha256(folder / NAME))
    except DamagedError as error:
        raise StoreError(f"{folder}: {error}") from None
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}: not a store of token ids ({error})") from None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    # As a plain array, which is sliced four times as fast as np.memmap.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def fetch_store(
    folder: Path,
    clean: Clean,
    source: Subwords,
    target: Subwords,
    tokens: tuple[int, int],
    corpora: Mapping[str, Any],
) -> tuple[Store, str]:
    """Opens the store in `folder`, or writes it where it is missing, damaged, or of other data.

    Returns the store, and why it was written ("" where it was opened).

    Raises:
      CorpusError, StoreError: as `write_store`.
    """
    wanted = (clean, source, target, tokens, corpora)
    try:
        return open_store(folder, made_from(*wanted)), ""
    except StoreError as error:
        why = str(error) if folder.exists() else f"{folder}: not there yet"
    return write_store(folder, *wanted), why


# ---- batches


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which pairs share a packed row."""

    members: np.ndarray
    """[N] int32: the pairs, row by row."""
    starts: np.ndarray
    """[rows + 1] int64: where each row begins in `members`."""
    source_length: int
    target_length: int
    seed: int

    def __len__(self) -> int:
        """The number of rows: those of an epoch."""
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """[n] int32: the pairs of a row, in order."""
        return self.members[self.starts[row] : self.starts[row + 1]]


def plan_rows(store: Store, *, source_length: int, target_length: int, seed: int) -> Plan:
    """Packs all pairs, in a random order by the seed, into rows of S source and T target ids.

    It reads the offsets only, not the ids: about a second per million pairs.

    Raises:
      ValueError: a sentence longer than a row; it is never cut.
    """
    for side, longest, length in zip(
        _SIDES, store.facts["longest"], (source_length, target_length), strict=True
    ):
        if longest > length:
            raise ValueError(
                f"{side}_length={length} is less than the longest {side} of the store, {longest}"
            )
    order = np.random.default_rng(seed).permutation(len(store)).astype(np.int32)
    lengths = _lengths(store, order)
    rows = np.fromiter(
        fit_rows(lengths, (source_length, target_length)), np.int32, count=len(store)
    )
    members = order[np.argsort(rows, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Plan(members, starts, source_length, target_length, seed)


def _lengths(store: Store, order: np.ndarray) -> Iterator[tuple[int, int]]:
    for start in range(0, len(order), 2**16):
        chosen = order[start : start + 2**16]
        sides = (side.lengths(chosen).tolist() for side in (store.source, store.target))
        yield from zip(*sides, strict=True)


def stored_batches(
    store: Store, plan: Plan, *, rows: int, own: slice = slice(None)
) -> grain.DatasetIterator:
    """Endless batches of `rows` of the plan's rows, in a new order each epoch.

    The same batches as `packing.packed_batches` of the same pairs and seed, but read from disk:
    int32 [rows, S] `source`, `source_segment_ids`, `source_positions`, and [rows, T] of the target.
    `get_state` and `set_state` resume exactly.
    """

    def load(chosen: np.ndarray) -> dict[str, np.ndarray]:
        members = [plan[row].tolist() for row in chosen]
        arrays = {}
        for name, length in (("source", plan.source_length), ("target", plan.target_length)):
            names = (name, f"{name}_segment_ids", f"{name}_positions")
            packed = pack(getattr(store, name), members, length)
            arrays |= dict(zip(names, packed, strict=True))
        return arrays

    return endless_batches(len(plan), load, rows=rows, seed=plan.seed, own=own)
