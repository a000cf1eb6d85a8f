import gzip
import hashlib
import itertools
import os
import sys
import tracemalloc
import types
from pathlib import Path

import pytest

from experiments.data import text
from experiments.data.text import CorpusError, Files, Hub, chunks
from experiments.errors import UserError

BOM = b"\xef\xbb\xbf"


def two(tmp_path, source: bytes, target: bytes):
    paths = tmp_path / "text.en", tmp_path / "text.de"
    for path, content in zip(paths, (source, target), strict=True):
        path.write_bytes(content)
    return Files(paths)


def one(tmp_path, content: bytes):
    path = tmp_path / "text.tsv"
    path.write_bytes(content)
    return Files((path,))


def error_of(corpus):
    with pytest.raises(CorpusError) as error:
        list(corpus)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    return str(error.value)


# ---- what is read


PAIRS = [
    ("a cat", "eine Katze"),
    ("", "leer"),
    ("x\ty", "Ü\u2028\u0085\x0b\x0c\x1c"),
    (" b ", "\r c"),
]
SOURCE = b"".join(f"{s}\n".encode() for s, _ in PAIRS)
TARGET = b"".join(f"{t}\n".encode() for _, t in PAIRS)


@pytest.mark.parametrize(
    "form",
    [
        lambda b: b,
        lambda b: b.removesuffix(b"\n"),
        lambda b: BOM + b,
        lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: BOM + b.replace(b"\n", b"\r\n").removesuffix(b"\r\n"),
        gzip.compress,
        lambda b: gzip.compress(BOM + b[:9]) + gzip.compress(b[9:]),
    ],
    ids=["plain", "no last end", "bom", "crlf", "bom and crlf", "gzip", "two gzip members"],
)
def test_two_files(tmp_path, form):
    corpus = two(tmp_path, form(SOURCE), form(TARGET))
    assert list(corpus) == PAIRS == list(corpus)


def test_the_sides_may_differ_in_form(tmp_path):
    assert list(two(tmp_path, BOM + SOURCE, gzip.compress(TARGET))) == PAIRS


@pytest.mark.parametrize("form", [lambda b: b, lambda b: BOM + b, gzip.compress])
def test_one_file_of_tab_separated_lines(tmp_path, form):
    content = "a\tb\r\n\tleer\n\u2028\tÜ\n\t".encode()
    assert list(one(tmp_path, form(content))) == [
        ("a", "b"),
        ("", "leer"),
        ("\u2028", "Ü"),
        ("", ""),
    ]


def test_a_byte_order_mark_counts_only_at_the_start(tmp_path):
    assert list(two(tmp_path, BOM + BOM + b"a\n" + BOM + b"b\n", b"c\nd\n")) == [
        ("\ufeffa", "c"),
        ("\ufeffb", "d"),
    ]


def test_a_corpus_larger_than_memory_is_read_by_the_line(tmp_path):
    corpus = two(tmp_path, b"an English sentence\n" * 200_000, b"ein deutscher Satz\n" * 200_000)
    tracemalloc.start()
    assert sum(1 for _ in corpus) == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the files have 7.8 MB


# ---- what is refused


@pytest.mark.parametrize("counts", [(3, 5), (5, 3), (1, 9000), (9000, 1)])
def test_files_of_different_length_are_an_error_with_both_counts(tmp_path, counts):
    corpus = two(tmp_path, b"a\n" * counts[0], b"b\n" * counts[1])
    assert error_of(corpus) == (
        f"{corpus.paths[0]} has {counts[0]:,} lines and {corpus.paths[1]} {counts[1]:,}: "
        "line for line, they must be the same sentences"
    )


def test_the_last_line_counts_with_or_without_its_end(tmp_path):
    assert len(list(two(tmp_path, b"a\nb", b"a\nb\n"))) == 2
    assert "has 1 lines and" in error_of(two(tmp_path, b"a", b"a\n\n"))


@pytest.mark.parametrize("form", [lambda b: b, gzip.compress])
def test_empty_files_are_named(tmp_path, form):
    assert error_of(two(tmp_path, form(b""), b"a\n")) == f"{tmp_path / 'text.en'}: no lines in it"
    assert error_of(two(tmp_path, b"a\n", form(b""))) == f"{tmp_path / 'text.de'}: no lines in it"
    assert error_of(one(tmp_path, form(b""))) == f"{tmp_path / 'text.tsv'}: no lines in it"


WRONG = {
    "latin-1": ("Tür\n".encode("latin-1"), "invalid UTF-8"),
    "half a character": (b"T\xc3\n", "invalid UTF-8"),
    "a surrogate": (b"\xed\xa0\x80\n", "invalid UTF-8"),
    "NUL": (b"a\0b\n", "a NUL byte"),
}


