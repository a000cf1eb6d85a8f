"""Subwords: text to ids and back, by a SentencePiece model."""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from experiments.checkpoints.manifest import write_durably
from experiments.data.text import chunks
from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.errors import UserError
from experiments.progress import ProgressBar

UNK = 3
"""The id of unknown text in a vocabulary that `train_subwords` made."""

MOST_LINES = 1_000_000  # to train a vocabulary on, drawn from more lines to bound the memory
MOST_CHARACTERS = 150_000_000  # of those lines; training on so many takes 3 GB
MOST_CHOSEN = 32_000  # pieces of a vocabulary without a given size
COVERAGE = 0.9999  # share of the text's characters that are pieces; others are spelled in bytes
_SPACE = "▁"  # U+2581, with which SentencePiece writes a space


class SubwordError(UserError):
    """A fault in a vocabulary, or in the text to train one on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subwords:
    """A SentencePiece model, which splits text into pieces, and the ids of the pieces.

    The id 0 is padding. A vocabulary of `train_subwords` has the ids of its SentencePiece model. An
    imported one may have another order, and more or fewer pieces than its model.

    Raises ValueError where `bos`, `eos` or `unk` is not an id, or `eos` is padding.
    """

    model: bytes
    """A SentencePiece model file. A damaged one can crash the process: see `read_model`."""
    pieces: tuple[str, ...]
    """The piece of each id."""
    bos: int
    eos: int
    unk: int

    def __post_init__(self) -> None:
        for name in ("bos", "eos", "unk"):
            if not 0 <= getattr(self, name) < self.size:
                raise ValueError(f"{name}={getattr(self, name)} is no id of {self.size} pieces")
        if self.eos == PAD:
            raise ValueError(f"eos={PAD} is the id of padding")

    @property
    def size(self) -> int:
        """The number of ids V."""
        return len(self.pieces)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the model, the pieces and the special ids."""
        numbers = json.dumps([self.pieces, self.bos, self.eos, self.unk]).encode()
        digest = hashlib.sha256(len(numbers).to_bytes(8, "little") + numbers)
        digest.update(self.model)
        return digest.hexdigest()

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _numbered(self) -> list[int] | None:
        """Our id of each of the model's ids, or None where they are the same."""
        size = self._processor.get_piece_size()
        own = tuple(map(self._processor.id_to_piece, range(size)))
        return None if own == self.pieces else [self._ids.get(p, self.unk) for p in own]

    def check(self, text: str) -> None:
        """Every text can be encoded."""

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of `text`, then `eos`; `unk` for a piece that has no id."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = list(texts)
        encoded = self._processor.encode(texts)
        if self._numbered is None:
            return [[*ids, self.eos] for ids in encoded]
        unknown = self._processor.unk_id()
        return [
            # A piece that is unknown to the model may still have an id: the two vocabularies of an
            # imported translator can share ids, while each model knows its own language only.
            [*(self._by_piece(text) if unknown in ids else map(self._numbered.__getitem__, ids)),
             self.eos]
            for text, ids in zip(texts, encoded, strict=True)
        ]  # fmt: skip

    def _by_piece(self, text: str) -> list[int]:
        pieces = self._processor.encode(text, out_type=str)
        return [self._ids.get(piece, self.unk) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first `eos`, without padding and `bos`; `unk` shows as ⁇.

        Bytes that are no UTF-8 show as U+FFFD. Raises ValueError for an unknown id.
        """
        kept = []
        for i in map(int, ids):
            if i == self.eos:
                break
            self._check(i)
            if i not in (PAD, self.bos):
                kept.append(i)
        if self._numbered is None:
            return self._processor.decode(kept)
        text = self._processor.decode_pieces([self.pieces[i] for i in kept])
        return text.replace(_SPACE, " ").strip(" ")

    def to_pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of every id, special ones too. Raises ValueError for an unknown id."""
        ids = list(map(int, ids))
        for i in ids:
            self._check(i)
        return [self.pieces[i] for i in ids]

    def _check(self, i: int) -> None:
        if not 0 <= i < self.size:
            raise ValueError(f"id {i} is outside the vocabulary of size {self.size}")

    def save(self, folder: Path, name: str) -> None:
        """Writes NAME.spm, the model, and NAME.json, the ids, into `folder`."""
        about = {"bos": self.bos, "eos": self.eos, "unk": self.unk, "pieces": self.pieces}
        about = {"spm_sha256": hashlib.sha256(self.model).hexdigest(), **about}
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / f"{name}.spm", self.model)
        content = json.dumps(about, indent=0, ensure_ascii=False) + "\n"
        write_durably(folder / f"{name}.json", content.encode())

    @classmethod
    def load(cls, folder: Path, name: str) -> "Subwords":
        """The inverse of `save`. Raises SubwordError naming a file that is missing or damaged."""
        path = folder / f"{name}.json"
        content = _read(path)
        try:
            about = json.loads(content)
            expected = about.pop("spm_sha256")
            about["pieces"] = _checked_pieces(about["pieces"])
            if {type(about[key]) for key in ("bos", "eos", "unk")} != {int}:
                raise TypeError("bos, eos and unk must be whole numbers")
            made = cls(b"", **about)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise SubwordError(f"{path}: not a vocabulary, or damaged: {why}") from None
        path = folder / f"{name}.spm"
        model = _read(path)
        if hashlib.sha256(model).hexdigest() != expected:
            raise SubwordError(f"{path}: changed since it was written (its SHA-256 differs)")
        _try_out(model, path)
        return dataclasses.replace(made, model=model)


