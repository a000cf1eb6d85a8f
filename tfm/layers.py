"""§3.1-3.3 The layers: thin linen modules that own parameters and call the functions."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tfm.attention import (
    attention_weights,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)
from tfm.config import TransformerConfig
from tfm.dropout import dropout
from tfm.feed_forward import feed_forward
from tfm.kernels.precision import linear, matmul
from tfm.kernels.quantization import Quantized, side_by_side
from tfm.normalization import layer_norm
from tfm.parallel.sharding import constrain, gather_for_compute, is_divided
from tfm.positions import sinusoidal_positions
from tfm.shapes import with_axes

INITIALIZERS = {
    "xavier_uniform": nn.initializers.xavier_uniform(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "he_normal": nn.initializers.he_normal(),
}

ACTIVATIONS = {"relu": nn.relu, "swish": nn.silu, "gelu": partial(nn.gelu, approximate=False)}


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions that the layers call. Put another in the place of one to study it:

        Transformer(config, Functions(feed_forward=mine))

    It takes and returns what the function of that name in `tfm` does; of its options those alone
    that the config sets apart from the paper. The parameters stay as they are, so a trained
    checkpoint fits either.
    """

    attention_weights: Callable[..., Array] = attention_weights
    feed_forward: Callable[..., Array] = feed_forward
    layer_norm: Callable[..., Array] = layer_norm
    sinusoidal_positions: Callable[..., Array] = sinusoidal_positions


class LayerCache(NamedTuple):
    """Keys and values of K positions: of the source's, or of those that were decoded so far.

    The keys lie transposed, as QKᵀ wants them: no step then has to turn them all.
    """

    key: Array  # [B, H, d_k, K]
    value: Array  # [B, H, K, d_k]

    def pair(self) -> tuple[Array, Array]:
        """Keys and values [B, H, K, d_k]; XLA takes the one transposition against the other."""
        return jnp.swapaxes(self.key, -1, -2), self.value


def site_key(key: Array | None, site: int) -> Array | None:
    """The key of one dropout site: independent of the order in which sites are computed."""
    return None if key is None else jax.random.fold_in(key, site)


def matrix(module: nn.Module, name: str, shape: tuple[int, int]) -> Array | Quantized:
    """The module's parameter, or what `tfm.quantize` put in its place, whose form is its own."""
    given = module.get_variable("params", name)
    if isinstance(given, Quantized):
        return given
    return gather_for_compute(
        name, module.param(name, INITIALIZERS[module.config.initializer], shape)
    )


class LayerNorm(nn.Module):
    config: TransformerConfig
    functions: Functions = Functions()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (self.config.d_model,))
        bias = self.param("bias", nn.initializers.zeros, (self.config.d_model,))
        return self.functions.layer_norm(x, scale, bias, self.config.layer_norm_epsilon)


class FeedForward(nn.Module):
    config: TransformerConfig
    functions: Functions = Functions()

    @nn.compact
    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        c = self.config
        zeros = nn.initializers.zeros
        w1 = matrix(self, "w1", (c.d_model, c.d_ff))
        b1 = self.param("b1", zeros, (c.d_ff,))
        w2 = matrix(self, "w2", (c.d_ff, c.d_model))
        b2 = self.param("b2", zeros, (c.d_model,))
        # Only what departs from the paper, so that a function in its place need take no more.
        options: dict[str, Any] = {}
        if c.activation != "relu":
            options["activation"] = ACTIVATIONS[c.activation]
        if dropout_key is not None and c.activation_dropout_rate:
            options |= {"dropout_key": dropout_key, "dropout_rate": c.activation_dropout_rate}
        dtype = jnp.dtype(c.compute_dtype)
        return self.functions.feed_forward(x, w1, b1, w2, b2, compute_dtype=dtype, **options)


class MultiHeadAttention(nn.Module):
    """`tfm.multi_head_attention` in two halves, so that a cache fits between them.

    Both halves together equal the function where no option is set; a test holds them equal.
    """

    config: TransformerConfig
    functions: Functions = Functions()

    def setup(self) -> None:
        c = self.config
        self.weights = {n: matrix(self, f"w_{n}", (c.d_model, c.d_model)) for n in "qkvo"}
        if c.projection_bias:
            zeros, row = nn.initializers.zeros, (c.d_model,)
            self.biases = {n: self.param(f"b_{n}", zeros, row) for n in "qkvo"}

    def _linear(self, x: Array, names: str) -> Array:
        w = side_by_side([self.weights[n] for n in names])
        y = linear(x, w, self.config.compute_dtype)
        if self.config.projection_bias:
            y += with_axes(jnp.concatenate([self.biases[n] for n in names]), y.ndim)
        return y

    def project(self, x: Array, names: str) -> list[Array]:
        """[..., L, D] -> [..., H, L, d_k] for each of `names` ('q', 'kv' or 'qkv').

        One product and one transpose for all names together: faster than one of each a name.
        """
        if is_divided():
            return self._project_in_parts(x, names)
        heads = split_heads(self._linear(x, names), len(names) * self.config.num_heads)
        return jnp.split(heads, len(names), axis=-3)

    def _project_in_parts(self, x: Array, names: str) -> list[Array]:
        """The same where a mesh divides the heads: side by side head by head, the matrices keep
        their columns where they are."""
        c = self.config

        def beside(arrays: list[Array]) -> Array:
            by_head = [a.reshape(*a.shape[:-1], c.num_heads, -1) for a in arrays]
            joined = jnp.concatenate(by_head, axis=-1)
            return joined.reshape(*joined.shape[:-2], -1)

        y = linear(x, beside([self.weights[n] for n in names]), c.compute_dtype)
        if c.projection_bias:
            y += with_axes(beside([self.biases[n] for n in names]), y.ndim)
        return jnp.split(split_heads(y, c.num_heads), len(names), axis=-1)

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
        weights_of = self.functions.attention_weights
        # XLA drops them where nobody takes them.
        weights = weights_of(query, key, mask, compute_dtype=c.compute_dtype)
        drops = dropout_key is not None and c.attention_dropout_rate > 0
        if drops or weights_of is not attention_weights:
            used = dropout(dropout_key, weights, c.attention_dropout_rate) if drops else weights
            heads = matmul(used, value, c.compute_dtype)
        else:
            heads = scaled_dot_product_attention(
                query, key, value, mask, compute_dtype=c.compute_dtype, implementation=c.attention
            )
        if head_mask is not None:
            heads *= with_axes(head_mask[:, None, None], heads.ndim)
        return self._linear(merge_heads(heads), "o"), weights


