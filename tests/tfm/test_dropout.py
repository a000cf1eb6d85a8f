import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_gradients_right, assert_refuses

from tfm import dropout

KEY = jax.random.PRNGKey(0)  # a raw one, which several calls may use

# One compilation serves all tests with the same shapes; an eager call compiles each operation.
drop = jax.jit(dropout, static_argnames="rate")


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.999])
def test_an_element_is_dropped_with_the_rounded_rate_or_rescaled_by_it(rate):
    p = min(round(256 * rate), 255) / 256
    count = 1_000_000
    out = np.asarray(drop(KEY, np.full(count, 3.0), rate))
    dropped = out == 0
    np.testing.assert_allclose(out[~dropped], 3 / (1 - p), rtol=1e-6)
    assert abs(dropped.mean() - p) < 4 * (p * (1 - p) / count) ** 0.5
    # E[out] = x; the standard error of the mean is x * sqrt(p / (1 - p) / count).
    assert abs(out.mean() - 3) < 4 * 3 * (p / (1 - p) / count) ** 0.5


def test_neighbours_are_dropped_independently():
    # Four bytes come from one random word; none may tell about another.
    dropped = np.asarray(drop(KEY, np.ones(1_000_000), 0.5)) == 0
    for distance in (1, 2, 3, 4):
        both = (dropped[distance:] & dropped[:-distance]).mean()
        assert abs(both - 0.25) < 0.002


@pytest.mark.parametrize("shape", [(), (3, 7), (2, 3, 4)])
def test_any_shape_and_the_same_mask_for_the_same_key(shape):
    x = np.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    first, second = np.asarray(drop(KEY, x, 0.5)), np.asarray(drop(KEY, x, 0.5))
    assert first.shape == shape
    assert ((first == 0) | (first == 2 * x)).all()
    assert (first == second).all()


def test_another_key_gives_another_mask():
    x = np.ones(1000)
    same = np.asarray(drop(KEY, x, 0.5)) == np.asarray(drop(jax.random.key(1), x, 0.5))
    assert 0.4 < same.mean() < 0.6


def test_rate_zero_is_the_identity(rng):
    x = jnp.asarray(rng.standard_normal((3, 7)))
    assert_close(dropout(KEY, x, 0), x, 0)
    assert_close(dropout(KEY, x, 0.0), x, 0)


def test_the_mask_does_not_depend_on_the_values(rng):
    x = rng.standard_normal(1000)
    assert_close(drop(KEY, x, 0.5), x * np.asarray(drop(KEY, np.ones(1000), 0.5)), 1e-6)


@pytest.mark.gives_nan
def test_what_is_dropped_does_not_leak_even_if_it_is_not_finite():
    dropped = np.asarray(drop(KEY, np.ones(1000), 0.5)) == 0
    assert np.isfinite(drop(KEY, np.where(dropped, np.nan, 1.0), 0.5)).all()


def test_dropout_gradients(rng, x64):
    assert_gradients_right(lambda x: dropout(KEY, x, 0.3), rng.standard_normal((3, 7)))


def test_eager_is_jit_and_keys_may_be_vmapped(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 5)))
    keys = jax.random.split(KEY, (2, 3))
    one_by_one = [[dropout(keys[i, j], x[i, j], 0.5) for j in range(3)] for i in range(2)]
    vmapped = jax.jit(jax.vmap(jax.vmap(lambda key, x: dropout(key, x, 0.5))))(keys, x)
    assert_close(vmapped, one_by_one, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_dtype_stays(x64, dtype):
    assert jax.eval_shape(lambda x: dropout(KEY, x, 0.5), jnp.ones(8, dtype)).dtype == dtype


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(rate):
    words = ["rate", str(rate)]
    assert_refuses(dropout, KEY, jnp.ones(3), rate, words=words, error=ValueError)


def test_a_traced_rate_drops_as_the_number_does(rng):
    x = jnp.float32(rng.standard_normal(1000))
    traced = jax.jit(dropout)
    for rate in (0.0, 0.1, 0.5, 0.999):
        assert_close(traced(KEY, x, rate), dropout(KEY, x, rate), 1e-6)


@pytest.mark.gives_nan
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, np.nan])
def test_a_traced_rate_outside_zero_to_one_gives_nan(rate):
    assert np.isnan(jax.jit(dropout)(KEY, jnp.ones(9), rate)).all()


@pytest.mark.parametrize("dtype", [np.uint8, int, bool])
def test_integers_are_numbers(dtype):
    expected = dropout(KEY, jnp.ones(1000), 0.1)
    assert_close(dropout(KEY, np.ones(1000, dtype), 0.1), expected, 0)
