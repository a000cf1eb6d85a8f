"""§3 The Transformer: thin linen modules that own parameters and call the functions.

`model.apply(variables, ...)` is the functional model. Modules hold no state: the decoding cache goes
in and comes out, attention weights are a second output, dropout draws from a key that someone
passes (None means no dropout).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tfm.attention import attention_weights, merge_heads, split_heads
from tfm.config import TransformerConfig
from tfm.dropout import dropout
from tfm.embedding import embed, output_logits
from tfm.feed_forward import feed_forward
from tfm.masks import causal_mask, segment_mask
from tfm.normalization import layer_norm
from tfm.positions import sinusoidal_positions
from tfm.precision import linear, matmul
from tfm.shapes import assert_fits

INITIALIZERS = {
    "xavier_uniform": nn.initializers.xavier_uniform(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "he_normal": nn.initializers.he_normal(),
}
HeadMasks = dict[str, Array]
"""What each head's output is multiplied by: 'encoder', 'decoder', 'cross' -> [N, H]; all optional."""


class LayerCache(NamedTuple):
    """Keys and values of the positions decoded so far: [..., H, T, d_k] each."""

    key: Array
    value: Array


class Memory(NamedTuple):
    """What decoding needs of the source: each decoder layer's cross-attention keys and values."""

    layers: tuple[LayerCache, ...]  # [B, H, S, d_k]
    mask: Array  # [B, 1, 1, S]


def _key(key: Array | None, site: int) -> Array | None:
    """The key of one dropout site: independent of the order in which sites are computed."""
    return None if key is None else jax.random.fold_in(key, site)


class LayerNorm(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (self.config.d_model,))
        bias = self.param("bias", nn.initializers.zeros, (self.config.d_model,))
        return layer_norm(x, scale, bias, self.config.layer_norm_epsilon)