@pytest.mark.parametrize("line, why", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("form", [lambda b: b, gzip.compress], ids=["plain", "gzip"])
def test_a_wrong_line_is_named(tmp_path, line, why, form):
    good = "ä\u2028\u0085\n".encode()
    message = error_of(two(tmp_path, form(good * 4), form(good * 2 + line + good)))
    assert message.startswith(f"{tmp_path / 'text.de'}:3: {why}")
    message = error_of(one(tmp_path, form(b"a\tb\n" + b"a\t" + line)))
    assert message.startswith(f"{tmp_path / 'text.tsv'}:2: {why}")


def test_utf_16_is_named(tmp_path):
    assert "text.en:1: invalid UTF-8" in error_of(two(tmp_path, "ab\n".encode("utf-16"), b"a\n"))
    assert "text.en:1: a NUL byte" in error_of(two(tmp_path, "ab\n".encode("utf-16-be"), b"a\n"))


@pytest.mark.parametrize("line, tabs", [("a b", 0), ("", 0), ("a\tb\tc", 2), ("\t\t", 2)])
def test_a_line_without_exactly_one_tab_is_named(tmp_path, line, tabs):
    message = error_of(one(tmp_path, f"a\tb\n{line}\na\tb\n".encode()))
    assert message.startswith(f"{tmp_path / 'text.tsv'}:2: {tabs} tabs")


def test_missing_files_folders_and_pipes_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good").write_bytes(b"a\n")
    for path, why in [
        (tmp_path / "absent", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a plain file"),
    ]:
        for corpus in (Files((tmp_path / "good", path)), Files((path,))):
            assert error_of(corpus).startswith(f"{path}: {why}")
    with pytest.raises(CorpusError, match="absent: No such file"):
        Files((tmp_path / "absent",)).identity()


@pytest.mark.parametrize("count", [0, 3])
def test_only_one_or_two_files_are_a_corpus(count):
    with pytest.raises(CorpusError, match=f"not {count}"):
        Files((Path("x"),) * count)


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(os.urandom(3000).hex().encode() + b"\n" + SOURCE * 100)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:2], bytes(flipped), whole + b"xx"):
        message = error_of(two(tmp_path, content, TARGET * 200))
        assert message.startswith(f"{tmp_path / 'text.en'}: damaged gzip after line "), message


def test_an_endless_line_is_named_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LONGEST", 100)
    assert len(list(two(tmp_path, b"a" * 98 + b"\n", b"b\n"))) == 1
    message = error_of(two(tmp_path, b"a\n" + b"a" * 5000, b"b\nb\n"))
    assert message.startswith(f"{tmp_path / 'text.en'}:2: a line of more than 100 bytes")


def test_identity_is_of_the_bytes(tmp_path):
    corpus = two(tmp_path, b"a\n", b"b\n")
    sums = {n: hashlib.sha256(c).hexdigest() for n, c in (("source", b"a\n"), ("target", b"b\n"))}
    assert corpus.identity() == sums
    assert set(one(tmp_path, b"a\tb\n").identity()) == {"pairs"}


def test_chunks():
    assert list(chunks(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []
    assert list(itertools.islice(chunks(itertools.count(), 2), 2)) == [[0, 1], [2, 3]]


# ---- the hub


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the library `datasets`: `rows` is what it loads, `asked` what for."""
    module = types.ModuleType("datasets")
    module.rows, module.asked = [], []

    def load_dataset(*args, **options):
        module.asked.append((args, options))
        if isinstance(module.rows, Exception):
            raise module.rows
        return module.rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_columns_and_translations(library):
    library.rows = [{"translation": {"de": "ja", "en": "yes"}}] * 2
    corpus = Hub("wmt/made-up", subset="de-en", split="validation")
    assert list(corpus) == [("ja", "yes")] * 2 == list(corpus)
    assert library.asked == [(("wmt/made-up", "de-en"), {"split": "validation"})]  # once
    assert list(Hub("x", "en", "de")) == [("yes", "ja")] * 2
    library.rows = [{"id": 7, "text": "yes", "german": "ja"}]
    assert list(Hub("x", "text", "german")) == [("yes", "ja")]


def test_hub_texts_are_lines(library):
    library.rows = [{"a": "one\r\n\ntwo\u2028", "b": None}]
    assert list(Hub("x")) == [("one two\u2028", "")]


def test_hub_identity(library):
    library.rows = [{"a": "x", "b": "y"}] * 3
    assert Hub("n", "a", "b").identity() == {
        "name": "n", "source": "a", "target": "b", "split": "train", "subset": None, "rows": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    "row, names, why",
    [
        ({"a": "x", "b": "y", "c": "z"}, (), "name the source and the target; there are a, b, c"),
        ({"a": "x", "b": "y"}, ("a", "q"), "there are a, b"),
        ({"a": "x", "b": "y"}, ("a",), "there are a, b"),
        ({"a": "x", "b": 3}, (), "not text but int"),
        ({"a": "x", "b": "\0"}, (), "a NUL character"),
        ({"a": "x", "b": "\ud800"}, (), "half a surrogate pair"),
    ],
)
def test_a_wrong_row_of_the_hub_is_named(library, row, names, why):
    library.rows = [row]
    message = error_of(Hub("n", *names))
    assert message.startswith("dataset n, row 1: ") and why in message


def test_no_library_no_network_no_rows(library, monkeypatch):
    assert error_of(Hub("n")) == "dataset n: no rows in it"
    library.rows = ConnectionError("\n cannot reach it\nfor many reasons")
    assert error_of(Hub("n")) == "dataset n: ConnectionError: cannot reach it"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of(Hub("n")) == "dataset n: reading it needs a library: pip install datasets"
