import functools
import itertools
import random

import pytest

from experiments.evaluation.error_rates import (
    confusions,
    edit_distance,
    edit_operations,
    phone_error_rate,
    word_error_rate,
)


@functools.cache
def brute_force(a: str, b: str) -> int:
    """The definition: try each way to spend the first symbols."""
    if not a or not b:
        return len(a) + len(b)
    kept = brute_force(a[1:], b[1:]) + (a[0] != b[0])
    return min(kept, brute_force(a[1:], b) + 1, brute_force(a, b[1:]) + 1)


def pairs() -> list[tuple[str, str]]:
    short = ["".join(s) for n in range(4) for s in itertools.product("ab", repeat=n)]
    rng = random.Random(0)
    long = ["".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(400)]
    return [*itertools.product(short, short), *zip(long[::2], long[1::2], strict=True)]


def test_edit_distance_equals_brute_force():
    for a, b in pairs():
        assert edit_distance(a, b) == brute_force(a, b), (a, b)


def test_edit_operations_are_a_shortest_alignment_of_both_sides():
    for hypothesis, reference in pairs():
        alignment = edit_operations(hypothesis, reference)
        assert "".join(r for r, _ in alignment if r is not None) == reference
        assert "".join(h for _, h in alignment if h is not None) == hypothesis
        assert (None, None) not in alignment
        assert sum(r != h for r, h in alignment) == brute_force(hypothesis, reference)


def test_edit_operations_say_which_side_is_missing():
    assert edit_operations("ab", "b") == [(None, "a"), ("b", "b")]
    assert edit_operations("b", "ab") == [("a", None), ("b", "b")]
    assert edit_operations("x", "y") == [("y", "x")]


HYPOTHESES = [["K", "AE", "T"], ["D", "AO"], ["IH", "T", "S"], []]
REFERENCES = [
    [("K", "AA", "T"), ("K", "AE", "T")],  # right by its second reference
    [("D", "AO", "G", "Z"), ("D", "AA", "G")],  # both at distance 2: the first counts
    [("IH", "T")],
    [("AH",)],
]


def test_word_error_rate_counts_words_that_equal_no_reference():
    assert word_error_rate(HYPOTHESES, REFERENCES) == 3 / 4
    assert word_error_rate(HYPOTHESES[:1], REFERENCES[:1]) == 0.0


def test_phone_error_rate_divides_by_the_closest_references():
    assert phone_error_rate(HYPOTHESES, REFERENCES) == (0 + 2 + 1 + 1) / (3 + 4 + 2 + 1)


def test_confusions_count_against_the_closest_reference():
    assert confusions(HYPOTHESES, REFERENCES) == {
        ("G", "∅"): 1,
        ("Z", "∅"): 1,
        ("∅", "S"): 1,
        ("AH", "∅"): 1,
    }
    assert confusions([["B"], ["B"]], [[["P"]], [["P"]]]) == {("P", "B"): 2}


@pytest.mark.parametrize("rate", [word_error_rate, phone_error_rate, confusions])
def test_what_cannot_be_scored_is_refused(rate):
    with pytest.raises(ValueError, match="1 hypotheses, but 2 words"):
        rate([["B"]], [[["B"]], [["P"]]])
    with pytest.raises(ValueError, match="needs a reference"):
        rate([["B"]], [[]])
    with pytest.raises(ValueError, match="nothing to score"):
        rate([], [])
