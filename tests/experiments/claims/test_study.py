import jax
import numpy as np
import pytest

import tfm
from experiments.claims import study
from experiments.claims.evidence import Budget
from tfm.training import init_state, make_train_step

BUDGET = Budget(seeds=2, many=16, effort=1.0)
TASK = study.reversal(range(2, 5), symbols=5)
STEPS = 40


def make(rate):
    config = TASK.config(d_model=16, d_ff=32, num_heads=2)
    return study.Trainee(tfm.Transformer(config), study.optimizer(STEPS, rate))


@pytest.fixture(scope="module")
def trained():
    settings = {"rate": [0.0, 1e-2]}
    return study.train(BUDGET, TASK, make, STEPS, settings, probe_at=(0, 10, 20))


def test_shapes_are_settings_by_seeds(trained):
    assert trained.loss.shape == (2, 2, STEPS)
    assert trained.probes["loss"].shape == (2, 2, 3)
    assert all(leaf.shape[:2] == (2, 2) for leaf in jax.tree.leaves(trained.params))


def test_a_rate_of_0_learns_nothing_and_another_learns(trained):
    still, moving = trained.probes["loss"]
    np.testing.assert_allclose(still, still[:, :1].repeat(3, 1), rtol=1e-6)
    assert (moving[:, -1] < moving[:, 0] - 0.3).all()


def test_settings_are_paired_by_seed(trained):
    # The first batch is seen before the first update, so only the seed tells.
    np.testing.assert_allclose(trained.loss[0, :, 0], trained.loss[1, :, 0], rtol=1e-6)
    assert abs(trained.loss[0, 0, 0] - trained.loss[0, 1, 0]) > 1e-4


def test_trained_together_is_trained_alone(trained):
    trainee = make(1e-2)
    step = jax.jit(make_train_step(*trainee, bos=study.BOS, smoothing=0.0))
    state = init_state(*trainee, jax.random.PRNGKey(1))
    rows = len(TASK.train["source"])
    order = np.random.default_rng((1, rows)).permutation(rows)[: STEPS * study.ROWS]
    for chosen in order.reshape(STEPS, study.ROWS):
        state, metrics = step(state, {k: v[chosen] for k, v in TASK.train.items()})
    assert float(metrics["loss"]) == pytest.approx(trained.loss[1, 1, -1], rel=1e-3)


def test_the_same_seed_gives_the_same_numbers(trained):
    again = study.train(BUDGET, TASK, make, STEPS, {"rate": [0.0, 1e-2]}, probe_at=())
    np.testing.assert_array_equal(again.loss, trained.loss)


def test_devices_share_the_models_where_they_can_do_so_equally(trained, monkeypatch):
    assert [study._mesh(models).size for models in (1, 3, 4, 9)] == [1, 3, 4, 3]
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    alone = study.train(BUDGET, TASK, make, STEPS, {"rate": [0.0, 1e-2]}, probe_at=())
    np.testing.assert_allclose(alone.loss, trained.loss, rtol=1e-3)


def test_few_training_rows_are_learned_by_heart():
    found = study.train(BUDGET, TASK, lambda: make(1e-2), 200, train_rows=(16, 20_000)).probes
    gap = (found["loss"] - found["train_loss"])[..., 0]
    assert found["train_loss"].shape == (2, 2, 1)
    assert (gap[0] > gap[1]).all()


def test_a_sequence_is_wrong_where_a_token_is():
    model = make(0.0).model
    params = model.init(jax.random.key(0), *[np.ones((1, 2), np.int32)] * 2)["params"]
    batch = {k: v[:50] for k, v in TASK.valid.items()}
    found = jax.device_get(study.judge_batch(model, params, batch))
    logits = study.forward(model, params, batch)
    real = batch["target_segment_ids"] != 0
    missed = (np.asarray(logits).argmax(-1) != batch["target"]) & real
    assert found["wrong_tokens"] == pytest.approx(missed.sum() / real.sum())
    assert found["wrong"] == pytest.approx(missed.any(1).mean())


def test_packed_sequences_are_judged_one_by_one():
    task = study.pronunciation()
    model = tfm.Transformer(task.config(d_model=16, d_ff=32, num_heads=2))
    params = model.init(jax.random.key(0), *[np.ones((1, 2), np.int32)] * 2)["params"]
    batch = {k: v[:9] for k, v in task.valid.items()}
    found = float(study.judge_batch(model, params, batch)["wrong"])
    logits = np.asarray(study.forward(model, params, batch))
    segments, missed = batch["target_segment_ids"], logits.argmax(-1) != batch["target"]
    each = [
        missed[row][segments[row] == segment].any()
        for row in range(9)
        for segment in range(1, segments[row].max() + 1)
    ]
    assert found == pytest.approx(np.mean(each))


def test_reversal_is_the_source_backwards():
    row = {k: v[0] for k, v in TASK.train.items()}
    length = np.count_nonzero(row["source"]) - 1
    assert 2 <= length <= 4
    np.testing.assert_array_equal(row["target"][:length], row["source"][:length][::-1])
    assert row["target"][length] == row["source"][length] == study.EOS


@pytest.mark.parametrize("effort", [0.02, 1.0, 4.1])
def test_a_budget_gives_whole_pieces(effort):
    steps = Budget(seeds=2, many=16, effort=effort).steps(250)
    assert steps % study.PIECES == 0 < steps
    assert abs(steps - 250 * effort) <= study.PIECES


def test_steps_that_are_no_whole_pieces_are_refused():
    with pytest.raises(ValueError, match="steps=50 must be a multiple of 20"):
        study.train(BUDGET, TASK, lambda: make(1e-2), 50)