class ResidualSublayers(nn.Module):
    """What encoder and decoder layers share: x + Sublayer(x), normalised and dropped out."""

    config: TransformerConfig
    functions: Functions = Functions()

    def residual(
        self,
        norm: Callable[[Array], Array],
        x: Array,
        sublayer: Callable[[Array], tuple[Array, Any]],
        dropout_key: Array | None,
    ) -> tuple[Array, Any]:
        """post: LayerNorm(x + Dropout(Sublayer(x))); pre: x + Dropout(Sublayer(LayerNorm(x)))."""
        pre = self.config.norm_placement == "pre"
        y, extra = sublayer(norm(x) if pre else x)
        y = constrain(y, "batch", None, None)
        if dropout_key is not None:
            y = dropout(dropout_key, y, self.config.dropout_rate)
        return (x + y if pre else norm(x + y)), extra

    def feed_forward_sublayer(self, x: Array, dropout_key: Array | None) -> Array:
        """The feed-forward sub-layer, the last of every layer."""

        def sublayer(x):
            return self.feed_forward(x, site_key(dropout_key, 5)), None

        return self.residual(self.feed_forward_norm, x, sublayer, site_key(dropout_key, 2))[0]


class EncoderLayer(ResidualSublayers):
    def setup(self) -> None:
        self.attention = MultiHeadAttention(self.config, self.functions)
        self.attention_norm = LayerNorm(self.config, self.functions)
        self.feed_forward = FeedForward(self.config, self.functions)
        self.feed_forward_norm = LayerNorm(self.config, self.functions)

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
            return self.attention.attend(*qkv, mask, site_key(dropout_key, 0), head_mask)

        x, weights = self.residual(self.attention_norm, x, attend, site_key(dropout_key, 1))
        return self.feed_forward_sublayer(x, dropout_key), weights


class DecoderLayer(ResidualSublayers):
    def setup(self) -> None:
        self.self_attention = MultiHeadAttention(self.config, self.functions)
        self.self_attention_norm = LayerNorm(self.config, self.functions)
        self.cross_attention = MultiHeadAttention(self.config, self.functions)
        self.cross_attention_norm = LayerNorm(self.config, self.functions)
        self.feed_forward = FeedForward(self.config, self.functions)
        self.feed_forward_norm = LayerNorm(self.config, self.functions)

    def memory(self, encoded: Array) -> LayerCache:
        """The cross-attention's keys and values of the encoder's output."""
        key, value = self.cross_attention.project(encoded, "kv")
        return LayerCache(jnp.swapaxes(key, -1, -2), value)

    def _sublayers(
        self, x: Array, attend: Callable, cross_attend: Callable, dropout_key: Array | None
    ) -> tuple[Array, Any, Array]:
        x, extra = self.residual(self.self_attention_norm, x, attend, site_key(dropout_key, 0))
        x, cross_weights = self.residual(
            self.cross_attention_norm, x, cross_attend, site_key(dropout_key, 1)
        )
        return self.feed_forward_sublayer(x, dropout_key), extra, cross_weights

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
            return self.self_attention.attend(*qkv, mask, site_key(dropout_key, 3), head_mask)

        def cross_attend(x):
            (query,) = self.cross_attention.project(x, "q")
            key_value = self.cross_attention.project(encoded, "kv")
            return self.cross_attention.attend(
                query, *key_value, cross_mask, site_key(dropout_key, 4), cross_head_mask
            )

        return self._sublayers(x, attend, cross_attend, dropout_key)

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

        def write(old, new, axis):
            return jax.lax.dynamic_update_slice_in_dim(old, new, index * x.shape[1], axis)

        def attend(x):
            query, key, value = self.self_attention.project(x, "qkv")
            keys = write(cache.key, jnp.swapaxes(key, -1, -2), -1)
            written = LayerCache(keys, write(cache.value, value, -2))
            return self.self_attention.attend(query, *written.pair(), mask)[0], written

        def cross_attend(x):
            (query,) = self.cross_attention.project(x, "q")
            return self.cross_attention.attend(query, *memory.pair(), cross_mask)

        x, cache, _ = self._sublayers(x, attend, cross_attend, None)
        return x, cache
