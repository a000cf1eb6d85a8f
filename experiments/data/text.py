"""Parallel text, read a pair at a time.

A corpus is an iterable of (source, target) pairs that can be iterated over several times, so that a
corpus larger than memory can be read again. Only training text is cleaned (see `cleaning`). Text
for validation or testing is `list(Files(…))`: no pair is left out, and an empty line is scored like
any other sentence, so that the lines of all files correspond.
"""

import dataclasses
import functools
import gzip
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from experiments.checkpoints.manifest import sha256
from experiments.errors import UserError

Pair = tuple[str, str]

_LONGEST = 2**24  # bytes of a line: a file without line ends must not fill the memory
_Item = TypeVar("_Item")


class CorpusError(UserError):
    """A fault in parallel text; the message names file and line, or gives counts."""


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """The items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain or gzip file, without their ends and a byte order mark at the start."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CorpusError(f"{path}: not a plain file, and a corpus is read more than once")
    number = 0
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"  # never the start of UTF-8 text
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            # Bytes, split on \n alone: text-mode splitting also breaks at U+2028, U+0085, \x0b …
            for line in iter(functools.partial(stream.readline, _LONGEST), b""):
                number += 1
                if len(line) == _LONGEST:
                    raise CorpusError(f"{path}:{number}: a line of more than {_LONGEST:,} bytes")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield line.removesuffix(b"\n").removesuffix(b"\r")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path}: damaged gzip after line {number:,}: {error}") from None
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror or error}") from None
    if not number:
        raise CorpusError(f"{path}: no lines in it")


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise CorpusError(f"{path}:{number}: invalid UTF-8") from None
    if "\0" in text:
        raise CorpusError(f"{path}:{number}: a NUL byte in it (UTF-16 text has many)")
    return text


@dataclasses.dataclass(frozen=True)
class Files:
    """A corpus in two files, one sentence a line, or in one file of lines `source<TAB>target`.

    UTF-8, plain or gzip (detected by content); a byte order mark and CRLF are tolerated. Iterating
    raises CorpusError: "path:LINE: why" for a line, "path: why" for a file, and both counts where
    two files differ in length (at the end, since they are read in parallel).
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        if len(self.paths) not in (1, 2):
            raise CorpusError(
                "parallel text is two files, SOURCE TARGET, or one of tab-separated lines, "
                f"not {len(self.paths)}"
            )

    def __iter__(self) -> Iterator[Pair]:
        return self._from_two(*self.paths) if len(self.paths) == 2 else self._from_one(*self.paths)

    @staticmethod
    def _from_two(source: Path, target: Path) -> Iterator[Pair]:
        lines = _raw_lines(source), _raw_lines(target)
        for number, sides in enumerate(itertools.zip_longest(*lines), start=1):
            if None in sides:
                rest = sum(1 for side in lines for _ in side)
                counts = [number - 1 if side is None else number + rest for side in sides]
                raise CorpusError(
                    f"{source} has {counts[0]:,} lines and {target} {counts[1]:,}: "
                    "line for line, they must be the same sentences"
                )
            yield _decoded(sides[0], source, number), _decoded(sides[1], target, number)

    @staticmethod
    def _from_one(path: Path) -> Iterator[Pair]:
        for number, line in enumerate(_raw_lines(path), start=1):
            parts = _decoded(line, path, number).split("\t")
            if len(parts) != 2:
                raise CorpusError(
                    f"{path}:{number}: {len(parts) - 1} tabs, where one must part the source "
                    "from the target"
                )
            yield parts[0], parts[1]

    def identity(self) -> dict[str, str]:
        """The SHA-256 of each file. Raises CorpusError where one cannot be read."""
        names = ("source", "target") if len(self.paths) == 2 else ("pairs",)
        try:
            return {name: sha256(path) for name, path in zip(names, self.paths, strict=True)}
        except OSError as error:
            raise CorpusError(f"{error.filename}: {error.strerror or error}") from None


@dataclasses.dataclass(frozen=True)
class Hub:
    """A corpus of the Hugging Face hub, or in a local folder that the library `datasets` reads.

    The texts are the columns `source` and `target`, or those entries of a column `translation`.
    Line ends inside a text become spaces and a missing text is empty. Iterating raises CorpusError:
    no library, no network, no such data or column.
    """

    name: str
    source: str | None = None
    """Column or language. None: the first of two."""
    target: str | None = None
    """Column or language. None: the second of two."""
    split: str = "train"
    subset: str | None = None

    @functools.cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise CorpusError(
                f"dataset {self.name}: reading it needs a library: pip install datasets"
            ) from None
        try:
            # Not streamed: the library then keeps a copy on disk, which is read several times.
            return datasets.load_dataset(self.name, self.subset, split=self.split)
        except Exception as error:  # whatever the library and the network below it may raise
            first = next(filter(None, map(str.strip, str(error).split("\n"))), "")
            raise CorpusError(f"dataset {self.name}: {type(error).__name__}: {first}") from None

    def __iter__(self) -> Iterator[Pair]:
        number = 0
        for number, row in enumerate(self._rows, start=1):
            texts = row.get("translation", row)
            try:
                names = self._columns(texts)
                yield _cell(texts[names[0]]), _cell(texts[names[1]])
            except CorpusError as error:
                raise CorpusError(f"dataset {self.name}, row {number}: {error}") from None
        if not number:
            raise CorpusError(f"dataset {self.name}: no rows in it")

    def _columns(self, texts: Mapping[str, Any]) -> tuple[str, str]:
        names = (self.source, self.target)
        if names == (None, None) and len(texts) == 2:
            names = tuple(texts)
        if not all(name in texts for name in names):
            raise CorpusError(f"name the source and the target; there are {', '.join(texts)}")
        return names

    def identity(self) -> dict[str, Any]:
        """The name, subset and columns of the dataset, and its number of rows."""
        return dataclasses.asdict(self) | {"rows": len(self._rows)}


def _cell(text: Any) -> str:
    if not isinstance(text, str | None):
        raise CorpusError(f"not text but {type(text).__name__}")
    text = re.sub(r"[\r\n]+", " ", text or "")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorpusError("text with half a surrogate pair") from None
    if "\0" in text:
        raise CorpusError("a NUL character in the text")
    return text
