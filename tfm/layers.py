"""§3.1 The layers: sub-layers in the paper's order, a residual connection around each."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tfm.cache import LayerCache
from tfm.config import TransformerConfig
from tfm.dropout import DecoderDropout, EncoderDropout, dropout, site_key
from tfm.functions import Functions
from tfm.parallel.sharding import constrain
from tfm.sublayers import FeedForward, Flag, LayerNorm, MultiHeadAttention


class Layer(nn.Module):
    """What encoder and decoder layers share: the residual connection around each sub-layer.

    post, the paper's: LayerNorm(x + Dropout(Sublayer(x)))
    pre:               x + Dropout(Sublayer(LayerNorm(x)))
    """

    config: TransformerConfig
    functions: Functions = Functions()

    def sublayer_input(self, norm: LayerNorm, x: Array) -> Array:
        """What a sub-layer reads: x, or pre-norm LayerNorm(x)."""
        return norm(x) if self.config.norm_placement == "pre" else x

    def after_attention(self, x: Array) -> Array:
        """The residual stream [..., L, D], as it is, for `tfm.activations`; likewise the others."""
        return x

    def after_feed_forward(self, x: Array) -> Array:
        return x

    def add_and_norm(self, norm: LayerNorm, x: Array, y: Array, key: Array | None) -> Array:
        """LayerNorm(x + Dropout(y)), "Add & Norm" of Figure 1; or pre-norm x + Dropout(y)."""
        y = constrain(y, "batch", None, None)
        if key is not None:
            y = dropout(key, y, self.config.dropout_rate)
        return x + y if self.config.norm_placement == "pre" else norm(x + y)


class EncoderLayer(Layer):
    def setup(self) -> None:
        self.attention = MultiHeadAttention(self.config, self.functions, "encoder")
        self.attention_norm = LayerNorm(self.config, self.functions)
        self.feed_forward = FeedForward(self.config, self.functions)
        self.feed_forward_norm = LayerNorm(self.config, self.functions)

    def __call__(
        self,
        x: Array,
        mask: Array,
        positions: Array,
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
        return_weights: bool | Flag = False,
    ) -> tuple[Array, Array | None]:
        """[..., S, D] -> the same, and with `return_weights` the attention's [..., H, S, S]."""
        key, site = partial(site_key, dropout_key), EncoderDropout

        q, k, v = self.attention.query_key_value(self.sublayer_input(self.attention_norm, x))
        at = positions, positions
        y, weights = self.attention.attend(
            q, k, v, mask, at, key(site.ATTENTION_WEIGHTS), head_mask, return_weights
        )
        x = self.add_and_norm(self.attention_norm, x, y, key(site.ATTENTION))
        x = self.after_attention(x)

        y = self.feed_forward(self.sublayer_input(self.feed_forward_norm, x), key(site.HIDDEN))
        x = self.add_and_norm(self.feed_forward_norm, x, y, key(site.FEED_FORWARD))
        return self.after_feed_forward(x), weights


class DecoderLayer(Layer):
    def setup(self) -> None:
        self.self_attention = MultiHeadAttention(self.config, self.functions, "decoder")
        self.self_attention_norm = LayerNorm(self.config, self.functions)
        self.cross_attention = MultiHeadAttention(self.config, self.functions, "cross")
        self.cross_attention_norm = LayerNorm(self.config, self.functions)
        self.feed_forward = FeedForward(self.config, self.functions)
        self.feed_forward_norm = LayerNorm(self.config, self.functions)

    def after_cross_attention(self, x: Array) -> Array:
        return x

    def memory(self, encoded: Array) -> LayerCache:
        """The cross-attention's keys and values of the encoder's output."""
        key, value = self.cross_attention.key_value(encoded)
        return LayerCache(jnp.swapaxes(key, -1, -2), value)

    def __call__(
        self,
        x: Array,
        encoded: Array,
        mask: Array,
        cross_mask: Array,
        positions: Array,
        source_positions: Array,
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
        cross_head_mask: Array | None = None,
        return_weights: bool | Flag = False,
    ) -> tuple[Array, Array | None, Array | None]:
        """[..., T, D] -> the same, and with `return_weights` those of the two attentions,
        [..., H, T, T] and [..., H, T, S]."""
        key, site = partial(site_key, dropout_key), DecoderDropout

        h = self.sublayer_input(self.self_attention_norm, x)
        q, k, v = self.self_attention.query_key_value(h)
        at, drop = (positions, positions), key(site.SELF_ATTENTION_WEIGHTS)
        y, weights = self.self_attention.attend(q, k, v, mask, at, drop, head_mask, return_weights)
        x = self.add_and_norm(self.self_attention_norm, x, y, key(site.SELF_ATTENTION))
        x = self.after_attention(x)

        q = self.cross_attention.query(self.sublayer_input(self.cross_attention_norm, x))
        k, v = self.cross_attention.key_value(encoded)
        at, drop = (positions, source_positions), key(site.CROSS_ATTENTION_WEIGHTS)
        y, cross_weights = self.cross_attention.attend(
            q, k, v, cross_mask, at, drop, cross_head_mask, return_weights
        )
        x = self.add_and_norm(self.cross_attention_norm, x, y, key(site.CROSS_ATTENTION))
        x = self.after_cross_attention(x)

        y = self.feed_forward(self.sublayer_input(self.feed_forward_norm, x), key(site.HIDDEN))
        x = self.add_and_norm(self.feed_forward_norm, x, y, key(site.FEED_FORWARD))
        return self.after_feed_forward(x), weights, cross_weights

    def step(
        self,
        x: Array,
        index: Array,
        cache: LayerCache,
        mask: Array,
        memory: LayerCache,
        cross_mask: Array,
    ) -> tuple[Array, LayerCache]:
        """One position of each hypothesis: [B, W, D] -> the same, and the cache with it written.

        The W hypotheses of a source are W queries of one attention, to the source's memory (which
        needs no copy a hypothesis) and to all that the W rows have written; `mask` [B, 1, W, T·W]
        says what of it is a hypothesis's own.
        """
        h = self.sublayer_input(self.self_attention_norm, x)
        q, k, v = self.self_attention.query_key_value(h)
        cache = cache.write(k, v, index * x.shape[1])
        k, v = cache.pair()
        width = x.shape[1]
        here = jnp.full((1, width), index)
        y, _ = self.self_attention.attend(q, k, v, mask, (here, _positions(k) // width))
        x = self.after_attention(self.add_and_norm(self.self_attention_norm, x, y, None))

        q = self.cross_attention.query(self.sublayer_input(self.cross_attention_norm, x))
        k, v = memory.pair()
        y, _ = self.cross_attention.attend(q, k, v, cross_mask, (here, _positions(k)))
        x = self.add_and_norm(self.cross_attention_norm, x, y, None)
        x = self.after_cross_attention(x)

        y = self.feed_forward(self.sublayer_input(self.feed_forward_norm, x))
        x = self.add_and_norm(self.feed_forward_norm, x, y, None)
        return self.after_feed_forward(x), cache


def _positions(key: Array) -> Array:
    """Those of keys [B, H, K, d_k] side by side from 0 on: [1, K]."""
    return jnp.arange(key.shape[-2])[None]
