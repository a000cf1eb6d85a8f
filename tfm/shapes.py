"""Assertions on arguments whose message names the argument and what it had to agree with."""

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

ArrayTree = Any
"""A tree of arrays: dicts, tuples and the like, as `jax.tree` takes them apart."""

Number = float | Array
"""A number, which may be traced."""


def is_traced(x: Any) -> bool:
    """Whether x is a tracer, of `jax.jit`, `jax.vmap` or `jax.grad`."""
    return isinstance(x, jax.core.Tracer)


def assert_fits(
    name: str, array: Array, expected: Sequence[int | EllipsisType | None], **others: Array
) -> None:
    """Asserts that `array` has the `expected` shape (None and ... match anything).

    Raises:
      AssertionError: names the argument, its shape, and the arguments it had to agree with.
      TypeError: no array, but a list, say.
    """
    if not hasattr(array, "shape"):
        kind = type(array).__name__
        raise TypeError(f"argument {name} must be an array, not a {kind}: jnp.asarray({name})")
    agreement = ", ".join(f"{other} {value.shape}" for other, value in others.items())
    message = f"argument {name} {array.shape}" + (f" does not fit {agreement}" if others else "")
    chex.assert_shape(array, tuple(expected), custom_message=message)


def assert_broadcasts(name: str, array: Array, shape: Sequence[int], axes: str = "") -> None:
    """Asserts that `array` broadcasts to `shape`, whose `axes` the message names.

    Raises:
      AssertionError: names the argument and both shapes.
    """
    message = f"argument {name} {array.shape} does not broadcast to {tuple(shape)}"
    message += f", of axes {axes}" if axes else ""
    chex.assert_is_broadcastable(array.shape, tuple(shape), custom_message=message)


def assert_attends(query: Array, key: Array, mask: Array | None, bias: Array | None) -> None:
    """Asserts that queries [..., L, d_k] fit keys [..., K, d_k], and that a boolean mask and a bias
    broadcast to their logits [..., L, K] with as many axes, or are [L, K].

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean, or the bias is.
    """
    assert_fits("query", query, (..., None, None))
    assert_fits("key", key, (*query.shape[:-2], None, query.shape[-1]), query=query)
    shape = (*query.shape[:-1], key.shape[-2])
    for name, given in {"mask": mask, "bias": bias}.items():
        if given is None:
            continue
        assert_fits(name, given, (...,))
        if name == "mask" and given.dtype != jnp.bool_:
            raise TypeError(f"mask must be boolean (True = may attend), not {given.dtype}")
        if name == "bias" and given.dtype == jnp.bool_:
            raise TypeError("bias must be numbers, which are added to the logits; bool is a mask")
        assert_broadcasts(name, given, shape, "[..., L, K]; [H, 1, 1] if of the heads")
        if 2 < given.ndim < len(shape):
            raise AssertionError(
                f"argument {name} {given.shape} has fewer axes than the logits {shape}: write "
                f"{name}[:, None] if its first is that of the examples, {name}[None] if of the "
                "heads"
            )


def assert_ids(name: str, ids: ArrayLike, size: int) -> None:
    """Asserts that concrete `ids` lie in [0, size); traced ones have no values to look at.

    Raises:
      ValueError: names the argument, the first id outside, and the size.
    """
    if is_traced(ids):
        return
    numbers = np.asarray(ids)
    outside = numbers[(numbers < 0) | (numbers >= size)]
    if outside.size:
        raise ValueError(f"argument {name} holds {outside[0]}, outside the {size} ids [0, {size})")


def as_ids(x: Array) -> Array:
    """Integers of at least 32 bits: in fewer, the size of a vocabulary may not fit."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.int32))


def are_known(*arrays: Array) -> bool:
    """Whether all sizes are numbers: `jax.export` has symbolic ones too, which have no order."""
    return all(isinstance(size, int) for array in arrays for size in array.shape)


def nan_unless(condition: ArrayLike, x: Array) -> Array:
    """x where the condition holds, else NaN: what a compiled function answers to a wrong argument.

    The NaN comes from a look-up outside a table: `jax_debug_nans` would find a constant everywhere.
    """
    outside = jnp.where(condition, 0, 1)
    nan = jnp.zeros(1, jnp.result_type(x)).at[outside].get(mode="fill")
    return jnp.where(condition, x, nan)


def with_axes(x: Array, ndim: int) -> Array:
    """x with leading axes of 1, so that it has `ndim` of them."""
    return lax.expand_dims(jnp.asarray(x), range(ndim - jnp.ndim(x)))
