import numpy as np
import pytest

from experiments.claims import attention
from experiments.claims.evidence import Budget, judge

BUDGET = Budget(seeds=2, many=16, effort=0.02)


@pytest.fixture(scope="module")
def measured():
    return attention.measure(BUDGET)


def test_every_row_holds_to_rounding(measured):
    estimates, figure = measured
    for row in judge(attention.HYPOTHESES, estimates):
        assert np.isfinite(row["effect"])
        assert row["largest_error"] < row["bound"], row["id"]
    assert len(figure.axes) == 2


def test_the_same_seed_gives_the_same_numbers(measured):
    assert attention.measure(BUDGET)[0] == measured[0]


def test_reference_by_hand():
    # d_k = 4, so QKᵀ/√d_k is (ln 3, 0): weights ¾ and ¼.
    query = np.array([[2 * np.log(3), 0.0, 0.0, 0.0]])
    key = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    value = np.array([[4.0, 0.0], [0.0, 8.0]])
    np.testing.assert_allclose(attention.reference(query, key, value), [[3.0, 2.0]], rtol=1e-12)


def test_a_wrong_divisor_is_seen(monkeypatch):
    def by_d_k(query, key, value):  # what the source's prose says
        return right(query / query.shape[-1] ** 0.5, key, value)

    right = attention.tfm.scaled_dot_product_attention
    monkeypatch.setattr(attention.tfm, "scaled_dot_product_attention", by_d_k)
    assert attention._one_seed(0, 1.0)["formula"] > 0.01


def test_an_output_outside_the_hull_is_seen(monkeypatch):
    def doubled(query, key, value):
        return 2 * right(query, key, value)

    right = attention.tfm.scaled_dot_product_attention
    monkeypatch.setattr(attention.tfm, "scaled_dot_product_attention", doubled)
    assert attention._one_seed(0, 10.0)["weighted_sum"] > 0.01
