"""Known faults of JAX and XLA on a CPU, as tests of the behaviour that this library relies on.

A failure here says that the JAX that is installed is unsound, not that this code is. What was seen:

| | 0.10.1 | 0.10.2 | 0.11.0 | 0.11.1 | 0.11.2 | 0.12.0.1 |
|---|---|---|---|---|---|---|
| jax 39103, off by | 0 | 2e6 | 0 | 0 | 0 | 0 |
| jax 40412 (39257) | right | segmentation fault | right | right | right | right |
| openxla 49176, wrong of 128 | 96 | 96 | 96 | 96 | 96 | 96 |
| jax 40101, ms for 1,000 writes into 10⁶ numbers | 4 | 15 | 10 | 880 | 12 | 3 |
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.jax_versions import RANGE
from tfm.precision import turned
from tfm.training import param_shapes

UNSOUND = f"jax {jax.__version__} is unsound (%s): install one of jax{RANGE}"
CONFIG = tfm.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=2
)
TOKENS = jax.ShapeDtypeStruct((3, 5), jnp.int32)


@pytest.fixture(scope="module")
def found():
    """What each canary found, by its name; one that ends the process has no entry."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "canaries.py")],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: value for line in lines for name, value in line.items()}


def test_a_matrix_vector_product_under_a_sum_is_right(found):
    assert found["matrix_vector_sum"] == 0, UNSOUND % "jax 39103; sound: all but 0.10.2"


def test_a_reduction_of_many_axes_ends_and_is_right(found):
    # On x86-64, where XLA hands it to a library of its own (__ynn_fusion).
    error = found.get("reduction_of_seven_axes", np.inf)
    assert error < 1e-5, UNSOUND % "jax 39257, 40412; sound: 0.10.1, 0.11.1 and later"


def test_a_small_write_in_a_loop_does_not_rewrite_the_array(found):
    short, long = found["seconds_of_writes"]
    # Of a hundred times as many numbers; the half is for copies outside of the loop.
    assert long < 50 * (short + 5e-4), UNSOUND % "jax 40101; sound: all but 0.11.1"


def test_rows_written_over_their_neighbours_are_right(found):
    assert found["shifted"] == 0, UNSOUND % "openxla 49176; sound: all that were tried"


# openxla 49176: with a reshape behind it, such a write reads what it has already overwritten, in
# all versions that there are. So nothing here may write into an array what was read from it.


def overwritten(jaxpr):
    """The updates of an array, in a program and all within it, that are made from that array."""
    made_from = {}
    for equation in jaxpr.eqns:
        sources = {v for v in equation.invars if not hasattr(v, "val")}
        before = sources.union(*(made_from.get(v, set()) for v in sources))
        made_from |= dict.fromkeys(equation.outvars, before)
        name = equation.primitive.name
        if name == "dynamic_update_slice" or name == "scatter":
            target, update = equation.invars[0], equation.invars[1 if name[0] == "d" else 2]
            if target in made_from.get(update, set()) | {update}:
                yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from overwritten(inner)


def test_what_would_be_written_over_itself_is_found():
    shift = jax.make_jaxpr(jax.jit(lambda x: x.at[1:].set(2 * x[:-1])))(jnp.arange(4.0))
    assert list(overwritten(shift.jaxpr))
    other = jax.make_jaxpr(jax.jit(lambda x, y: x.at[1:].set(2 * y)))(jnp.arange(4.0), jnp.ones(3))
    assert not list(overwritten(other.jaxpr))


def search(function, params, source):
    step, cache = tfm.start_decoding(tfm.Transformer(CONFIG), params, source, 3, max_length=6)
    return function(step, cache, bos=1, eos=2, max_length=6)


def train(params, batch):
    model, optimizer = tfm.Transformer(CONFIG), tfm.make_optimizer(lambda step: 0.1, 1.0)
    state = tfm.TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.PRNGKey(0))
    return tfm.make_train_step(model, optimizer, bos=1, tokens_at_once=4)(state, batch)


BATCH = {
    side + name: TOKENS
    for side in ("source", "target")
    for name in ("", "_segment_ids", "_positions")
}


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (partial(search, tfm.greedy), (param_shapes(CONFIG), TOKENS)),
        (partial(search, tfm.beam_search), (param_shapes(CONFIG), TOKENS)),
        (train, (param_shapes(CONFIG), BATCH)),
        (turned, (jax.ShapeDtypeStruct((1024, 512), jnp.float32),)),
    ],
    ids=["greedy", "beam search", "training step", "turned"],
)
def test_nothing_is_written_over_what_it_was_made_from(function, arguments):
    assert not list(overwritten(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_a_shift_to_the_right_and_a_reshape_are_right():
    labels = np.arange(128).reshape(8, 16)
    found = jax.jit(lambda x: tfm.shift_right(x + 1, bos=0)[None])(labels)
    right = np.concatenate([np.zeros((8, 1)), labels[:, :-1] + 1], axis=1)
    np.testing.assert_array_equal(found[0], right)
