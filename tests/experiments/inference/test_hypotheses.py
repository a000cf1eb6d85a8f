import itertools
import random

import pytest

from experiments.inference.hypotheses import Hypothesis, Scored, best_of_parts, joined, pharaoh


def said(text, score, ended=True):
    return Hypothesis(text, (len(text), 2), score, 2 * score, ended)


def test_the_best_of_parts_are_the_best_of_all_their_combinations():
    rng = random.Random(0)
    found = [sorted((said(f"{p}{k}", -rng.random()) for k in range(3)), key=lambda h: -h.score)
             for p in "abcd"]  # fmt: skip
    everything = [joined(parts) for parts in itertools.product(*found)]
    expected = sorted(everything, key=lambda h: -h.score)[:3]
    best = best_of_parts(found, 3)
    assert [h.text for h in best] == [h.text for h in expected]
    assert best_of_parts([found[0]], 3) == found[0]


def test_what_is_joined_adds_up():
    parts = [said("a", -1.0), said("", -2.0), said("b", -3.0, ended=False)]
    whole = joined(parts)
    assert (whole.text, whole.ids) == ("a b", (1, 2, 0, 2, 1, 2))
    assert (whole.score, whole.log_prob, whole.ended) == (-6.0, -12.0, False)
    assert whole.parts == tuple(parts)
    assert joined(parts[:1]) is parts[0]


def test_very_many_parts_take_their_time_once():
    found = [[said("a", -1.0), said("b", -2.0)]] * 50_000
    first, second = best_of_parts(found, 2)
    assert first.score == -50_000 and second.score == -50_001


def test_a_score_is_the_sum_over_its_tokens():
    assert Scored((5, 2), (-0.25, -0.5)).log_prob == pytest.approx(-0.75)


def test_an_alignment_is_written_as_the_field_writes_it():
    assert pharaoh([(2, 0), (0, 1)]) == "2-0 0-1"
