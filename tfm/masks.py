"""§3.1, §3.2.3 What a position may know: masks, and the decoder's input one position later.

Masks are boolean, True = may attend; all broadcast to [..., H, L, K].
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tfm.compilation import compiled
from tfm.shapes import as_ids, assert_broadcasts, assert_fits, with_axes


@compiled(static=("length",))
def causal_mask(length: int) -> Array:
    """Position i may attend to positions j ≤ i: [L, L]."""
    return jnp.tril(jnp.ones((length, length), bool))


@compiled()
def padding_mask(tokens: Array, pad_id: ArrayLike = 0) -> Array:
    """Every position may attend to real tokens only.

    tokens: [..., K] ids -> [..., 1, 1, K], the same for every head and query.
    """
    assert_fits("tokens", tokens, (..., None))
    return (tokens != pad_id)[..., None, None, :]


@compiled()
def segment_mask(query_segments: Array, key_segments: Array) -> Array:
    """Positions of packed rows may attend within their own sequence; segment 0 is padding.

    query_segments: [..., L], key_segments: [..., K] -> [..., 1, L, K], the same for every head.
    """
    assert_fits("query_segments", query_segments, (..., None))
    leading = query_segments.shape[:-1]
    assert_fits("key_segments", key_segments, (*leading, None), query_segments=query_segments)
    query_segments, key_segments = query_segments[..., :, None], key_segments[..., None, :]
    return ((query_segments == key_segments) & (key_segments != 0))[..., None, :, :]


@compiled()
def shift_right(labels: Array, bos: ArrayLike, positions: Array | None = None) -> Array:
    """The decoder's input: each sequence of `labels` offset by one position, after `bos` (§3.1).

    labels: [..., T] -> [..., T]; `positions` [..., T] says where sequences of a packed row start.
    """
    assert_fits("labels", labels, (..., None))
    labels = as_ids(labels)
    if positions is None:
        positions = jnp.arange(labels.shape[-1])
    assert_broadcasts("positions", positions, labels.shape)
    starts = with_axes(positions == 0, labels.ndim)
    return jnp.where(starts, bos, jnp.roll(labels, 1, axis=-1))
