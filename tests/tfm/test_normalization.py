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
)

from tfm import layer_norm

# One compilation serves all tests with the same shapes; an eager call compiles each operation.
normalise = jax.jit(layer_norm)


def inputs(rng, leading=(2, 3), d_model=6):
    """x, scale, bias."""
    return [rng.standard_normal(shape) for shape in [(*leading, d_model), (d_model,), (d_model,)]]


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
@pytest.mark.parametrize("d_model", [2, 6])
def test_layer_norm_equals_the_reference(rng, tolerance, d_model, epsilon):
    arguments = inputs(rng, d_model=d_model)
    expected = references.layer_norm(*arguments, epsilon)
    assert_close(normalise(*arguments, epsilon), expected, tolerance)


def test_the_variance_is_biased_and_epsilon_stands_inside_the_root():
    # The mean is 0 and the variance 10^-6, as large as epsilon: each element over sqrt(2 * 10^-6).
    x = np.array([1e-3, -1e-3])
    normalised = normalise(x, np.ones(2), np.zeros(2))
    assert_close(normalised, [0.5**0.5, -(0.5**0.5)], 1e-6)


def test_mean_is_the_bias_and_deviation_the_scale(rng):
    x = 5 + 3 * rng.standard_normal((4, 64))
    normalised = np.asarray(normalise(x, np.full(64, 2.0), np.full(64, 7.0)))
    assert_close(normalised.mean(-1), np.full(4, 7.0), 1e-5)
    assert_close(normalised.std(-1), np.full(4, 2.0), 1e-5)


def test_shifting_and_scaling_a_row_changes_nothing(rng):
    x, scale, bias = inputs(rng)
    assert_close(normalise(3 * x + 5, scale, bias, 0.0), normalise(x, scale, bias, 0.0), 1e-5)


def test_a_large_mean_does_not_drown_the_variance(rng):
    # Multiples of 1/64 stay exact beside 10^4, so only the function itself can lose digits.
    x, scale, bias = inputs(rng)
    x = np.round(x * 64) / 64
    shifted = normalise(x + 1e4, scale, bias)
    assert_close(shifted, references.layer_norm(x, scale, bias, 1e-6), 2e-3)


def test_a_constant_row_gives_the_bias_and_a_finite_gradient():
    x, scale, bias = np.full(4, 3.0), np.ones(4), np.arange(4.0)
    assert (normalise(x, scale, bias) == bias).all()
    gradient = jax.jit(jax.grad(lambda x: jnp.square(layer_norm(x, scale, bias)).sum()))(x)
    assert np.isfinite(gradient).all()


def test_layer_norm_gradients(rng, x64):
    assert_gradients_right(layer_norm, *inputs(rng))


def test_layer_norm_under_jit_vmap_and_in_each_precision(rng):
    arguments = inputs(rng, leading=(2, 3, 4))
    assert_transforms_agree(layer_norm, *arguments, in_axes=(0, None, None))
    assert_default_precision(layer_norm, *arguments)


@pytest.mark.parametrize(
    ("x", "scale", "bias", "words"),
    [
        ((), (4,), (4,), ["x", "()"]),
        ((2, 4), (5,), (4,), ["scale", "(5,)", "x", "(2, 4)"]),
        ((2, 4), (1, 4), (4,), ["scale", "(1, 4)", "x", "(2, 4)"]),
        ((2, 4), (4,), (1,), ["bias", "(1,)", "x", "(2, 4)"]),
    ],
)
def test_layer_norm_refuses_shapes_that_do_not_fit(x, scale, bias, words):
    assert_refuses(layer_norm, *map(jnp.zeros, (x, scale, bias)), words=words)
