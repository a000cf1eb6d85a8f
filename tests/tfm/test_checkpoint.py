import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm import TrainState
from tfm.checkpoint import Checkpoints

OPTIMIZER = optax.adam(1e-3)
NOTES = {"data": {"position": 17, "names": ["a", "ä"]}, "loss": 0.1, "best": None}


def some_state(seed):
    rng = np.random.default_rng(seed)
    params = {
        "embedding": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
        "layer": {"w": jnp.asarray(rng.standard_normal((4, 4)), jnp.bfloat16)},
    }
    return TrainState(jnp.int32(seed), params, OPTIMIZER.init(params), jax.random.PRNGKey(seed))


def assert_same(actual, expected):
    def same(one, other):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)

    jax.tree.map(same, actual, expected)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, some_state(3), NOTES)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        like = jax.eval_shape(lambda: some_state(0))
        restored, notes = checkpoints.restore(3, like)
        params = checkpoints.restore_params(3, like.params)
    assert isinstance(restored, TrainState)
    assert_same(restored, some_state(3))
    assert_same(params, some_state(3).params)
    assert notes == NOTES


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 10):
            checkpoints.save(step, some_state(step), {})
    assert steps(tmp_path) == [3, 10]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 10
        assert_same(checkpoints.restore(3, some_state(0))[0], some_state(3))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = some_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.tree.map(lambda x: x.delete(), state)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(1, some_state(0))[0], some_state(1))


def test_a_save_cut_short_is_not_taken(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, some_state(1), NOTES)
    # What a process killed during a save leaves behind: a part, under a temporary name.
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", torn)
    shutil.rmtree(torn / "notes")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        restored, notes = checkpoints.restore(1, some_state(0))
        checkpoints.save(2, some_state(2), {})
    assert_same(restored, some_state(1))
    assert notes == NOTES
    assert steps(tmp_path) == [1, 2]
    assert not torn.exists()


def test_a_step_already_saved_is_left_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, some_state(1), {"first": True})
        checkpoints.save(1, some_state(1), {"first": False})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(1, some_state(0))[1] == {"first": True}
