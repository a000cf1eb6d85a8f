import numpy as np
import pytest

from experiments.claims import split
from experiments.claims.evidence import Budget, judge


@pytest.fixture(scope="module")
def measured():
    return split.measure(Budget(seeds=2, many=16, effort=0.02))


def test_every_row_holds(measured):
    estimates, figure = measured
    for row in judge(split.HYPOTHESES, estimates):
        assert np.isfinite(row["effect"])
        assert row["largest_error"] < row["bound"], row["id"]
    assert len(figure.axes) == 2


@pytest.mark.parametrize("heads", split.HEADS)
def test_the_compiler_counts_what_the_formula_says(heads):
    batch, length, d = split.BATCH, split.LENGTH, split.D_MODEL
    four_projections = 4 * 2 * batch * length * d * d
    logits_and_means = 2 * 2 * batch * length**2 * d
    flops, exponentials = split._work(heads)
    assert flops == four_projections + logits_and_means
    assert exponentials == batch * heads * length**2


def test_parameters_are_the_shapes_sum():
    d, d_ff, vocabulary = split.D_MODEL, 128, 50
    attention, norm, feed_forward = 4 * d * d, 2 * d, 2 * d * d_ff + d_ff + d
    encoder, decoder = attention + 2 * norm, 2 * attention + 3 * norm
    assert split._parameters(4) == vocabulary * d + encoder + decoder + 2 * feed_forward


def test_a_head_let_through_is_seen(monkeypatch):
    monkeypatch.setattr(split.tfm, "split_heads", lambda x, heads: x)
    assert split._let_through() == 1.0


def test_a_refusal_without_the_numbers_is_seen(monkeypatch):
    def refuse(x, heads):
        raise ValueError("does not divide")

    monkeypatch.setattr(split.tfm, "split_heads", refuse)
    assert split._let_through() == 1.0
