"""§5.4 Residual dropout."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def dropout(key: Array, x: Array, rate: float) -> Array:
    """Inverted dropout: 0 with probability p, else x / (1 − p), so that E[out] = x (§5.4).

    One random byte decides an element, four to a 32-bit draw, which makes the mask several times
    cheaper than one draw an element. So p is `rate` rounded to a multiple of 1/256, and the
    rescaling uses that p exactly: the expectation stays right.

    Args:
      key: a PRNG key.
      x: any shape.
      rate: in [0, 1), a Python number; 0 is the identity.

    Raises:
      ValueError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), not {rate}")
    threshold = min(round(rate * 256), 255)
    if threshold == 0:
        return x
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    bytes_ = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(bytes_ >= threshold, x * (256 / (256 - threshold)), 0)