def _checked_pieces(pieces: Any) -> tuple[str, ...]:
    if not (isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces)):
        raise TypeError("pieces must be a list of strings")
    if len(set(pieces)) != len(pieces):
        raise ValueError("a piece stands twice")
    return tuple(pieces)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SubwordError(f"{path}: {error.strerror or error}") from None


def read_model(path: Path) -> bytes:
    """Reads a SentencePiece model file, after loading it in a separate process as a test.

    Raises SubwordError naming a file that is missing, or that the library refuses or crashes on.
    """
    model = _read(path)
    _try_out(model, path)
    return model


# Text from many parts of Unicode, since the table that normalises characters may be damaged.
_TRIAL = """
import sys, sentencepiece
processor = sentencepiece.SentencePieceProcessor()
processor.LoadFromSerializedProto(sys.stdin.buffer.read())
size = processor.get_piece_size()
assert size and 0 <= processor.unk_id() < size
text = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x30000, 7)]))
for ids in processor.encode([text[i : i + 64] for i in range(0, len(text), 32)], num_threads=1):
    assert all(0 <= i < size for i in ids)
    processor.decode(ids)
for i in range(size):
    processor.id_to_piece(i), processor.decode([i])
"""


def _try_out(model: bytes, path: Path) -> None:
    """Raises SubwordError where the library fails, crashes or hangs on a model."""
    try:
        # On invalid bytes the library can abort, read beyond its tables, or never return.
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL], input=model, capture_output=True, timeout=60
        )
        why = "" if done.returncode >= 0 else f" (the library ends by signal {-done.returncode})"
    except subprocess.TimeoutExpired:
        done, why = None, " (the library does not come to an end with it)"
    if done is None or done.returncode:
        raise SubwordError(f"{path}: not a SentencePiece model, or a damaged one{why}")


def chosen_size(characters: int) -> int:
    """The number of pieces for a text of so many characters: 4 √(characters / 6), 500 to 32,000.

    The number of distinct words grows about as the root of the length (Heaps' law), and the number
    of useful pieces with it. Six characters count as a word and its space, in any script. The
    result is about 3,000 for 35,000 short pairs, and 32,000 from some 1.5 million pairs on.
    """
    return min(max(round(4 * math.sqrt(characters / 6)), 500), MOST_CHOSEN)


