"""§3.2.3 Who may attend to whom. Boolean, True = may attend; all broadcast to [..., H, L, K]."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tfm.compilation import compiled
from tfm.shapes import assert_fits


def causal_mask(length: int) -> Array:
    """Position i may attend to positions j ≤ i: [L, L]."""
    return jnp.tril(jnp.ones((length, length), bool))


@compiled
def padding_mask(tokens: Array, pad_id: ArrayLike = 0) -> Array:
    """Every position may attend to real tokens only.

    tokens: [..., K] ids -> [..., 1, 1, K], the same for every head and query.
    """
    assert_fits("tokens", tokens, (..., None))
    return (tokens != pad_id)[..., None, None, :]


@compiled
def segment_mask(query_segments: Array, key_segments: Array) -> Array:
    """Positions of packed rows may attend within their own sequence; segment 0 is padding.

    query_segments: [..., L], key_segments: [..., K] -> [..., 1, L, K], the same for every head.
    """
    assert_fits("query_segments", query_segments, (..., None))
    leading = query_segments.shape[:-1]
    assert_fits("key_segments", key_segments, (*leading, None), query_segments=query_segments)
    query_segments, key_segments = query_segments[..., :, None], key_segments[..., None, :]
    return ((query_segments == key_segments) & (key_segments != 0))[..., None, :, :]
