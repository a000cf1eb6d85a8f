import math

import numpy as np
import pytest
from scipy import stats

from experiments.claims.evidence import (
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    WITH_CAVEAT,
    Estimate,
    Hypothesis,
    Text,
    exact,
    judge,
    paired_t,
    verdict,
    wilson,
    wilson_difference,
)
from experiments.claims.ledger import CLAIMS

TEXT = Text("It is so.", "如此。")
EVERY_RULE = [
    pytest.param(hypothesis, id=f"{claim.id}.{name}")
    for claim in CLAIMS.values()
    for name, hypothesis in claim.hypotheses.items()
]


@pytest.mark.parametrize("hypothesis", EVERY_RULE)
def test_every_rule_changes_its_verdict_at_its_threshold(hypothesis):
    def judged(effect, half_width):
        if hypothesis.bound is not None:  # the error that has this effect
            effect = hypothesis.bound - effect
        interval = (effect - half_width, effect + half_width)
        alone = Hypothesis(TEXT, "effect", hypothesis.threshold, hypothesis.bound)
        return judge({"it": alone}, {"it": Estimate(effect, interval, 16)})[0]["verdict"]

    width = abs(hypothesis.threshold) or hypothesis.bound or 1.0
    above, below = hypothesis.threshold + width / 2, hypothesis.threshold - width / 2
    assert judged(above, width / 4) == SUPPORTED
    assert judged(below, width / 4) == NOT_SUPPORTED
    assert judged(above, width) == judged(below, width) == UNDECIDED


def test_the_ends_of_the_interval_decide_not_the_effect():
    assert verdict((0.11, 0.2), 0.1) == SUPPORTED
    assert verdict((0.1, 0.2), 0.1) == UNDECIDED
    assert verdict((0.0, 0.1), 0.1) == UNDECIDED
    assert verdict((0.0, 0.09), 0.1) == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("main", "caveat", "expected"),
    [(1, 1, WITH_CAVEAT), (1, -1, SUPPORTED), (-1, 1, NOT_SUPPORTED), (0, 1, UNDECIDED)],
)
def test_a_supported_caveat_limits_what_is_supported_and_nothing_else(main, caveat, expected):
    stated = {"main": Hypothesis(TEXT, "x"), "caveat": Hypothesis(TEXT, "y", caveat_of="main")}
    estimates = {"main": exact(main), "caveat": exact(caveat)}
    estimates["main"] = Estimate(main, (main - 0.5, main + 0.5), 3)
    first, second = judge(stated, estimates)
    assert first["verdict"] == expected
    assert first["caveats"] == (["caveat"] if expected == WITH_CAVEAT else [])
    assert second["verdict"] == (SUPPORTED if caveat > 0 else NOT_SUPPORTED)


def test_a_formula_carries_its_largest_error_and_its_bound():
    (row,) = judge({"f": Hypothesis(TEXT, "error", bound=1e-5)}, {"f": exact(2e-6)})
    assert row["largest_error"] == 2e-6 and row["bound"] == 1e-5
    assert row["effect"] == pytest.approx(8e-6) and row["verdict"] == SUPPORTED


def test_the_paired_interval_is_that_of_a_t_test():
    differences = [0.3, 0.1, 0.25, 0.4]
    found = paired_t(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.effect == pytest.approx(0.2625)
    assert found.interval == pytest.approx((low, high))
    assert found.seeds == 4


def test_the_paired_interval_covers_the_truth_as_often_as_it_says(rng):
    samples = rng.normal(0.5, 1.0, (2000, 4))
    covered = [low <= 0.5 <= high for low, high in (paired_t(s).interval for s in samples)]
    assert 0.935 < np.mean(covered) < 0.965


def test_wilsons_interval_of_a_worked_example():
    found = wilson(15, 20)
    low, high = stats.binomtest(15, 20).proportion_ci(0.95, "wilson")
    assert found.effect == 0.75
    assert found.interval == pytest.approx((low, high))
    assert wilson(16, 16).interval[1] == 1.0 and wilson(16, 16).interval[0] < 0.82


def test_the_interval_of_a_difference_is_newcombes():
    found = wilson_difference(14, 4, 16)
    limits = [stats.binomtest(n, 16).proportion_ci(0.95, "wilson") for n in (14, 4)]
    (l1, u1), (l2, u2) = limits  # scipy's, for 0.875 and 0.25
    assert found.effect == 0.625 and found.seeds == 16
    assert found.interval[0] == pytest.approx(0.625 - math.hypot(0.875 - l1, u2 - 0.25))
    assert found.interval[1] == pytest.approx(0.625 + math.hypot(u1 - 0.875, 0.25 - l2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired_t([0.1]), "at least 2 seeds"),
        (lambda: wilson(3, 15), "at least 16"),
        (lambda: wilson(17, 16), "17 of 16"),
        (lambda: paired_t([0.1, math.nan]), "not finite"),
        (
            lambda: judge({"a": Hypothesis(TEXT, "x")}, {"b": exact(1)}),
            "stated.*'a'.*measured.*'b'",
        ),
    ],
    ids=["one seed", "15 trials", "17 of 16", "NaN", "another hypothesis"],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
