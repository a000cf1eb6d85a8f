"""§3.2 Attention: scaled dot-product attention and its several heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from tfm.compilation import compiled
from tfm.kernels.attention import attend
from tfm.kernels.implementation import Implementation
from tfm.kernels.precision import floating, linear, matmul
from tfm.kernels.softmax import masked_softmax
from tfm.shapes import assert_attends, assert_fits, with_axes


def _map_heads(one_head: Callable[..., Array], *operands: Any) -> Array:
    """one_head under `jax.vmap` over each axis before the last two: heads, examples and so on.

    operands: the queries, the keys …, and last the mask, which may be None, have fewer axes, or
      axes of 1, along which all share one mask.
    """
    *matrices, mask = operands
    mask = with_axes(jnp.ones((), bool) if mask is None else mask, matrices[0].ndim)
    is_shared = [size == 1 for size in mask.shape[:-2]]
    mask = mask.squeeze([axis for axis, shared in enumerate(is_shared) if shared])
    for shared in reversed(is_shared):  # the innermost axis first, that of the heads
        one_head = jax.vmap(one_head, (*[0] * len(matrices), None if shared else 0))
    return one_head(*matrices, mask)


@compiled(static=("compute_dtype", "implementation"))
def attention_weights(
    query: Array,
    key: Array,
    mask: Array | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """softmax(QKᵀ/√d_k): how much each query attends to each key (§3.2.1, equation 1).

    One head is [L, d_k] and [K, d_k]; with axes in front it is `jax.vmap(attention_weights)`.

    Args:
      query: [..., L, d_k], usually [..., H, L, d_k].
      key: [..., K, d_k].
      mask: boolean, [L, K] or broadcastable to [..., L, K] with as many axes; True = may attend.
      compute_dtype: see `tfm.kernels.precision`.
      implementation: see `tfm.kernels.implementation`.

    Returns:
      [..., L, K]; each row sums to 1, or is all zeros where the mask allows no key.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean.
    """
    assert_attends(query, key, mask)

    def one_head(query: Array, key: Array, mask: Array) -> Array:  # [L, d_k], [K, d_k], [L, K]
        # q·k of independent features of variance 1 has the variance d_k; divided by √d_k it has 1.
        # Dividing the queries is the same as dividing the logits, of which there are more.
        query = query / query.shape[-1] ** 0.5
        logits = matmul(query, key.T, compute_dtype, implementation)
        return masked_softmax(logits, mask, implementation)

    return _map_heads(one_head, query, key, mask)


@compiled(static=("compute_dtype", "implementation"))
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Attention(Q, K, V) = softmax(QKᵀ/√d_k) V (§3.2.1, equation 1).

    One head is [L, d_k], [K, d_k] and [K, d_v]; with axes in front it is
    `jax.vmap(scaled_dot_product_attention)`.

    Args:
      query: [..., H, L, d_k], the H and what comes before it as you like.
      key: [..., H, K, d_k].
      value: [..., H, K, d_v].
      mask: boolean, [L, K] or broadcastable to [..., H, L, K] with as many axes; True = may
        attend. A NaN in a value that it hides comes out all the same: 0 · NaN is NaN.
      compute_dtype: see `tfm.kernels.precision`.
      implementation: formula, as it stands, with all of softmax(QKᵀ/√d_k) in memory; chunked, a
        few heads at a time; cudnn, NVIDIA's fused kernel; auto, what is fast on the device. See
        `tfm.kernels.implementation`.

    Returns:
      [..., H, L, d_v]; zeros for a query that may attend to nothing.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean.
      ValueError: an implementation of another name, or cudnn where it does not fit.
      RuntimeError: cudnn where there is none.
    """
    assert_attends(query, key, mask)
    assert_fits("value", value, (*key.shape[:-1], None), key=key)
    query, key, value = floating(query, key, value)

    def one_head(query: Array, key: Array, value: Array, mask: Array) -> Array:
        weights = attention_weights(
            query, key, mask, compute_dtype=compute_dtype, implementation=implementation
        )
        return matmul(weights, value, compute_dtype, implementation)

    every_head = partial(_map_heads, one_head)
    return attend(every_head, query, key, value, mask, compute_dtype, implementation)


@compiled(static=("num_heads",))
def split_heads(x: Array, num_heads: int) -> Array:
    """Splits d_model into h heads of d_k = d_model/h features (§3.2.2).

    x: [..., L, D] -> [..., H, L, d_k], or one example [L, D] -> [H, L, d_k]. Head i holds features
    i·d_k … (i+1)·d_k − 1.

    Raises:
      ValueError: num_heads does not divide d_model; the message names both numbers.
    """
    assert_fits("x", x, (..., None, None))
    *leading, length, d_model = x.shape
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide d_model={d_model}")
    heads = x.reshape(*leading, length, num_heads, d_model // num_heads)
    return jnp.swapaxes(heads, -2, -3)


@compiled()
def merge_heads(x: Array) -> Array:
    """Concat(head₁, …, head_h) (§3.2.2): the inverse of `split_heads`.

    x: [..., H, L, d_k] -> [..., L, H·d_k]
    """
    assert_fits("x", x, (..., None, None, None))
    *leading, num_heads, length, d_k = x.shape
    return jnp.swapaxes(x, -2, -3).reshape(*leading, length, num_heads * d_k)


@compiled(static=("num_heads", "compute_dtype", "implementation"))
def multi_head_attention(
    query_input: Array,
    key_value_input: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    w_o: Array,
    num_heads: int,
    mask: Array | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """MultiHead(Q, K, V) = Concat(head₁, …, head_h) W^O (§3.2.2).

    Each head attends by itself, in features of its own; one alone would average what they find.
    headᵢ = Attention(Q Wᵢ^Q, K Wᵢ^K, V Wᵢ^V), where Wᵢ is columns i·d_k … (i+1)·d_k − 1 of w_q, w_k
    or w_v. Self-attention is `query_input is key_value_input`. One example is [L, D] and [K, D]; a
    batch is

        attend = partial(multi_head_attention, num_heads=8)
        jax.vmap(attend, (0, 0, None, None, None, None))(x, x, w_q, w_k, w_v, w_o)

    Args:
      query_input: [..., L, D].
      key_value_input: [..., K, D].
      w_q, w_k, w_v, w_o: [D, D].
      num_heads: h; divides D.
      mask: boolean, [L, K] or broadcastable to [..., H, L, K] with as many axes; True = may attend.
      compute_dtype: see `tfm.kernels.precision`.
      implementation: see `scaled_dot_product_attention`.

    Returns:
      [..., L, D]

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      ValueError: num_heads does not divide D, or as `scaled_dot_product_attention`.
      TypeError: the mask is not boolean.
    """
    assert_fits("query_input", query_input, (..., None, None))
    d_model = query_input.shape[-1]
    assert_fits(
        "key_value_input",
        key_value_input,
        (*query_input.shape[:-2], None, d_model),
        query_input=query_input,
    )
    for name, weight in {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}.items():
        assert_fits(name, weight, (d_model, d_model), query_input=query_input)
    product = partial(linear, compute_dtype=compute_dtype, implementation=implementation)
    query = split_heads(product(query_input, w_q), num_heads)
    key = split_heads(product(key_value_input, w_k), num_heads)
    value = split_heads(product(key_value_input, w_v), num_heads)
    heads = scaled_dot_product_attention(
        query, key, value, mask, compute_dtype=compute_dtype, implementation=implementation
    )
    return product(merge_heads(heads), w_o)
