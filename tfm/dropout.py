"""§5.4 Residual dropout, and where the layers apply it."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tfm.compilation import compiled
from tfm.kernels.precision import floating
from tfm.shapes import Number, assert_fits, is_traced, nan_unless


def assert_rate(rate: Number) -> None:
    """Asserts that a concrete rate is one.

    Raises:
      ValueError: it is outside [0, 1).
    """
    if not is_traced(rate) and not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), not {rate}")


def _check(key: Array, x: Array, rate: Number) -> None:
    assert_rate(rate)


def _drops(key: Array, x: Array, rate: Number) -> bool:
    return is_traced(rate) or _threshold(rate) > 0


def _threshold(rate: Any) -> int:
    return min(round(float(rate) * 256), 255)


@compiled(check=_check, compile_if=_drops)
def dropout(key: Array, x: Array, rate: Number) -> Array:
    """Inverted dropout: 0 with probability p, else x / (1 − p), so that E[out] = x (§5.4).

    One random byte decides an element, four to a 32-bit draw, which makes the mask several times
    cheaper than one draw an element. So p is `rate` rounded to a multiple of 1/256, and the
    rescaling uses that p exactly: the expectation stays right.

    A key of its own for each example is `jax.vmap(dropout, (0, 0, None))(jax.random.split(key, B),
    x, rate)`.

    Args:
      key: a PRNG key.
      x: any shape.
      rate: in [0, 1); 0 is the identity. A traced one outside gives NaN.

    Raises:
      ValueError: a rate outside [0, 1).
    """
    assert_fits("x", x, (...,))
    (x,) = floating(jnp.asarray(x))
    if is_traced(rate):
        is_rate = (rate >= 0) & (rate < 1)
        rounded = jnp.where(is_rate, jnp.minimum(jnp.round(rate * 256), 255), 0)
        threshold: Number = rounded.astype(jnp.uint8)
        factor: Number = nan_unless(is_rate, 256 / (256 - rounded)).astype(x.dtype)
    else:
        threshold = _threshold(rate)
        if threshold == 0:
            return x
        factor = 256 / (256 - threshold)
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    bytes_ = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(bytes_ >= threshold, x * factor, 0).astype(x.dtype)


class EncoderDropout(enum.IntEnum):
    """Where an encoder layer drops out: each site has a key of its own, by its number.

    The numbers stay, so that a training of before goes on with the same keys.
    """

    ATTENTION_WEIGHTS = 0
    ATTENTION = 1
    FEED_FORWARD = 2
    HIDDEN = 5


class DecoderDropout(enum.IntEnum):
    """Where a decoder layer drops out."""

    SELF_ATTENTION = 0
    CROSS_ATTENTION = 1
    FEED_FORWARD = 2
    SELF_ATTENTION_WEIGHTS = 3
    CROSS_ATTENTION_WEIGHTS = 4
    HIDDEN = 5


def site_key(key: Array | None, site: int) -> Array | None:
    """The key of one dropout site: independent of the order in which sites are computed."""
    return None if key is None else jax.random.fold_in(key, int(site))
