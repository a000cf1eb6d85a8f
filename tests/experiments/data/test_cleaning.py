import json
import random
import tracemalloc

import numpy as np
import pytest

from experiments.data import cleaning
from experiments.data.cleaning import Clean, Cleaned, Limits
from experiments.errors import UserError

GOOD = [("a cat", "eine Katze"), ("the dog", "der Hund"), ("yes", "ja")]


def test_good_pairs_stay_as_they_are_and_in_order():
    pairs = [*GOOD, (" spaces  stay ", "\tsie bleiben")]
    clean = Clean(pairs)
    assert list(clean) == pairs == list(clean)
    assert clean.cleaned == Cleaned(Limits(), pairs=4) and clean.cleaned.kept == 4
    assert str(clean.cleaned) == "4 pairs, 4 kept; left out: none"


def test_each_reason_is_counted_once():
    pairs = [
        *GOOD,
        ("", "leer"), ("empty", ""), (" \t", "x"), ("x", "\u00a0\u2028"), ("", ""),  # empty
        ("x" * 11, "y"), ("y", "x" * 11), ("x" * 12, "y" * 12),  # over 10 characters
        ("ab", "\U0001f600" * 10),  # of 2 and 10 characters, 2 and 40 bytes
        ("yes", "ja"), (" yes", "ja "),  # duplicates
        ("held", "out"), ("held", "out"),
        ("held", "else"),
    ]  # fmt: skip
    clean = Clean(pairs, Limits(characters=10, ratio=1.3), held_out=[("held ", "out")])
    assert list(clean) == [*GOOD, ("held", "else")]
    assert clean.cleaned == Cleaned(
        Limits(10, 1.3), pairs=17, empty=5, too_long=3, ratio=1, held_out=2, duplicates=2
    )
    assert clean.cleaned.kept == 4
    assert str(clean.cleaned) == (
        "17 pairs, 4 kept; left out: 5 empty, 3 over 10 characters, 1 of a length ratio over 1.3, "
        "2 in the validation or test data, 2 duplicates"
    )
    assert list(clean) == [*GOOD, ("held", "else")] and clean.cleaned.pairs == 17  # anew


def test_the_ratio_is_of_characters_and_bytes_and_kind_to_short_sentences():
    def kept(source, target, ratio=3.0):
        return list(Clean([("a", "b"), (source, target)], Limits(ratio=ratio)))[1:]

    assert kept("Ja", "Yes, of course you may do that")
    # (4n + 20) / (n + 20) passes 3 beyond n = 40.
    assert kept("x" * 40, "x" * 160) and kept("x" * 160, "x" * 40)
    assert not kept("x" * 41, "x" * 164) and not kept("x" * 164, "x" * 41)
    assert kept("中" * 40, "x" * 160)  # a quarter of the characters, but 120 bytes
    assert kept("x" * 90, "မ" * 100)  # 300 bytes, but as many characters
    assert kept("x" * 90, "க" * 150) and not kept("x" * 41, "மை" * 90)
    assert kept("x" * 41, "x" * 164, ratio=1e9)


def test_the_limit_in_characters_is_inclusive():
    pairs = [("x" * 2000, "y" * 2000), ("x" * 2001, "y" * 2000)]
    assert list(Clean(pairs)) == pairs[:1]


def test_no_pair_left_is_an_error_with_the_counts():
    clean = Clean([(" ", "x"), ("x", "")])
    with pytest.raises(UserError, match="no pair is left to train on: 2 pairs, 0 kept; .* 2 empty"):
        list(clean)


def test_errors_of_the_corpus_pass_through():
    def broken():
        yield "a", "b"
        raise UserError("file:3: invalid UTF-8")

    with pytest.raises(UserError, match="file:3"):
        list(Clean(broken()))


def test_sides_do_not_run_together():
    pairs = [("ab", "c"), ("a", "bc"), ("abc", "d"), ("c", "ab"), ("x y", "z"), ("x", "y z")]
    assert list(Clean(pairs)) == pairs


def test_duplicates_and_held_out_pairs_across_chunks(monkeypatch):
    monkeypatch.setattr(cleaning, "_CHUNK", 7)
    rng = random.Random(0)
    numbers = [rng.randrange(300) for _ in range(1000)]
    pairs = [(f"sentence {n}", f"Satz {n}") for n in numbers]
    held = {f"sentence {n}" for n in range(40)}
    clean = Clean(pairs, held_out=[(f"sentence {n}", f"Satz {n}") for n in range(40)])
    expected = [pair for pair in dict.fromkeys(pairs) if pair[0] not in held]
    assert list(clean) == expected
    assert clean.cleaned.held_out == sum(s in held for s, _ in pairs)
    assert clean.cleaned.duplicates == 1000 - clean.cleaned.held_out - len(expected)


def test_seen_is_a_set():
    rng = np.random.default_rng(0)
    seen, python = cleaning._Seen(), set()
    for size in [0, 1, 5, 100, 1, 1, 2000, 3, 500]:
        keys = rng.integers(0, 3000, size).astype(np.uint64)
        expected = []
        for key in keys.tolist():
            expected.append(key not in python)
            python.add(key)
        assert seen.add(keys).tolist() == expected
    assert sum(map(len, seen._runs)) == len(python)


def test_seen_takes_8_bytes_a_key():
    seen = cleaning._Seen()
    rng = np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(60):
        seen.add(rng.integers(0, 2**63, 10_000).astype(np.uint64))
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 8.5 * 600_000 and peak < 25 * 600_000
    assert len(seen._runs) < 12


def test_keys_do_not_depend_on_the_process():
    assert cleaning._keys([("a", "b")]).tolist() == cleaning._keys([(" a", "b\n")]).tolist()
    assert cleaning._keys([("a", "b")]).tolist() == [11797832347080049151]


@pytest.mark.parametrize(
    "wrong", [{"characters": 0}, {"ratio": 0.5}, {"ratio": float("nan")}, {"ratio": float("inf")}]
)
def test_limits_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_the_record_goes_into_json_and_counts_tokens():
    cleaned = Cleaned(Limits(), pairs=2000, empty=1, too_many_tokens=1200, tokens=(128, 130))
    assert cleaned.kept == 799
    assert str(cleaned).endswith("left out: 1 empty, 1,200 over 128+130 tokens")
    assert Cleaned.from_json(cleaned.to_json()) == cleaned
    assert json.loads(json.dumps(cleaned.to_json())) == {
        "limits": {"characters": 2000, "ratio": 3.0},
        "pairs": 2000, "empty": 1, "too_long": 0, "ratio": 0, "held_out": 0, "duplicates": 0,
        "too_many_tokens": 1200, "tokens": [128, 130], "kept": 799,
    }  # fmt: skip
