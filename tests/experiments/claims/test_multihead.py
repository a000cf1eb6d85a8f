import jax
import numpy as np
import pytest

import tfm
from experiments.claims import multihead, study
from experiments.claims.evidence import Budget, judge
from tfm.training import init_state

BUDGET = Budget(seeds=2, many=16, effort=0.02)


@pytest.fixture(scope="module")
def small():
    """Reversal in the place of pronunciation: the same code, in seconds."""
    task = study.reversal(range(2, 5), symbols=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "pronunciation", lambda: task)
        yield task


@pytest.fixture(scope="module")
def trained(small):
    return multihead._train(BUDGET)


@pytest.fixture(scope="module")
def measured(trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multihead, "_train", lambda budget: trained)  # once for all tests
        return multihead.measure(BUDGET)


@pytest.mark.slow
def test_every_estimate_is_finite_and_the_formulas_hold(measured):
    estimates, figure = measured
    for row in judge(multihead.HYPOTHESES, estimates):
        assert np.isfinite([row["effect"], *row["interval"]]).all()
        assert row.get("largest_error", 0.0) < row.get("bound", 1.0), row["id"]
    assert {"full_rank", "apart", "better"} <= estimates.keys()
    assert len(figure.axes) == 3


def test_before_training_is_where_the_study_starts(small, trained):
    model = tfm.Transformer(small.config(num_heads=multihead.MANY))
    optimizer = study.optimizer(steps=20)
    losses, after, fresh = trained
    assert len(losses[1]) == len(after) == len(fresh) == BUDGET.seeds
    for seed, params in enumerate(fresh):
        start = init_state(model, optimizer, jax.random.PRNGKey(seed)).params
        jax.tree.map(np.testing.assert_array_equal, params, start)


def test_overlap_of_known_subspaces():
    first, second = np.eye(8)[:, :2], np.eye(8)[:, 2:4]
    assert multihead.overlap(np.hstack([first, second]), 2) == pytest.approx(0)
    assert multihead.overlap(np.hstack([first, first @ [[2, 1], [0, 3]]]), 2) == pytest.approx(1)
    halfway = np.stack([np.eye(8)[0], np.eye(8)[5]], 1)  # one direction in common, one not
    assert multihead.overlap(np.hstack([first, halfway]), 2) == pytest.approx(0.5)


def test_random_subspaces_overlap_by_chance(rng):
    drawn = [multihead.overlap(rng.normal(size=(64, 64)), multihead.MANY) for _ in range(50)]
    error = np.std(drawn) / len(drawn) ** 0.5
    assert np.mean(drawn) == pytest.approx(1 / multihead.MANY, abs=4 * error)


def test_effective_rank_of_known_matrices(rng):
    basis = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    assert multihead.effective_rank(basis, 4) == pytest.approx(1)
    one_direction = np.outer(basis[0], np.ones(16))
    assert multihead.effective_rank(one_direction, 4) == pytest.approx(1 / 4)


def test_queries_and_keys_of_every_attention(small):
    model = tfm.Transformer(small.config())
    params = init_state(model, study.optimizer(20), jax.random.PRNGKey(0)).params
    assert len(multihead._projections(params)) == 2 * 3  # encoder, decoder, cross
