"""The public functions under JAX's strict modes that are too slow for all tests.

What the others run under stands in this folder's conftest.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from public_functions import (
    BATCH,
    BOTH,
    FUNCTIONS,
    IDS,
    KEY,
    MODEL,
    SCANNED,
    UNDIFFERENTIATED,
    X,
    gradient_of,
)  # fmt: skip

import tfm


@pytest.fixture(params=["leaks", "disable_jit"])
def mode(request):
    if request.param == "leaks":
        with jax.checking_leaks():
            yield
    else:
        with jax.disable_jit():
            yield


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("case", [*FUNCTIONS.values(), *UNDIFFERENTIATED.values()],
                         ids=[*FUNCTIONS, *UNDIFFERENTIATED])  # fmt: skip
def test_functions(case):
    function, *arguments = case
    function(*arguments)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("case", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients(case):
    gradient, *arguments = gradient_of(case)
    gradient(*arguments)


SHALLOW = tfm.Transformer(
    dataclasses.replace(BOTH.config, num_encoder_layers=1, num_decoder_layers=1)
)


@pytest.fixture
def optimizer():
    return tfm.make_optimizer(tfm.paper_schedule(8), 1.0)


@pytest.fixture
def state(optimizer):
    return tfm.init_state(SHALLOW, optimizer, KEY)


@pytest.mark.slow
@pytest.mark.usefixtures("mode")
def test_a_step_of_training(optimizer, state):
    step = tfm.make_train_step(SHALLOW, optimizer, bos=1, logit_chunk=4, accumulation=2)
    tfm.skip_nonfinite(step)(state, BATCH)


def test_no_key_is_used_twice(optimizer):
    """Of typed ones, which JAX keeps count of; by a model of several layers."""
    model = tfm.Transformer(dataclasses.replace(SCANNED.config, scan_layers=False))
    step = tfm.skip_nonfinite(tfm.make_train_step(model, optimizer, bos=1, accumulation=2))
    state, _ = step(tfm.init_state(model, optimizer, jax.random.key(0)), BATCH)
    step(state, BATCH)
    params = {"params": state.params}
    model.apply(params, IDS, IDS, dropout_key=jax.random.key(1))
    step, cache = tfm.start_decoding(model, state.params, IDS, 2, 3)
    tfm.sample(step, cache, jax.random.key(2), bos=1, eos=2, max_length=3)
    key = jax.random.key(3)
    tfm.dropout(key, X, 0.5)
    with pytest.raises(jax.errors.KeyReuseError):
        tfm.dropout(key, X, 0.5)


@pytest.mark.usefixtures("mode")
def test_decoding():
    params = MODEL.init(KEY, IDS, IDS)["params"]
    step, cache = tfm.start_decoding(MODEL, params, IDS, 2, 3)
    for search in (tfm.greedy, tfm.beam_search, partial(tfm.sample, key=KEY, top_p=0.5)):
        search(step, cache, bos=1, eos=2, max_length=3)
    assert jnp.isfinite(step(jnp.ones((2, 2), jnp.int32), 0, cache)[0]).all()