def _drawn(lines: Iterable[str], seed: int) -> tuple[list[str], int]:
    """(lines within the limits, each drawn with the same chance; the characters of all lines)."""
    drawn: list[str] = []
    rng, characters = random.Random(seed), 0
    for i, line in enumerate(lines):
        characters += len(line)
        if i < MOST_LINES:
            drawn.append(line)
        elif (place := int(rng.random() * (i + 1))) < MOST_LINES:
            drawn[place] = line
    if sum(map(len, drawn)) > MOST_CHARACTERS:
        rng.shuffle(drawn)
        ends = itertools.accumulate(map(len, drawn))
        drawn = [line for line, end in zip(drawn, ends, strict=True) if end <= MOST_CHARACTERS]
    return drawn, characters


def train_subwords(
    lines: Iterable[str],
    size: int | None = None,
    kind: Literal["bpe", "unigram"] = "unigram",
    seed: int = 0,
) -> Subwords:
    """A vocabulary learned from text: PAD, BOS, EOS, UNK, 256 bytes, characters and longer pieces.

    A character that is too rare to be a piece, or was never seen, is spelled in bytes of UTF-8.
    That costs 256 ids, but no text is unknown: the model can copy a name or a symbol. The text is
    not normalised, so `decode(encode(text))` is the text but for spaces: runs become one, spaces
    at the ends are dropped, and U+2581, SentencePiece's own sign, becomes a space. The same lines
    and seed give the same vocabulary; the seed draws lines where there are too many.

    Args:
      size: the number of ids. None: `chosen_size`, or fewer where the text has fewer pieces.

    Raises:
      SubwordError: no text; a size too large for the text, or too small for its characters (the
        largest or smallest possible size is named).
    """
    with ProgressBar("reading lines for the vocabulary") as bar:
        drawn, characters = _drawn(_seen(lines, bar), seed)
    if not any(map(str.strip, drawn)):
        raise SubwordError("there is no text to train a vocabulary on")
    asked = chosen_size(characters) if size is None else size
    with ProgressBar("training the vocabulary", counted=False):
        try:
            model = _train_fitting(drawn, asked, kind, exact=size is not None)
        except RuntimeError as error:
            raise SubwordError(_explained(str(error), asked)) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = tuple(map(processor.id_to_piece, range(processor.get_piece_size())))
    return Subwords(model, pieces, BOS, EOS, UNK)


def _seen(lines: Iterable[str], bar: ProgressBar) -> Iterable[str]:
    for chunk in chunks(lines, 1024):
        yield from chunk
        bar.advance(len(chunk))


def _train_fitting(lines: Sequence[str], size: int, kind: str, exact: bool) -> bytes:
    """`_train`; unless `exact`, with more pieces than `size` if the characters need them."""
    try:
        return _train(lines, size, kind, exact)
    except RuntimeError as error:
        smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if exact or not smallest:
            raise
        return _train(lines, 3 * int(smallest[1]) // 2, kind, exact)


def _train(lines: Sequence[str], size: int, kind: str, exact: bool) -> bytes:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=writer,
        model_type=kind,
        vocab_size=max(size, 9),  # smaller sizes give another error
        hard_vocab_limit=exact,  # False allows fewer pieces
        pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK,
        byte_fallback=True,
        character_coverage=COVERAGE,
        normalization_rule_name="identity",
        max_sentence_length=2**30,  # bytes; by default it leaves out lines of more than 4,192
        minloglevel=2,  # errors only, which are raised
    )  # fmt: skip
    return writer.getvalue()


def _explained(error: str, size: int) -> str:
    """SentencePiece's error as one line, without its source files and options."""
    if largest := re.search(r"too high \(\d+\).* <= (\d+)", error):
        return f"a vocabulary of {size:,} is too large for this text: at most {largest[1]}"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"a vocabulary of {size:,} is too small for this text: at least {smallest[1]} "
            "(4 special ids, 256 bytes, and each character that is not rare)"
        )
    return f"no vocabulary can be trained on this text: {error.splitlines()[0]}"
