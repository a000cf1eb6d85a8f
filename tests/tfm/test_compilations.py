"""A public function called a second time, un-jitted, compiles nothing; nor does its gradient."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_functions import (
    B1,
    BATCH,
    FUNCTIONS,
    IDS,
    KEY,
    MODEL,
    MODELS,
    TREE,
    UNDIFFERENTIATED,
    W1,
    W2,
    B,
    X,
    gradient_of,
)  # fmt: skip

import tfm

COMPILED = []
EVENT = "/jax/core/compile/backend_compile_duration"


@jax.monitoring.register_event_duration_secs_listener
def listener(event, duration, **_):
    if event == EVENT:
        COMPILED.append(duration)


def compilations(function, *arguments):
    """Those of the second of two equal calls."""
    function(*arguments)
    before = len(COMPILED)
    function(*arguments)
    return len(COMPILED) - before


def test_the_count_sees_a_compilation():
    assert compilations(lambda: jax.lax.map(lambda x: x + 1, B)) == 1


@pytest.mark.parametrize("case", [*FUNCTIONS.values(), *UNDIFFERENTIATED.values()],
                         ids=[*FUNCTIONS, *UNDIFFERENTIATED])  # fmt: skip
def test_a_second_call_compiles_nothing(case):
    assert compilations(*case) == 0


def compiled_in(function, *arguments):
    """The functions of `tfm` that are compiled by themselves inside of this one."""
    modules = [value for value in vars(tfm).values() if inspect.ismodule(value)]
    own = {
        name for module in modules for name, f in vars(module).items() if hasattr(f, "__wrapped__")
    }
    operations = str(jax.make_jaxpr(function)(*arguments))
    return own & set(re.findall(r"jit\[\s*name=(\w+)", operations))


def test_a_jit_inside_is_seen():
    assert compiled_in(jax.jit(tfm.layer_norm.__wrapped__), X, B, B) == {"layer_norm"}
    loss = jax.jit(tfm.label_smoothed_cross_entropy.__wrapped__, static_argnums=(3, 4))
    found = compiled_in(lambda z: loss(z, IDS, 0.1, "all", 8), X)
    assert found == {"label_smoothed_cross_entropy"}


@pytest.mark.parametrize("case", FUNCTIONS.values(), ids=FUNCTIONS)
def test_inside_another_jit_it_is_a_part_of_that_one(case):
    function, *arguments = case
    assert not compiled_in(function, *arguments)


def test_inside_another_jit_a_model_is_a_part_of_it():
    params = MODEL.init(KEY, IDS, IDS)["params"]
    assert not compiled_in(lambda p, batch: tfm.summed_loss(MODEL, p, batch, 1, 0.1), params, BATCH)

    def search(params, ids):
        step, cache = tfm.start_decoding(MODEL, params, ids, 2, 3)
        return tfm.beam_search(step, cache, bos=1, eos=2, max_length=3)

    assert not compiled_in(search, params, IDS)


@pytest.mark.parametrize("case", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_second_gradient_compiles_nothing(case):
    assert compilations(*gradient_of(case)) == 0


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_second_pass_through_a_model_compiles_nothing(model):
    params = model.init(KEY, IDS, IDS)
    assert compilations(model.apply, params, IDS, IDS) == 0
    loss = lambda p: model.apply(p, IDS, IDS, dropout_key=KEY).sum()  # noqa: E731
    assert compilations(jax.grad(loss), params) == 0


def test_a_second_step_of_training_compiles_nothing():
    optimizer = tfm.make_optimizer(tfm.paper_schedule(8), 1.0)
    step = tfm.make_train_step(MODEL, optimizer, bos=1, accumulation=2, logit_chunk=4)
    state = tfm.init_state(MODEL, optimizer, KEY)
    assert compilations(tfm.skip_nonfinite(step), state, BATCH) == 0


def test_a_second_loss_compiles_nothing():
    params = MODEL.init(KEY, IDS, IDS)["params"]
    for logit_chunk in (None, 4):
        loss = partial(tfm.summed_loss, bos=1, smoothing=0.1, logit_chunk=logit_chunk)
        assert compilations(lambda p, loss=loss: loss(MODEL, p, BATCH), params) == 0
        gradient = jax.grad(lambda p, loss=loss: loss(MODEL, p, BATCH)[0])
        assert compilations(gradient, params) == 0


@pytest.mark.parametrize("quantized", [False, True], ids=["f32", "int8"])
def test_a_search_for_other_sources_compiles_nothing(quantized):
    params = MODEL.init(KEY, IDS, IDS)["params"]
    params = tfm.quantize(params) if quantized else params
    searches = [tfm.beam_search, tfm.greedy, partial(tfm.sample, key=KEY, top_p=0.9)]

    def decode(source):
        for search in searches:
            step, cache = tfm.start_decoding(MODEL, params, source, 2, 5)
            step(jnp.ones((2, 2), jnp.int32), 0, cache)
            search(step, cache, bos=1, eos=2, max_length=5)

    others = IDS + 1
    decode(IDS)
    before = len(COMPILED)
    decode(others)
    assert len(COMPILED) == before


NUMBERS = {
    "smoothing": lambda x: tfm.label_smoothed_cross_entropy(X, IDS + 1, x),
    "dropout rate": lambda x: tfm.dropout(KEY, X, x),
    "rate in the network": lambda x: tfm.feed_forward(
        X, W1, B1, W2, B, dropout_key=KEY, dropout_rate=x
    ),
    "epsilon": lambda x: tfm.layer_norm(X, B, B, x),
    "threshold": lambda x: tfm.clip_by_global_norm(TREE, x),
    "temperature": lambda x: search_with(partial(tfm.sample, key=KEY, temperature=x)),
    "top_p": lambda x: search_with(partial(tfm.sample, key=KEY, top_p=x)),
    "alpha": lambda x: search_with(partial(tfm.beam_search, alpha=x)),
}


# A pytree, as a function made anew for each call is not.
STEP = jax.tree_util.Partial(
    lambda logits, tokens, index, cache: (logits, cache),
    jnp.broadcast_to(jnp.arange(5.0), (2, 2, 5)),
)


def search_with(search):
    return search(STEP, jnp.ones((2, 2)), bos=1, eos=2, max_length=3)


@pytest.mark.parametrize("of", NUMBERS.values(), ids=NUMBERS)
def test_another_number_compiles_nothing_and_it_may_be_traced(of):
    of(0.25)
    before = len(COMPILED)
    expected = of(0.5)
    assert len(COMPILED) == before
    traced = jax.jit(of)(0.5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), traced, expected)


@pytest.mark.parametrize("number", [np.int64, jnp.int32, np.asarray])
def test_a_size_as_an_array_compiles_nothing_the_second_time(number):
    sizes = {"bos": number(1), "max_length": number(3)}
    for search in (tfm.greedy, partial(tfm.sample, key=KEY, top_k=number(2)), tfm.beam_search):
        assert compilations(lambda s=search: s(STEP, jnp.ones((2, 2)), eos=2, **sizes)) == 0
    assert compilations(lambda: tfm.causal_mask(number(4))) == 0
