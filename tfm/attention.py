"""§3.2 Attention: scaled dot-product attention and its several heads."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from tfm.compilation import compiled
from tfm.kernels.attention import attend
from tfm.kernels.implementation import Implementation, Options
from tfm.kernels.precision import floating, linear, matmul
from tfm.kernels.softmax import masked_softmax
from tfm.shapes import assert_attends, assert_fits, with_axes


def _map_heads(
    one_head: Callable[..., Array], *matrices: Array, shared: tuple[Array | None, Array | None]
) -> Array:
    """one_head(*matrices, *shared) under `jax.vmap` over each axis before the last two: heads,
    examples and so on.

    shared: mask and bias, of as many axes or fewer; along an axis of 1 all share one of them.
    """
    ndim = matrices[0].ndim
    given = [None if x is None else with_axes(x, ndim) for x in shared]
    for axis in reversed(range(ndim - 2)):  # the innermost first, that of the heads
        in_axes = [None if x is None or x.shape[axis] == 1 else 0 for x in given]
        one_head = jax.vmap(one_head, (*[0] * len(matrices), *in_axes))
    ones = [[a for a in range(ndim - 2) if x is not None and x.shape[a] == 1] for x in given]
    parts = [None if x is None else x.squeeze(axes) for x, axes in zip(given, ones, strict=True)]
    return one_head(*matrices, *parts)


@compiled(static=("compute_dtype", "implementation"))
def attention_weights(
    query: Array,
    key: Array,
    mask: Array | None = None,
    *,
    bias: Array | None = None,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """softmax(QKᵀ/√d_k): how much each query attends to each key (§3.2.1, equation 1).

    One head is [L, d_k] and [K, d_k]; with axes in front it is `jax.vmap(attention_weights)`.

    Args:
      query: [..., L, d_k], usually [..., H, L, d_k].
      key: [..., K, d_k].
      mask: boolean, [L, K] or broadcastable to [..., L, K] with as many axes; True = may attend.
      bias: numbers, of a form as the mask's: what is added to QKᵀ/√d_k (not in the paper).
      compute_dtype: see `tfm.kernels.precision`.
      implementation: see `tfm.kernels.implementation`.

    Returns:
      [..., L, K]; each row sums to 1, or is all zeros where the mask allows no key.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean, or the bias is.
    """
    assert_attends(query, key, mask, bias)

    # [L, d_k], [K, d_k], and [L, K] twice
    def one_head(query: Array, key: Array, mask: Array | None, bias: Array | None) -> Array:
        # q·k of independent features of variance 1 has the variance d_k; divided by √d_k it has 1.
        # Dividing the queries is the same as dividing the logits, of which there are more.
        query = query / query.shape[-1] ** 0.5
        logits = matmul(query, key.T, compute_dtype, implementation)
        if bias is not None:
            logits += bias
        return masked_softmax(logits, mask, implementation)

    return _map_heads(one_head, query, key, shared=(mask, bias))


@compiled(static=("compute_dtype", "implementation"))
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    bias: Array | None = None,
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
      bias: as `attention_weights`.
      compute_dtype: see `tfm.kernels.precision`.
      implementation: formula, as it stands, with all of softmax(QKᵀ/√d_k) in memory; chunked, a
        few heads at a time; cudnn, NVIDIA's fused kernel; auto, what is fast on the device. See
        `tfm.kernels.implementation`.

    Returns:
      [..., H, L, d_v]; zeros for a query that may attend to nothing.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean, or the bias is.
      ValueError: an implementation of another name, or cudnn where it does not fit.
      RuntimeError: cudnn where there is none.
    """
    assert_attends(query, key, mask, bias)
    assert_fits("value", value, (*key.shape[:-1], None), key=key)
    query, key, value = floating(query, key, value)

    def formula(
        query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
    ) -> Array:
        return _map_heads(one_head, query, key, value, shared=(mask, bias))

    def one_head(
        query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
    ) -> Array:
        options = Options(compute_dtype=compute_dtype, implementation=implementation)
        weights = attention_weights(query, key, mask, bias=bias, **options)
        return matmul(weights, value, **options)

    return attend(formula, query, key, value, mask, bias, compute_dtype, implementation)


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
    bias: Array | None = None,
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
      bias: as `attention_weights`.
      compute_dtype: see `tfm.kernels.precision`.
      implementation: see `scaled_dot_product_attention`.

    Returns:
      [..., L, D]

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      ValueError: num_heads does not divide D, or as `scaled_dot_product_attention`.
      TypeError: the mask is not boolean, or the bias is.
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
    options = Options(compute_dtype=compute_dtype, implementation=implementation)
    product = partial(linear, **options)
    query = split_heads(product(query_input, w_q), num_heads)
    key = split_heads(product(key_value_input, w_k), num_heads)
    value = split_heads(product(key_value_input, w_v), num_heads)
    heads = scaled_dot_product_attention(query, key, value, mask, bias=bias, **options)
    return product(merge_heads(heads), w_o)
