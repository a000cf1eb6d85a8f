import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from experiments.claims import output, study
from experiments.claims.evidence import Budget, judge
from experiments.data.vocabulary import EOS
from tfm.training import param_shapes

BUDGET = Budget(seeds=2, many=16, effort=0.02)


@pytest.fixture(scope="module")
def small():
    """Reversal in the place of pronunciation, and few cases: the same code, in seconds."""
    task = study.reversal(range(2, 5), symbols=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "pronunciation", lambda: task)
        patch.setattr(output, "CASES", 16)
        patch.setattr(output, "WIDTHS", (1, 4))  # each is a program to compile
        yield task


@pytest.fixture(scope="module")
def scores(small):
    return output.every_score(*output._tiny(0))


@pytest.fixture(scope="module")
def measured(scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "every_score", lambda *case: scores)  # once for all tests
        return output.measure(BUDGET)


@pytest.mark.slow
def test_every_estimate_is_finite_and_the_formulas_hold(measured):
    estimates, figure = measured
    for row in judge(output.HYPOTHESES, estimates):
        assert np.isfinite([row["effect"], *row["interval"]]).all()
    for name in ("formula", "distribution", "chain"):
        assert estimates[name].effect < output.HYPOTHESES[name].bound
    assert len(figure.axes) == 2


def test_reference_by_hand():
    w = np.array([[np.log(2), 0.0, 0.0]])
    found = output.reference(np.array([1.0]), w, np.array([0.0, np.log(5), 0.0]))
    np.testing.assert_allclose(found, [2 / 8, 5 / 8, 1 / 8], rtol=1e-12)


def test_all_sequences_together_have_probability_1(scores):
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-5)


def test_sequences_are_all_and_each_once():
    every, counted = output.sequences()
    open_symbols = output.SYMBOLS - 1
    expected = sum(open_symbols**n for n in range(output.LONGEST)) + open_symbols**output.LONGEST
    assert len(every) == len(np.unique(every, axis=0)) == expected
    ends = (every == EOS).any(1)
    assert (counted.sum(1)[ends] == (every == EOS).argmax(1)[ends] + 1).all()
    assert counted[~ends].all()


def test_calibration_error_of_known_confidence():
    share, confidence = np.array([0.25, 0.75]), np.array([0.4, 0.8])
    assert output.calibration_error(share, confidence, confidence) == 0
    wrong = output.calibration_error(share, confidence, np.array([0.6, 0.7]))
    assert wrong == pytest.approx(0.25 * 0.2 + 0.75 * 0.1)


def test_a_model_that_knows_nothing_is_sure_of_nothing(small):
    task, model = small, tfm.Transformer(small.config(d_model=16, d_ff=32, num_heads=2))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), param_shapes(model.config))
    found = jax.jit(lambda params: output._reliability(model, params, task))(zeros)
    filled = np.flatnonzero(found["share"])
    assert len(filled) == 1 and float(found["share"].sum()) == pytest.approx(1)
    # Logits of 0: every symbol has 1/V, and the first, padding, is never right.
    assert float(found["confidence"][filled[0]]) == pytest.approx(1 / task.vocab_size)
    assert float(found["accuracy"][filled[0]]) == 0


def test_a_score_of_another_sequence_is_seen(scores, monkeypatch):
    def mixed_up(*case):
        decoded = right(*case)
        return decoded._replace(scores=np.roll(decoded.scores, 1, axis=0))

    right = output._decode
    monkeypatch.setattr(output, "every_score", lambda *case: scores)
    monkeypatch.setattr(output, "WIDTHS", (1,))
    monkeypatch.setattr(output, "_decode", mixed_up)
    assert output._search(0)[1] > 0.01
