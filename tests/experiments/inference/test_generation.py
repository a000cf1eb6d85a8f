"""When hypotheses are final; the rest of generation is tested with the translator."""

import pytest

from experiments.inference.batches import SENTENCES
from experiments.inference.generation import Generator, Job, up_to_16
from experiments.inference.hypotheses import Hypothesis
from experiments.inference.search import Rules, Sampling

JOB, FORCED = Job([5, 2], [], (0, 0)), Job([5, 2], [7], (0, 0))


def generator(n=1, target_length=115, **rules):
    """At its end lp(n) = ((5 + 115)/6)^α = 20^α."""
    return Generator((), None, 64, target_length, Rules(1, 2, 3, **rules), n, SENTENCES)


def ended(score):
    return Hypothesis("", (5, 2), score, score)


def still_open(log_prob, score):
    return Hypothesis("", (5, 5), score, log_prob, ended=False)


@pytest.mark.parametrize("job", [JOB, FORCED])
def test_what_has_ended_is_final(job):
    assert generator(2, alpha=1.0).are_final([ended(-1.0), ended(-2.0)], job)
    assert generator(2, sampling=Sampling()).are_final([ended(-1.0), ended(-2.0)], job)


def test_an_open_hypothesis_counts_where_it_can_still_overtake():
    for log_prob, final in ((-19.0, False), (-21.0, True)):
        hypotheses = [ended(-1.0), ended(-3.0), still_open(log_prob, -5.0)]
        assert generator(1, alpha=1.0).are_final(hypotheses, JOB) == final
        assert not generator(2, alpha=1.0).are_final(hypotheses, JOB)  # -21/20 is above -3
        assert not generator(1, alpha=1.0, penalty="power").are_final(hypotheses, JOB)
        assert not generator(1, alpha=1.0).are_final(hypotheses, FORCED)
        assert not generator(1, sampling=Sampling()).are_final(hypotheses, JOB)
    assert generator(1, alpha=0.0).are_final([ended(-1.0), still_open(-1.5, -1.5)], JOB)


def test_an_open_hypothesis_among_the_first_is_not_final():
    assert not generator(1, alpha=0.0).are_final([still_open(-1.0, -1.0), ended(-2.0)], JOB)
    assert not generator(2, alpha=0.0).are_final([ended(-1.0), still_open(-2.0, -2.0)], JOB)


def test_lengths_are_rounded_to_few():
    assert [up_to_16(n, 40) for n in (0, 1, 16, 17, 33, 40)] == [0, 16, 16, 32, 40, 40]
