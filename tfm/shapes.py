"""Shape assertions whose message names the argument and every shape involved."""

from collections.abc import Sequence
from types import EllipsisType

import chex
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
