import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from experiments.claims import layernorm, study
from experiments.claims.evidence import Budget, judge
from experiments.claims.layernorm import CLAIM
from tfm.training import init_params

TASK = study.reversal(range(2, 4), symbols=5)


@pytest.mark.slow
def test_every_statement_is_measured_and_the_formulas_hold(monkeypatch):
    monkeypatch.setattr(study, "pronunciation", lambda: TASK)
    monkeypatch.setattr(layernorm, "DEEP", 2)
    monkeypatch.setattr(layernorm, "LAYERS", 1)
    estimates, figure = CLAIM.measure(Budget(seeds=2, many=16, effort=0.02))
    judged = {s["id"]: s for s in judge(CLAIM.hypotheses, estimates)}
    assert judged["formula"]["verdict"] == judged["small"]["verdict"] == "supported"
    assert judged["invariant"]["caveats"] == ["small"]
    assert all(judged[n]["seeds"] == 2 for n in ("faster", "drift", "shift", "gradients"))
    assert len(figure.axes) == 3


def test_a_goal_that_is_never_reached_counts_as_all_steps():
    falling = np.linspace(3, 1, 41)
    never = np.full(41, 2.0)
    diverged = np.where(np.arange(41) < 5, 2, np.nan)
    found = layernorm.steps_to(np.stack([falling, never, diverged]), 1.5)
    # The mean of the last 10 of a line is its value 4.5 steps before.
    np.testing.assert_array_equal(found, [np.ceil(30 + 4.5) + 1, 41, 41])


def test_what_overflows_is_counted_and_not_passed_on():
    config = TASK.config(d_model=8, d_ff=8, num_heads=2)
    model = tfm.Transformer(config, tfm.Functions(layer_norm=layernorm.normalised(False)))
    params = jax.tree.map(lambda p: p * 1e30, init_params(model, jax.random.key(0)))
    found = layernorm._activations(model, params, TASK)
    assert found["loss"] == pytest.approx(np.log(config.vocab_size))
    assert found["variance"].shape == (5,) and found["mean"].shape == (5, 8)
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["variance"].max() == layernorm.LARGEST


def test_present_is_the_formula_and_absent_leaves_all_as_it_is():
    x, scale, bias = jnp.arange(12.0).reshape(3, 4) ** 2, jnp.arange(4.0), jnp.ones(4)
    present, absent = (layernorm.normalised(p)(x, scale, bias, 1e-6) for p in (True, False))
    np.testing.assert_array_equal(present, tfm.layer_norm(x, scale, bias, 1e-6))
    np.testing.assert_array_equal(absent, x)
