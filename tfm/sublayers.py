"""§3.1-3.3 The parts of a layer: thin linen modules that own parameters and call the functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
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
from tfm.feed_forward import ACTIVATIONS
from tfm.functions import Functions, call, own_module
from tfm.kernels.implementation import Options
from tfm.kernels.precision import linear, matmul
from tfm.kernels.projection import side_by_side, side_by_side_by_head
from tfm.kernels.quantization import Quantized
from tfm.parallel.sharding import gather_for_compute, is_divided
from tfm.shapes import with_axes

INITIALIZERS = {
    "xavier_uniform": nn.initializers.xavier_uniform(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "he_normal": nn.initializers.he_normal(),
}


@flax.struct.dataclass
class Flag:
    """A bool that stays one: `nn.remat` traces each argument of a layer that is an array to it."""

    value: bool = flax.struct.field(pytree_node=False)

    def __bool__(self) -> bool:
        return self.value


def matrix(module: nn.Module, name: str, shape: tuple[int, int]) -> Array | Quantized:
    """The module's parameter, or what `tfm.quantize` put in its place, whose form is its own."""
    given: Any = module.get_variable("params", name)
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
        if (module := own_module(self, "layer_norm")) is not None:
            nn.share_scope(self, module)
            return call(self, "layer_norm", (x,), x.shape, module)
        scale = self.param("scale", nn.initializers.ones, (self.config.d_model,))
        bias = self.param("bias", nn.initializers.zeros, (self.config.d_model,))
        arguments = x, scale, bias, self.config.layer_norm_epsilon
        how = {"implementation": self.config.implementation}
        return call(self, "layer_norm", arguments, x.shape, how=how)


class FeedForward(nn.Module):
    config: TransformerConfig
    functions: Functions = Functions()

    @nn.compact
    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        c = self.config
        how = Options(compute_dtype=jnp.dtype(c.compute_dtype), implementation=c.implementation)
        if (module := own_module(self, "feed_forward")) is not None:
            nn.share_scope(self, module)
            offered: dict[str, Any] = {"dropout_key": dropout_key}
            return call(self, "feed_forward", (x,), x.shape, module, how=how, **offered)
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
        arguments = x, w1, b1, w2, b2
        return call(self, "feed_forward", arguments, x.shape, options=options, how=how)


class MultiHeadAttention(nn.Module):
    """`tfm.multi_head_attention` in two halves, so that a cache fits between them.

    Both halves together equal the function where no option is set; a test holds them equal. The
    methods that return what they are given are there for `tfm.activations` to see and to replace.
    """

    config: TransformerConfig
    functions: Functions = Functions()
    kind: str = "encoder"

    def setup(self) -> None:
        c = self.config
        self.own_weights = own_module(self, "attention_weights")
        if self.own_weights is not None:
            nn.share_scope(self, self.own_weights)
        self.weights = {n: matrix(self, f"w_{n}", (c.d_model, c.d_model)) for n in "qkvo"}
        if c.projection_bias:
            zeros, row = nn.initializers.zeros, (c.d_model,)
            self.biases = {n: self.param(f"b_{n}", zeros, row) for n in "qkvo"}

    def _linear(self, x: Array, names: str, join: Callable[..., Any] = side_by_side) -> Array:
        """x W + b, for each of `names` at once: its columns side by side."""
        c = self.config
        y = linear(x, join([self.weights[n] for n in names]), c.compute_dtype, c.implementation)
        if not c.projection_bias:
            return y
        return y + with_axes(join([self.biases[n] for n in names]), y.ndim)

    def query_key_value(self, x: Array) -> list[Array]:
        """Of self-attention: [..., L, D] -> three times [..., H, L, d_k]."""
        query, key, value = self._project(x, "qkv")
        return [self.queries(query), self.keys(key), self.values(value)]

    def query(self, x: Array) -> Array:
        """[..., L, D] -> [..., H, L, d_k]"""
        return self.queries(self._project(x, "q")[0])

    def key_value(self, x: Array) -> list[Array]:
        """[..., K, D] -> twice [..., H, K, d_k]."""
        key, value = self._project(x, "kv")
        return [self.keys(key), self.values(value)]

    def queries(self, query: Array) -> Array:
        """[..., H, L, d_k]"""
        return query

    def keys(self, key: Array) -> Array:
        """[..., H, K, d_k]"""
        return key

    def values(self, value: Array) -> Array:
        """[..., H, K, d_k]"""
        return value

    def attention_weights(self, weights: Array) -> Array:
        """[..., H, L, K]"""
        return weights

    def head_outputs(self, heads: Array) -> Array:
        """[..., H, L, d_k]"""
        return heads

    def output(self, heads: Array) -> Array:
        """Concat(head₁, …, head_h) W^O: [..., H, L, d_k] -> [..., L, D]"""
        return self._linear(merge_heads(heads), "o")

    def _project(self, x: Array, names: str) -> list[Array]:
        """[..., L, D] -> [..., H, L, d_k] for each of `names` ('q', 'kv' or 'qkv').

        One product and one transpose for all names together: faster than one of each a name.
        """
        h, number = self.config.num_heads, len(names)
        if self.config.implementation == "formula":
            return [split_heads(self._linear(x, name), h) for name in names]
        if is_divided():  # by a mesh that divides the columns by head: they stay together
            y = self._linear(x, names, partial(side_by_side_by_head, num_heads=h))
            return jnp.split(split_heads(y, h), number, axis=-1)
        # The heads of q, then those of k, then those of v.
        return jnp.split(split_heads(self._linear(x, names), number * h), number, axis=-3)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array,
        positions: tuple[Array, Array] | None = None,
        dropout_key: Array | None = None,
        head_mask: Array | None = None,
        return_weights: bool | Flag = False,
    ) -> tuple[Array, Array | None]:
        """[..., H, L, d_k] and [..., H, K, d_k] twice -> [..., L, D], and with `return_weights`
        the weights [..., H, L, K].

        positions: those of the queries and of the keys, for a function in the place of ours.
        """
        c = self.config
        how = Options(compute_dtype=c.compute_dtype, implementation=c.implementation)
        drops = dropout_key is not None and c.attention_dropout_rate > 0
        is_replaced = self.functions.attention_weights is not attention_weights
        if return_weights or drops or is_replaced:  # all of them in memory
            weights = self._weights(query, key, mask, positions, how)
            kept = weights
            if dropout_key is not None and c.attention_dropout_rate > 0:
                kept = dropout(dropout_key, weights, c.attention_dropout_rate)
            heads = matmul(kept, value, **how)
        else:
            heads = scaled_dot_product_attention(query, key, value, mask, **how)
        heads = self.head_outputs(heads)
        if head_mask is not None:
            heads *= with_axes(head_mask[:, None, None], heads.ndim)
        return self.output(heads), weights if return_weights else None

    def _weights(
        self,
        query: Array,
        key: Array,
        mask: Array,
        positions: tuple[Array, Array] | None,
        how: Options,
    ) -> Array:
        """[..., H, L, K], by the function or the module in its place."""
        offered: dict[str, Any] = {"kind": self.kind}
        if positions is not None:
            offered |= {"query_positions": positions[0], "key_positions": positions[1]}
        shape = (*query.shape[:-1], key.shape[-2])
        arguments = query, key, mask
        weights = call(
            self, "attention_weights", arguments, shape, self.own_weights, how=how, **offered
        )
        return self.attention_weights(weights)
