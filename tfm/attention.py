"""§3.2 Attention: scaled dot-product attention and its several heads."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from tfm.precision import linear, matmul
from tfm.shapes import assert_broadcasts, assert_fits


def masked_softmax(logits: Array, mask: Array | None = None) -> Array:
    """softmax over the last axis, restricted to where `mask` is True.

    softmax(z)ₖ = exp(zₖ) / Σⱼ exp(zⱼ), summed over allowed j only. A row with nothing allowed gives
    zeros, and no gradient: there is nothing to attend to.

    logits: [..., K], mask: boolean, broadcastable to it -> [..., K]
    """
    if mask is None:
        mask = jnp.ones((), bool)
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    # Subtracting a row's maximum changes nothing but keeps exp from overflowing.
    exponentials = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    exponentials = jnp.where(mask, exponentials, 0)
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / jnp.where(total > 0, total, 1)


def attention_weights(
    query: Array, key: Array, mask: Array | None = None, *, compute_dtype: DTypeLike | None = None
) -> Array:
    """softmax(QKᵀ/√d_k): how much each query attends to each key (§3.2.1, equation 1).

    Args:
      query: [..., L, d_k], usually [..., H, L, d_k].
      key: [..., K, d_k].
      mask: boolean, broadcastable to [..., L, K]; True = may attend.
      compute_dtype: see `tfm.precision`.

    Returns:
      [..., L, K]; each row sums to 1, or is all zeros where the mask allows no key.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean.
    """
    assert_fits("query", query, (..., None, None))
    assert_fits("key", key, (*query.shape[:-2], None, query.shape[-1]), query=query)
    if mask is not None:
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be boolean (True = may attend), not {mask.dtype}")
        assert_broadcasts("mask", mask, (*query.shape[:-1], key.shape[-2]))
    d_k = query.shape[-1]
    logits = matmul(query, jnp.swapaxes(key, -1, -2), compute_dtype) / d_k**0.5
    return masked_softmax(logits, mask)


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
) -> Array:
    """Attention(Q, K, V) = softmax(QKᵀ/√d_k) V (§3.2.1, equation 1).

    Args:
      query: [..., H, L, d_k].
      key: [..., H, K, d_k].
      value: [..., H, K, d_v].
      mask: boolean, broadcastable to [..., H, L, K]; True = may attend.
      compute_dtype: see `tfm.precision`.

    Returns:
      [..., H, L, d_v]; zeros for a query that may attend to nothing.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean.
    """
    weights = attention_weights(query, key, mask, compute_dtype=compute_dtype)
    assert_fits("value", value, (*key.shape[:-1], None), key=key)
    return matmul(weights, value, compute_dtype)


def split_heads(x: Array, num_heads: int) -> Array:
    """Splits d_model into h heads of d_k = d_model/h features (§3.2.2).

    x: [..., L, D] -> [..., H, L, d_k]; head i holds features i·d_k … (i+1)·d_k − 1.

    Raises:
      ValueError: num_heads does not divide d_model; the message names both numbers.
    """
    assert_fits("x", x, (..., None, None))
    *leading, length, d_model = x.shape
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide d_model={d_model}")
    heads = x.reshape(*leading, length, num_heads, d_model // num_heads)
    return jnp.swapaxes(heads, -2, -3)


def merge_heads(x: Array) -> Array:
    """Concat(head₁, …, head_h) (§3.2.2): the inverse of `split_heads`.

    x: [..., H, L, d_k] -> [..., L, H·d_k]
    """
    assert_fits("x", x, (..., None, None, None))
    *leading, num_heads, length, d_k = x.shape
    return jnp.swapaxes(x, -2, -3).reshape(*leading, length, num_heads * d_k)


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
) -> Array:
    """MultiHead(Q, K, V) = Concat(head₁, …, head_h) W^O (§3.2.2).

    headᵢ = Attention(Q Wᵢ^Q, K Wᵢ^K, V Wᵢ^V), where Wᵢ is columns i·d_k … (i+1)·d_k − 1 of w_q, w_k
    or w_v. Self-attention is `query_input is key_value_input`.

    Args:
      query_input: [..., L, D].
      key_value_input: [..., K, D].
      w_q, w_k, w_v, w_o: [D, D].
      num_heads: h; divides D.
      mask: boolean, broadcastable to [..., H, L, K]; True = may attend.
      compute_dtype: see `tfm.precision`.

    Returns:
      [..., L, D]

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      ValueError: num_heads does not divide D.
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
    query = split_heads(linear(query_input, w_q, compute_dtype), num_heads)
    key = split_heads(linear(key_value_input, w_k, compute_dtype), num_heads)
    value = split_heads(linear(key_value_input, w_v, compute_dtype), num_heads)
    heads = scaled_dot_product_attention(query, key, value, mask, compute_dtype=compute_dtype)
    return linear(merge_heads(heads), w_o, compute_dtype)
