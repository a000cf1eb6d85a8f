from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from checks import (
    assert_close,
    assert_default_precision,
    assert_gradients_right,
    assert_refuses,
    assert_transforms_agree,
    products_in,
    relative_error,
)

from tfm import dropout, feed_forward
from tfm.feed_forward import ACTIVATIONS


def inputs(rng, leading=(3,), d_model=4, d_ff=6):
    """x, w1, b1, w2, b2."""
    shapes = [(*leading, d_model), (d_model, d_ff), (d_ff,), (d_ff, d_model), (d_model,)]
    return [rng.standard_normal(shape) for shape in shapes]


def test_a_worked_example():
    # x = (1, 2); x W1 + b1 = (1 - 2, 1 + 2) + (0, 1) = (-1, 4), of which (0, 4) is left.
    x, w1, b1 = jnp.array([1.0, 2.0]), jnp.array([[1.0, 1.0], [-1.0, 1.0]]), jnp.array([0.0, 1.0])
    w2, b2 = jnp.array([[100.0, 100.0], [0.5, -0.5]]), jnp.array([10.0, 20.0])
    assert feed_forward(x, w1, b1, w2, b2).tolist() == [12.0, 18.0]


@pytest.mark.parametrize("shape", [{"d_model": 1, "d_ff": 1}, {"leading": (2, 3)}])
def test_feed_forward_equals_the_reference(rng, tolerance, shape):
    arguments = inputs(rng, **shape)
    expected = references.feed_forward(*arguments)
    assert_close(jax.jit(feed_forward)(*arguments), expected, tolerance)


@pytest.mark.parametrize("name", ["relu", "swish", "gelu"])
def test_other_activations(rng, name):
    arguments = inputs(rng)
    expected = references.activated_feed_forward(*arguments, getattr(references, name))
    actual = feed_forward(*arguments, activation=ACTIVATIONS[name])
    assert_close(actual, expected, 1e-5)


def test_dropout_acts_on_the_hidden_features(rng):
    x, w1, b1, w2, b2 = inputs(rng, leading=(64,), d_ff=512)
    key = jax.random.key(0)
    rate = 0.25
    hidden = dropout(key, jnp.maximum(jnp.dot(x, w1, precision="highest") + b1[None], 0), rate)
    expected = np.asarray(hidden) @ w2 + b2
    dropped = feed_forward(x, w1, b1, w2, b2, dropout_key=jax.random.clone(key), dropout_rate=rate)
    assert_close(dropped, expected, 1e-4)
    assert not np.allclose(dropped, feed_forward(x, w1, b1, w2, b2), atol=0.1)


def test_positions_do_not_see_each_other(rng):
    jacobian = jax.jit(jax.jacrev(feed_forward))(*inputs(rng))  # by x, the first argument
    influence = np.abs(jacobian).max((1, 3))  # [L, L]
    assert (influence[~np.eye(3, dtype=bool)] == 0).all()
    assert (influence.diagonal() > 0).all()


def test_feed_forward_gradients(rng, x64):
    assert_gradients_right(feed_forward, *inputs(rng))


def test_feed_forward_under_jit_vmap_and_in_each_precision(rng):
    arguments = inputs(rng, leading=(2, 3, 5))
    assert_transforms_agree(feed_forward, *arguments, in_axes=(0, None, None, None, None))
    assert_default_precision(feed_forward, *arguments)


def test_bfloat16_compute_stays_within_two_percent(rng):
    arguments = inputs(rng, (16,), 32, 64)
    run = jax.jit(feed_forward, static_argnames="compute_dtype")
    rounded = run(*arguments, compute_dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, run(*arguments)) < 0.02
    products = products_in(lambda *x: feed_forward(*x, compute_dtype=jnp.bfloat16), *arguments)
    assert products == [("bf16", "bf16", "f32")] * 2


@pytest.mark.parametrize(
    ("position", "shape", "words"),
    [
        (0, (), ["x", "()"]),
        (1, (5, 6), ["w1", "(5, 6)", "x", "(3, 4)"]),
        (2, (5,), ["b1", "(5,)", "w1", "(4, 6)"]),
        (3, (5, 4), ["w2", "(5, 4)", "w1", "(4, 6)"]),
        (3, (6, 5), ["w2", "(6, 5)", "x", "(3, 4)"]),
        (4, (5,), ["b2", "(5,)", "w2", "(6, 4)"]),
    ],
)
def test_feed_forward_refuses_shapes_that_do_not_fit(rng, position, shape, words):
    arguments = [jnp.asarray(x) for x in inputs(rng)]
    arguments[position] = jnp.zeros(shape)
    assert_refuses(feed_forward, *arguments, words=words)


def test_integers_are_numbers_and_the_weights_have_gradients(rng):
    x, *weights = inputs(rng)
    whole, weights = jnp.round(3 * x).astype(int), [jnp.float32(w) for w in weights]
    w1, b1, w2, b2 = weights
    b1 = jnp.round(3 * b1).astype(int)
    total = lambda x, w1, b1, w2, b2: jnp.sin(feed_forward(x, w1, b1, w2, b2)).sum()  # noqa: E731
    for argument in (1, 3, 4):
        gradients = [
            jax.grad(total, argnums=argument)(kind(whole), w1, kind(b1), w2, b2)
            for kind in (jnp.asarray, jnp.float32)
        ]
        assert_close(*gradients, 1e-6)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_of_no_positions_there_is_nothing(rng, leading):
    x, *weights = map(jnp.asarray, inputs(rng, leading=leading))
    assert feed_forward(x, *weights).shape == (*leading, 4)
    gradients = jax.grad(lambda *w: feed_forward(x, *w).sum(), argnums=(0, 1, 2, 3))(*weights)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("compute_dtype", [None, jnp.bfloat16])
def test_forward_over_reverse(rng, compute_dtype):
    arguments = [jnp.float32(x) for x in inputs(rng)]
    directions = tuple(jnp.float32(x) for x in inputs(rng))

    def total(*arguments):
        return jnp.sin(feed_forward(*arguments, compute_dtype=compute_dtype)).sum()

    gradient = jax.grad(total, argnums=tuple(range(5)))
    _, products = jax.jvp(gradient, tuple(arguments), directions)

    def along(*arguments):
        return sum(map(jnp.vdot, gradient(*arguments), directions))

    expected = jax.grad(along, argnums=tuple(range(5)))(*arguments)
    for one, other in zip(products, expected, strict=True):
        assert relative_error(one, other) < (1e-5 if compute_dtype is None else 0.05)


def test_a_rate_outside_zero_to_one_is_refused(rng):
    call = partial(feed_forward, *inputs(rng), dropout_key=jax.random.key(0))
    assert_refuses(lambda: call(dropout_rate=1.5), words=["rate", "1.5"], error=ValueError)