class FeedForward(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        matrix, zeros = INITIALIZERS[c.initializer], nn.initializers.zeros
        w1 = self.param("w1", matrix, (c.d_model, c.d_ff))
        b1 = self.param("b1", zeros, (c.d_ff,))
        w2 = self.param("w2", matrix, (c.d_ff, c.d_model))
        b2 = self.param("b2", zeros, (c.d_model,))
        return feed_forward(x, w1, b1, w2, b2, compute_dtype=jnp.dtype(c.compute_dtype))


class MultiHeadAttention(nn.Module):
    """`tfm.multi_head_attention` in two halves, so that a cache fits between them.

    Both halves together equal the function where no option is set; a test holds them equal.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        matrix, square = INITIALIZERS[c.initializer], (c.d_model, c.d_model)
        self.weights = {n: self.param(f"w_{n}", matrix, square) for n in "qkvo"}
        if c.projection_bias:
            zeros, row = nn.initializers.zeros, (c.d_model,)
            self.biases = {n: self.param(f"b_{n}", zeros, row) for n in "qkvo"}

    def _linear(self, x: Array, names: str) -> Array:
        w = jnp.concatenate([self.weights[n] for n in names], axis=1)
        y = linear(x, w, self.config.compute_dtype)
        if self.config.projection_bias:
            y += jnp.concatenate([self.biases[n] for n in names])
        return y

    def project(self, x: Array, names: str) -> list[Array]:
        """[..., L, D] -> [..., H, L, d_k] for each of `names` ('q', 'kv' or 'qkv').

        One product and one transpose for all names together: faster than one of each a name.
        """
        heads = split_heads(self._linear(x, names), len(names) * self.config.num_heads)
        return jnp.split(heads, len(names), axis=-3)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array,
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """[..., H, L, d_k] and [..., H, K, d_k] twice -> [..., L, D] and weights [..., H, L, K]."""
        c = self.config
        weights = attention_weights(query, key, mask, compute_dtype=c.compute_dtype)
        used = weights
        if dropout_key is not None:
            used = dropout(dropout_key, used, c.attention_dropout_rate)
        heads = matmul(used, value, c.compute_dtype)
        if head_mask is not None:
            heads *= head_mask[:, None, None]
        return self._linear(merge_heads(heads), "o"), weights


class ResidualSublayers(nn.Module):
    """What encoder and decoder layers share: x + Sublayer(x), normalised and dropped out."""

    config: TransformerConfig

    def residual(
        self,
        norm: Callable[[Array], Array],
        x: Array,
        sublayer: Callable[[Array], tuple[Array, Any]],
        dropout_key: Array | None,
    ) -> tuple[Array, Any]:
        """LayerNorm(x + Dropout(Sublayer(x))), the paper's, or x + Dropout(Sublayer(LayerNorm(x)))."""
        pre = self.config.norm_placement == "pre"
        y, extra = sublayer(norm(x) if pre else x)
        if dropout_key is not None:
            y = dropout(dropout_key, y, self.config.dropout_rate)
        return (x + y if pre else norm(x + y)), extra


class EncoderLayer(ResidualSublayers):
    def setup(self) -> None:
        self.attention = MultiHeadAttention(self.config)
        self.attention_norm = LayerNorm(self.config)
        self.feed_forward = FeedForward(self.config)
        self.feed_forward_norm = LayerNorm(self.config)

    def __call__(
        self,
        x: Array,
        mask: Array,
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """[..., S, D] -> the same, and the attention weights [..., H, S, S]."""

        def attend(x):
            qkv = self.attention.project(x, "qkv")
            return self.attention.attend(*qkv, mask, _key(dropout_key, 0), head_mask)

        x, weights = self.residual(self.attention_norm, x, attend, _key(dropout_key, 1))
        x, _ = self.residual(
            self.feed_forward_norm, x, lambda x: (self.feed_forward(x), None), _key(dropout_key, 2)
        )
        return x, weights


class DecoderLayer(ResidualSublayers):
    def setup(self) -> None:
        self.self_attention = MultiHeadAttention(self.config)
        self.self_attention_norm = LayerNorm(self.config)
        self.cross_attention = MultiHeadAttention(self.config)
        self.cross_attention_norm = LayerNorm(self.config)
        self.feed_forward = FeedForward(self.config)
        self.feed_forward_norm = LayerNorm(self.config)

    def memory(self, encoded: Array) -> LayerCache:
        """The cross-attention's keys and values of the encoder's output: [..., H, S, d_k]."""
        return LayerCache(*self.cross_attention.project(encoded, "kv"))

    def _sublayers(
        self, x: Array, attend: Callable, cross_attend: Callable, dropout_key: Array | None
    ) -> tuple[Array, Any, Array]:
        x, extra = self.residual(self.self_attention_norm, x, attend, _key(dropout_key, 0))
        x, cross_weights = self.residual(
            self.cross_attention_norm, x, cross_attend, _key(dropout_key, 1)
        )
        x, _ = self.residual(
            self.feed_forward_norm, x, lambda x: (self.feed_forward(x), None), _key(dropout_key, 2)
        )
        return x, extra, cross_weights

    def __call__(
        self,
        x: Array,
        encoded: Array,
        mask: Array,
        cross_mask: Array,
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
        cross_head_mask: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """[..., T, D] -> the same, and weights [..., H, T, T] and [..., H, T, S]."""

        def attend(x):
            qkv = self.self_attention.project(x, "qkv")
            return self.self_attention.attend(*qkv, mask, _key(dropout_key, 3), head_mask)

        def cross_attend(x):
            (query,) = self.cross_attention.project(x, "q")
            return self.cross_attention.attend(
                query, *self.memory(encoded), cross_mask, _key(dropout_key, 4), cross_head_mask
            )

        return self._sublayers(x, attend, cross_attend, dropout_key)

    def step(
        self, x: Array, index: Array, cache: LayerCache, memory: LayerCache, cross_mask: Array
    ) -> tuple[Array, LayerCache]:
        """One position of each hypothesis: [B, W, D] -> the same, and the cache with it written.

        The W hypotheses of a source are W queries of one cross-attention, so that its keys and
        values need no copy a hypothesis.
        """

        def attend(x):
            query, *new = self.self_attention.project(x[..., None, :], "qkv")
            written = LayerCache(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, now, index, axis=-2)
                    for old, now in zip(cache, new, strict=True)
                )
            )
            mask = jnp.arange(cache.key.shape[-2]) <= index
            y, _ = self.self_attention.attend(query, *written, mask)
            return y[..., 0, :], written

        def cross_attend(x):
            (query,) = self.cross_attention.project(x, "q")
            return self.cross_attention.attend(query, *memory, cross_mask)

        x, cache, _ = self._sublayers(x, attend, cross_attend, None)
        return x, cache


class Transformer(nn.Module):
    """The encoder-decoder of Figure 1.

    Tokens are integers in [0, V); 0 is padding. A packed row holds several sequences: its segment
    ids number them from 1 (0 = padding) and its positions start at 0 in each. Without them a row
    is one sequence, and padding is where the token is 0.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        table = nn.initializers.normal(c.d_model**-0.5)
        self.target_table = self.param("embedding", table, (c.vocab_size, c.d_model))
        self.source_table = self.target_table
        if c.source_vocab_size is not None:
            shape = (c.source_vocab_size, c.d_model)
            self.source_table = self.param("source_embedding", table, shape)
        if c.positions == "learned":
            shape = (c.max_learned_positions, c.d_model)
            self.learned = {n: self.param(f"{n}_positions", table, shape) for n in ("source", "target")}
        if c.output_bias:
            self.bias = self.param("output_bias", nn.initializers.zeros, (c.vocab_size,))
        self.encoder = [EncoderLayer(c) for _ in range(c.num_encoder_layers)]
        self.decoder = [DecoderLayer(c) for _ in range(c.num_decoder_layers)]
        if c.norm_placement == "pre":
            self.encoder_norm, self.decoder_norm = LayerNorm(c), LayerNorm(c)

    def _embed(
        self, side: str, ids: Array, positions: Array | None, dropout_key: Array | None
    ) -> Array:
        """Dropout(E(id)·√d_model + PE(position)): [..., L] -> [..., L, D]."""
        c = self.config
        x = embed(ids, self.source_table if side == "source" else self.target_table)
        if c.positions == "sinusoidal":
            x += sinusoidal_positions(ids.shape[-1] if positions is None else positions, c.d_model)
        else:
            if positions is None and ids.shape[-1] > c.max_learned_positions:
                raise ValueError(
                    f"{side} has {ids.shape[-1]} positions, more than "
                    f"max_learned_positions={c.max_learned_positions}"
                )
            positions = jnp.arange(ids.shape[-1]) if positions is None else positions
            x += self.learned[side].at[positions].get(mode="fill")
        return x if dropout_key is None else dropout(dropout_key, x, c.dropout_rate)

    def _logits(self, y: Array) -> Array:
        c = self.config
        bias = self.bias if c.output_bias else None
        return output_logits(y, self.target_table.T, bias, compute_dtype=c.compute_dtype)

    def encode(
        self,
        source: Array,
        source_segment_ids: Array | None = None,
        source_positions: Array | None = None,
        *,
        dropout_key: Array | None = None,
        head_masks: HeadMasks | None = None,
    ) -> tuple[Array, Array]:
        """[..., S] ids -> [..., S, D] and the attention weights [N, ..., H, S, S]."""
        assert_fits("source", source, (..., None))
        segments = (source != 0) * 1 if source_segment_ids is None else source_segment_ids
        mask = segment_mask(segments, segments)
        x = self._embed("source", source, source_positions, _key(dropout_key, 0))
        heads = (head_masks or {}).get("encoder", [None] * len(self.encoder))
        weights = []
        for i, layer in enumerate(self.encoder):
            x, w = layer(x, mask, _key(dropout_key, 1 + i), heads[i])
            weights.append(w)
        x = self.encoder_norm(x) if self.config.norm_placement == "pre" else x
        return x, jnp.stack(weights)

    def decode(
        self,
        encoded: Array,
        target: Array,
        source_segment_ids: Array,
        target_segment_ids: Array,
        target_positions: Array | None = None,
        *,
        dropout_key: Array | None = None,
        head_masks: HeadMasks | None = None,
    ) -> tuple[Array, Array, Array]:
        """Decoder inputs [..., T] -> logits [..., T, V], weights [N, ..., H, T, T], [N, ..., H, T, S]."""
        assert_fits("target", target, (..., None))
        mask = segment_mask(target_segment_ids, target_segment_ids) & causal_mask(target.shape[-1])
        cross_mask = segment_mask(target_segment_ids, source_segment_ids)
        x = self._embed("target", target, target_positions, _key(dropout_key, 0))
        head_masks = head_masks or {}
        nothing = [None] * len(self.decoder)
        heads, cross_heads = (head_masks.get(n, nothing) for n in ("decoder", "cross"))
        weights, cross_weights = [], []
        for i, layer in enumerate(self.decoder):
            key = _key(dropout_key, 1 + i)
            x, w, cw = layer(x, encoded, mask, cross_mask, key, heads[i], cross_heads[i])
            weights.append(w)
            cross_weights.append(cw)
        x = self.decoder_norm(x) if self.config.norm_placement == "pre" else x
        return self._logits(x), jnp.stack(weights), jnp.stack(cross_weights)

    def __call__(
        self,
        source: Array,
        target: Array,
        *,
        source_segment_ids: Array | None = None,
        source_positions: Array | None = None,
        target_segment_ids: Array | None = None,
        target_positions: Array | None = None,
        dropout_key: Array | None = None,
        head_masks: HeadMasks | None = None,
        return_weights: bool = False,
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Logits of the next target token at each position.

        Args:
          source: [..., S] ids.
          target: [..., T] ids of the decoder's input: the labels, shifted right (`shift_right`).
          source_segment_ids, source_positions: [..., S]; target_segment_ids, target_positions:
            [..., T]; see the class.
          dropout_key: a PRNG key; None means no dropout.
          head_masks: see `HeadMasks`.
          return_weights: also return the attention weights.

        Returns:
          logits [..., T, V]; with `return_weights` also {'encoder': [N, ..., H, S, S],
          'decoder': [N, ..., H, T, T], 'cross': [N, ..., H, T, S]}.
        """
        assert_fits("target", target, (*source.shape[:-1], None), source=source)
        if source_segment_ids is None:
            source_segment_ids = (source != 0) * 1
        if target_segment_ids is None:
            target_segment_ids = (target != 0) * 1
        encoded, encoder_weights = self.encode(
            source, source_segment_ids, source_positions,
            dropout_key=_key(dropout_key, 0), head_masks=head_masks,
        )  # fmt: skip
        logits, weights, cross_weights = self.decode(
            encoded, target, source_segment_ids, target_segment_ids, target_positions,
            dropout_key=_key(dropout_key, 1), head_masks=head_masks,
        )  # fmt: skip
        if not return_weights:
            return logits
        return logits, {"encoder": encoder_weights, "decoder": weights, "cross": cross_weights}

    def start(
        self, source: Array, num_hypotheses: int, max_length: int
    ) -> tuple[Memory, tuple[LayerCache, ...]]:
        """Encodes the source and makes an empty cache, for `step`.

        source: [B, S] ids -> memory, and a cache of [B, W, H, T, d_k] a layer
        (W = num_hypotheses, T = max_length).
        """
        c = self.config
        encoded, _ = self.encode(source)
        memory = tuple(layer.memory(encoded) for layer in self.decoder)
        mask = (source != 0)[:, None, None, :]
        shape = (source.shape[0], num_hypotheses, c.num_heads, max_length, c.d_model // c.num_heads)
        zeros = jnp.zeros(shape, encoded.dtype)
        return Memory(memory, mask), tuple(LayerCache(zeros, zeros) for _ in self.decoder)

    def step(
        self, memory: Memory, tokens: Array, index: Array, cache: tuple[LayerCache, ...]
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        """One decoding step at position `index` for tokens [B, W] -> logits [B, W, V] and the cache."""
        x = self._embed("target", tokens[..., None], jnp.asarray(index)[None], None)[..., 0, :]
        new = []
        for layer, layer_cache, layer_memory in zip(self.decoder, cache, memory.layers, strict=True):
            x, written = layer.step(x, index, layer_cache, layer_memory, memory.mask)
            new.append(written)
        x = self.decoder_norm(x) if self.config.norm_placement == "pre" else x
        return self._logits(x), tuple(new)


def shift_right(labels: Array, bos: int, positions: Array | None = None) -> Array:
    """The decoder's input: each sequence of `labels` offset by one position, after `bos` (§3.1).

    labels: [..., T] -> [..., T]; `positions` [..., T] says where the sequences of a packed row start.
    """
    if positions is None:
        positions = jnp.arange(labels.shape[-1])
    return jnp.where(positions == 0, bos, jnp.roll(labels, 1, axis=-1))
