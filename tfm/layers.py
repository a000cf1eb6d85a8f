"""§3.1-3.3 The layers: thin linen modules that own parameters and call the functions."""

import dataclasses
import enum
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

    def write(self, key: Array, value: Array, position: Array) -> "LayerCache":
        """The cache with those of some positions [B, H, L, d_k] written from `position` on."""
        update = jax.lax.dynamic_update_slice_in_dim
        keys = update(self.key, jnp.swapaxes(key, -1, -2), position, -1)
        return LayerCache(keys, update(self.value, value, position, -2))


class EncoderDropout(enum.IntEnum):
    """Where an encoder layer drops out: each site has a key of its own, by its number."""

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

    def query_key_value(self, x: Array) -> list[Array]:
        """Of self-attention: [..., L, D] -> three times [..., H, L, d_k]."""
        return self._project(x, "qkv")

    def query(self, x: Array) -> Array:
        """[..., L, D] -> [..., H, L, d_k]"""
        return self._project(x, "q")[0]

    def key_value(self, x: Array) -> list[Array]:
        """[..., K, D] -> twice [..., H, K, d_k]."""
        return self._project(x, "kv")

    def _project(self, x: Array, names: str) -> list[Array]:
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

    def add_and_norm(self, norm: LayerNorm, x: Array, y: Array, key: Array | None) -> Array:
        """LayerNorm(x + Dropout(y)), "Add & Norm" of Figure 1; or pre-norm x + Dropout(y)."""
        y = constrain(y, "batch", None, None)
        if key is not None:
            y = dropout(key, y, self.config.dropout_rate)
        return x + y if self.config.norm_placement == "pre" else norm(x + y)


class EncoderLayer(Layer):
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
        key, site = partial(site_key, dropout_key), EncoderDropout

        qkv = self.attention.query_key_value(self.sublayer_input(self.attention_norm, x))
        y, weights = self.attention.attend(*qkv, mask, key(site.ATTENTION_WEIGHTS), head_mask)
        x = self.add_and_norm(self.attention_norm, x, y, key(site.ATTENTION))

        y = self.feed_forward(self.sublayer_input(self.feed_forward_norm, x), key(site.HIDDEN))
        return self.add_and_norm(self.feed_forward_norm, x, y, key(site.FEED_FORWARD)), weights


class DecoderLayer(Layer):
    def setup(self) -> None:
        self.self_attention = MultiHeadAttention(self.config, self.functions)
        self.self_attention_norm = LayerNorm(self.config, self.functions)
        self.cross_attention = MultiHeadAttention(self.config, self.functions)
        self.cross_attention_norm = LayerNorm(self.config, self.functions)
        self.feed_forward = FeedForward(self.config, self.functions)
        self.feed_forward_norm = LayerNorm(self.config, self.functions)

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
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
        cross_head_mask: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """[..., T, D] -> the same, and weights [..., H, T, T] and [..., H, T, S]."""
        key, site = partial(site_key, dropout_key), DecoderDropout

        qkv = self.self_attention.query_key_value(self.sublayer_input(self.self_attention_norm, x))
        y, weights = self.self_attention.attend(
            *qkv, mask, key(site.SELF_ATTENTION_WEIGHTS), head_mask
        )
        x = self.add_and_norm(self.self_attention_norm, x, y, key(site.SELF_ATTENTION))

        query = self.cross_attention.query(self.sublayer_input(self.cross_attention_norm, x))
        y, cross_weights = self.cross_attention.attend(
            query, *self.cross_attention.key_value(encoded), cross_mask,
            key(site.CROSS_ATTENTION_WEIGHTS), cross_head_mask,
        )  # fmt: skip
        x = self.add_and_norm(self.cross_attention_norm, x, y, key(site.CROSS_ATTENTION))

        y = self.feed_forward(self.sublayer_input(self.feed_forward_norm, x), key(site.HIDDEN))
        x = self.add_and_norm(self.feed_forward_norm, x, y, key(site.FEED_FORWARD))
        return x, weights, cross_weights

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
        query, key, value = self.self_attention.query_key_value(h)
        cache = cache.write(key, value, index * x.shape[1])
        y, _ = self.self_attention.attend(query, *cache.pair(), mask)
        x = self.add_and_norm(self.self_attention_norm, x, y, None)

        query = self.cross_attention.query(self.sublayer_input(self.cross_attention_norm, x))
        y, _ = self.cross_attention.attend(query, *memory.pair(), cross_mask)
        x = self.add_and_norm(self.cross_attention_norm, x, y, None)

        y = self.feed_forward(self.sublayer_input(self.feed_forward_norm, x))
        return self.add_and_norm(self.feed_forward_norm, x, y, None), cache
