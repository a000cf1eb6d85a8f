"""What decoding remembers (§6.1): keys and values, of the source and of the positions so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LayerCache(NamedTuple):
    """Keys and values of K positions: of the source's, or of those that were decoded so far.

    The keys lie transposed, as QKᵀ wants them: no step then has to turn them all.
    """

    key: Array  # [B, H, d_k, K]
    value: Array  # [B, H, K, d_k]

    def pair(self) -> tuple[Array, Array]:
        """Keys and values [B, H, K, d_k]; XLA takes the one transposition against the other."""
        return jnp.swapaxes(self.key, -1, -2), self.value

    def write(self, key: Array, value: Array, position: Array) -> "LayerCache":
        """The cache with those of some positions [B, H, L, d_k] written from `position` on."""
        update = jax.lax.dynamic_update_slice_in_dim
        keys = update(self.key, jnp.swapaxes(key, -1, -2), position, -1)
        return LayerCache(keys, update(self.value, value, position, -2))


class Memory(NamedTuple):
    """What decoding needs of the source: each decoder layer's cross-attention keys and values."""

    layers: tuple[LayerCache, ...]  # of K = S positions
    mask: Array  # [B, 1, 1, S]


class SharedCache(NamedTuple):
    """What stays in its place when hypotheses branch."""

    layers: tuple[LayerCache, ...]  # of K = T·W positions: the W rows of each side by side


class Cache(NamedTuple):
    """What decoding remembers of the positions so far.

    Beam search lets hypotheses branch at each position. Their keys and values are not copied for
    that: they stay in the row that wrote them, and `rows` alone goes with a hypothesis. A step's
    self-attention then takes W² in the place of W times T products, which for beams costs less than
    the copies; for very many samples, repeat the source along B in the place of W.
    """

    rows: Array  # [B, W, T], the row, of W, where each position of a hypothesis is written
    written: SharedCache
