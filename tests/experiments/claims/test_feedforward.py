import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from experiments.claims import feedforward, study
from experiments.claims.evidence import Budget, judge
from experiments.claims.feedforward import CLAIM

TASK = study.reversal(range(2, 4), symbols=5)


@pytest.mark.slow
def test_every_statement_is_measured_and_the_formula_holds(monkeypatch):
    monkeypatch.setattr(study, "pronunciation", lambda: TASK)
    estimates, figure = CLAIM.measure(Budget(seeds=2, many=16, effort=0.02))
    judged = {s["id"]: s for s in judge(CLAIM.hypotheses, estimates)}
    assert judged["formula"]["largest_error"] < judged["formula"]["bound"]
    assert judged["alone"]["largest_error"] == 0.0
    assert judged["nonlinear"]["seeds"] == judged["expressive"]["seeds"] == 2
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == [
        "Quality",
        "Who depends on whom",
    ]


def test_without_the_network_there_are_at_least_as_many_parameters():
    task = study.pronunciation()
    wider = task.config(d_model=feedforward.WIDER, d_ff=1)
    assert wider.parameter_count() >= task.config().parameter_count()


def test_a_leak_of_0_is_the_formula_and_of_1_is_affine():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (4, 8), (8, 16), (16,), (16, 8), (8,)
    x, *weights = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    np.testing.assert_array_equal(
        feedforward.leaky(0.0)(x, *weights), tfm.feed_forward(x, *weights)
    )
    affine = feedforward.leaky(1.0)
    ends = affine(x, *weights), affine(jnp.ones_like(x), *weights)
    np.testing.assert_allclose(affine((x + 1) / 2, *weights), sum(ends) / 2, atol=1e-5)
    assert not feedforward.nothing(x, *weights).any()
