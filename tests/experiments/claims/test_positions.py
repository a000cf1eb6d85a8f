import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from experiments.claims import positions, study
from experiments.claims.evidence import Budget, Estimate, judge
from experiments.claims.positions import CLAIM

TASK = study.reversal(range(2, 4), symbols=5)


@pytest.mark.slow
def test_every_statement_is_measured_and_the_formulas_hold(monkeypatch):
    monkeypatch.setattr(study, "pronunciation", lambda: TASK)
    estimates, figure = CLAIM.measure(Budget(seeds=2, many=16, effort=0.02))
    judged = {s["id"]: s for s in judge(CLAIM.hypotheses, estimates)}
    for name in ("rotation", "relative", "blind", "distinct"):
        assert judged[name]["verdict"] == "supported", judged[name]
    assert all(judged[n]["seeds"] == 2 for n in ("repairs", "pronunciation", "longer"))
    assert len(figure.axes) == 3


def test_a_factor_of_0_is_nowhere_and_of_1_the_papers():
    where = jnp.arange(6).reshape(2, 3)
    assert not positions.scaled(0.0).sinusoidal_positions(where, 8).any()
    encoded = positions.scaled(1.0).sinusoidal_positions(where, 8)
    np.testing.assert_array_equal(encoded, tfm.sinusoidal_positions(where, 8))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((-0.01, 0.015), (0.005, 0.02)),
        ((0.03, 0.05), (-0.03, -0.01)),
        ((-0.05, -0.01), (-0.03, 0.01)),
    ],
)
def test_equal_where_the_whole_interval_lies_within_the_margin(interval, expected):
    found = positions._equal(Estimate(sum(interval) / 2, interval, 3), 0.02)
    np.testing.assert_allclose(found.interval, expected)
    assert found.interval[0] <= found.effect <= found.interval[1]
