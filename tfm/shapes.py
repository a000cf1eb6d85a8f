"""Assertions on arguments whose message names the argument and what it had to agree with."""

from collections.abc import Sequence
from types import EllipsisType

import chex
import jax
import numpy as np
from jax import Array


def assert_fits(
    name: str, array: Array, expected: Sequence[int | EllipsisType | None], **others: Array
) -> None:
    """Asserts that `array` has the `expected` shape (None and ... match anything).

    Raises:
      AssertionError: names the argument, its shape, and the arguments it had to agree with.
    """
    agreement = ", ".join(f"{other} {value.shape}" for other, value in others.items())
    message = f"argument {name} {array.shape}" + (f" does not fit {agreement}" if others else "")
    chex.assert_shape(array, tuple(expected), custom_message=message)


def assert_broadcasts(name: str, array: Array, shape: Sequence[int]) -> None:
    """Asserts that `array` broadcasts to `shape`, without adding to it.

    Raises:
      AssertionError: names the argument and both shapes.
    """
    message = f"argument {name} {array.shape} does not broadcast to {tuple(shape)}"
    chex.assert_is_broadcastable(array.shape, tuple(shape), custom_message=message)


def assert_ids(name: str, ids: Array, size: int) -> None:
    """Asserts that concrete `ids` lie in [0, size); traced ones have no values to look at.

    Raises:
      ValueError: names the argument, the first id outside, and the size.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.size:
        raise ValueError(f"argument {name} holds {outside[0]}, outside the {size} ids [0, {size})")
