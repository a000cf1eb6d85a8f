"""The claims whose measuring is mostly training, at a size that tests can afford."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import clipping, dropout, heads, scaling, study
from experiments.claims.evidence import Budget, judge

TINY = Budget(seeds=2, many=16, effort=0.02)


@pytest.fixture
def small_batches(monkeypatch):
    """Of the data that the studies learn from, two rows at a time, and few to be judged by."""
    task = study.pronunciation()
    few = {name: rows[:24] for name, rows in task.valid.items()}
    monkeypatch.setattr(study, "pronunciation", lambda: task._replace(valid=few))
    monkeypatch.setattr(study, "ROWS", 2)
    monkeypatch.setattr(study, "SAMPLE", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    "claim", [m.CLAIM for m in (scaling, heads, dropout, clipping)], ids=lambda claim: claim.id
)
def test_every_statement_is_measured_and_the_formulas_hold(claim):
    estimates, figure = claim.measure(TINY)
    for row in judge(claim.hypotheses, estimates):
        assert all(map(math.isfinite, (row["effect"], *row["interval"])))
        assert row.get("largest_error", 0) <= row.get("bound", 0)
    assert all(axes.get_title(loc="left") and axes.get_xlabel() for axes in figure.axes)


def test_heads_that_look_apart_diverge_by_ln_2_and_equal_ones_by_0():
    first, second = jnp.eye(2)[None, :1], jnp.eye(2)[None, 1:]  # [1, L = 1, K = 2]
    real = jnp.ones((1, 1), bool)
    apart, equal = (jnp.stack(pair, axis=1) for pair in ((first, second), (first, first)))
    assert heads.divergence(apart, real) == pytest.approx(math.log(2), rel=1e-6)
    assert heads.divergence(equal, real) == pytest.approx(0, abs=1e-6)
    assert heads.divergence(apart, jnp.zeros((1, 1), bool).at[0, 0].set(True)) > 0.6


def test_alignment_is_the_correlation_of_places_within_words():
    length = 8
    places = np.arange(length)
    batch = {
        "source_positions": jnp.asarray([places]),
        "target_positions": jnp.asarray([places]),
        "target_segment_ids": jnp.ones((1, length), jnp.int32),
        "target": jnp.full((1, length), 5).at[0, -1].set(heads.EOS),
    }
    forwards, backwards = np.eye(length), np.eye(length)[::-1]
    still = np.zeros((length, length))
    still[:, 3] = 1
    weights = jnp.asarray(np.stack([forwards, backwards, still])[None])
    found = np.asarray(heads.alignment(weights, batch))
    np.testing.assert_allclose(found, [1, -1, 0], atol=0.2)
    assert found[0] > 0.999


def test_a_loop_over_the_heads_is_the_same_attention(rng):
    x, *weights = (jnp.asarray(rng.normal(size=s), jnp.float32) / 4 for s in
                   [(2, 5, 16), *[(16, 16)] * 4])  # fmt: skip
    together, looped = (f(x, *weights, 4) for f in (heads._together, heads._in_a_loop))
    np.testing.assert_allclose(together, looped, atol=1e-5)


def test_survivors_end_finite_and_know_more_than_frequencies():
    learned, stuck = np.linspace(4, 1, 40), np.full(40, 3.3)
    broken = np.where(np.arange(40) < 30, learned, np.nan)
    loss = np.stack([learned, stuck, broken, np.where(np.isnan(broken), np.inf, learned)])
    np.testing.assert_array_equal(
        clipping.survivors(loss, worthless=3.2), [True, False, False, False]
    )


def test_the_spike_is_one_step_long():
    spike = clipping._spike(1, jnp.asarray(100.0))
    state, seen = spike.init(None), []
    for _ in range(3):
        update, state = spike.update({"w": jnp.ones(())}, state)
        seen.append(float(update["w"]))
    assert seen == [1.0, 100.0, 1.0]


def test_a_factor_changes_the_spread_and_not_scaling_saturates():
    plain = scaling._one_size(scaling.jax.random.key(0), 1024, 1.0)
    scaled = scaling._one_size(scaling.jax.random.key(0), 1024, 1024**-0.5)
    assert plain["deviation"] == pytest.approx(32, rel=0.1)
    assert scaled["deviation"] == pytest.approx(1, rel=0.1)
    assert plain["entropy"] < 0.1 < 0.8 < scaled["entropy"]
    assert plain["silent"] > 0.5 and scaled["silent"] == 0
