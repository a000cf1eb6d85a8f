"""What every function of the functional core must pass, whatever its formula is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def assert_transforms_agree(function, *arguments, in_axes=0):
    """Eager = jit, and a batch of two leading axes = the function vmapped over each of them.

    in_axes: as in jax.vmap; None for an argument (a weight) that all examples share.
    """
    arguments = jax.tree.map(jnp.asarray, arguments)
    eager = function(*arguments)
    vmapped = jax.vmap(jax.vmap(function, in_axes), in_axes)
    assert_close(jax.jit(function)(*arguments), eager, 1e-5)
    assert_close(jax.jit(vmapped)(*arguments), eager, 1e-5)


def assert_gradients_right(function, *arguments, modes=("fwd", "rev")):
    """Automatic derivatives equal finite differences; call it in x64."""
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arguments)
    check_grads(jax.jit(function), arguments, order=1, modes=modes, atol=1e-6, rtol=1e-6)


def assert_default_precision(function, *arguments):
    """The result is f32, or the widest of the inputs. Types are derived, nothing is computed."""
    bf16, f32, f64 = jnp.bfloat16, jnp.float32, jnp.float64
    with jax.enable_x64(True):
        for first, others, expected in [
            (bf16, bf16, f32),
            (f32, bf16, f32),
            (f32, f32, f32),
            (f64, f32, f64),
            (f64, f64, f64),
        ]:
            kinds = [first] + [others] * (len(arguments) - 1)
            cast = [jnp.asarray(x, kind) for x, kind in zip(arguments, kinds, strict=True)]
            result = jax.eval_shape(function, *cast)
            assert result.dtype == expected, (first, others, result.dtype)


def assert_refuses(function, *arguments, words, error=(ValueError, AssertionError)):
    """The call fails, and the message contains each of the words."""
    with pytest.raises(error) as caught:
        function(*arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def relative_error(actual, expected):
    """‖actual - expected‖ / ‖expected‖"""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def products_in(function, *arguments, sums_of=None):
    """(left operand, right operand, result) types of each product in the lowered function.

    But for those with [8, sums_of] ones that `precision.broadcast_row` sums so many rows with.
    """
    text = jax.jit(function).lower(*arguments).as_text()
    operands = r"\(tensor<(\S*)x(\w+)>, tensor<(\S*)x(\w+)>\) -> tensor<\S*x(\w+)>"
    return [
        (left_type, right_type, result)
        for left, left_type, right, right_type, result in re.findall(
            rf"dot_general.*: {operands}", text
        )
        if f"8x{sums_of}" not in (left, right)
    ]
