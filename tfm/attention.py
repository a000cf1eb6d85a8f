"""§3.2 Attention: scaled dot-product attention and its several heads."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from tfm.compilation import compiled
from tfm.precision import floating, linear, matmul, plain_matmul, working_dtype
from tfm.shapes import are_known, assert_broadcasts, assert_fits, with_axes
from tfm.sharding import on_each_device

Implementation = Literal["auto", "reference", "chunked", "cudnn"]
"""How attention is computed; see `scaled_dot_product_attention`."""

CHUNK = 2**20
"""Logits that the chunked attention holds at a time: 4 MB in f32, which a CPU's cache takes."""


@jax.custom_jvp
def masked_softmax(logits: Array, mask: Array | None = None) -> Array:
    """softmax over the last axis, restricted to where `mask` is True.

    y = softmax(z): yₖ = exp(zₖ) / Σⱼ exp(zⱼ), summed over allowed j only; dy = y ⊙ (dz − Σ y dz).
    A row with nothing allowed gives zeros, and no gradient: there is nothing to attend to.

    logits: [..., K], mask: boolean, broadcastable to it -> [..., K]
    """
    exponentials, total, _ = _exponentials(logits, mask)
    return exponentials / total


def _exponentials(logits: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """exp(z − largest) where allowed, else 0; its sum, or 1 of an empty row; and the largest z."""
    mask = jnp.ones((), bool) if mask is None else with_axes(mask, logits.ndim)
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(mask, logits, lowest)
    # Subtracting a row's maximum changes nothing but keeps exp from overflowing.
    largest = logits.max(-1, keepdims=True, initial=lowest if logits.shape[-1] == 0 else None)
    exponentials = jnp.where(mask, jnp.exp(logits - largest), 0)
    total = exponentials.sum(-1, keepdims=True)
    return exponentials, jnp.where(total > 0, total, 1), largest


# Autodiff would keep the exponentials and their sums too; the weights alone are enough.
@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    weights = masked_softmax(*primals)
    weighted = weights * tangents[0]
    return weights, weighted - weights * weighted.sum(-1, keepdims=True)


def _check(query: Array, key: Array, mask: Array | None) -> None:
    assert_fits("query", query, (..., None, None))
    assert_fits("key", key, (*query.shape[:-2], None, query.shape[-1]), query=query)
    if mask is not None:
        assert_fits("mask", mask, (...,))
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be boolean (True = may attend), not {mask.dtype}")
        shape = (*query.shape[:-1], key.shape[-2])
        assert_broadcasts("mask", mask, shape)
        if 2 < mask.ndim < len(shape):
            raise AssertionError(
                f"argument mask {mask.shape} has fewer axes than the logits {shape}: write "
                "mask[:, None] if its first is that of the examples, mask[None] if of the heads"
            )


@partial(compiled, static_argnames="compute_dtype")
def attention_weights(
    query: Array, key: Array, mask: Array | None = None, *, compute_dtype: DTypeLike | None = None
) -> Array:
    """softmax(QKᵀ/√d_k): how much each query attends to each key (§3.2.1, equation 1).

    Args:
      query: [..., L, d_k], usually [..., H, L, d_k].
      key: [..., K, d_k].
      mask: boolean, [L, K] or broadcastable to [..., L, K] with as many axes; True = may attend.
      compute_dtype: see `tfm.precision`.

    Returns:
      [..., L, K]; each row sums to 1, or is all zeros where the mask allows no key.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean.
    """
    _check(query, key, mask)
    # Dividing the queries is the same as dividing the logits, of which there are more.
    query = query / query.shape[-1] ** 0.5
    return masked_softmax(matmul(query, jnp.swapaxes(key, -1, -2), compute_dtype), mask)


@partial(compiled, static_argnames=("compute_dtype", "implementation"))
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

    Args:
      query: [..., H, L, d_k].
      key: [..., H, K, d_k].
      value: [..., H, K, d_v].
      mask: boolean, [L, K] or broadcastable to [..., H, L, K] with as many axes; True = may
        attend. A NaN in a value that it hides comes out all the same: 0 · NaN is NaN.
      compute_dtype: see `tfm.precision`.
      implementation: the same function, computed in another way:
        reference: the formula as it stands, with all of softmax(QKᵀ/√d_k) in memory.
        chunked: a few heads at a time, and anew in the backward pass: O(L·K) memory for those
          only. Its derivative is there in reverse mode alone. Where a size is 0, or symbolic (of
          `jax.export`), it is the reference.
        cudnn: NVIDIA's fused kernel, for operands that `fits_cudnn`.
        auto: cudnn on a GPU where it fits, chunked on a CPU whose cache the logits overflow, or
          else reference.

    Returns:
      [..., H, L, d_v]; zeros for a query that may attend to nothing.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      TypeError: the mask is not boolean.
      ValueError: an implementation of another name, or cudnn where it does not fit.
      RuntimeError: cudnn where there is none.
    """
    _check(query, key, mask)
    assert_fits("value", value, (*key.shape[:-1], None), key=key)
    query, key, value = floating(query, key, value)
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    fits = fits_cudnn(query, key, value, compute_dtype)
    if implementation == "cudnn" and not fits:
        raise ValueError(
            "cudnn attention takes a compute_dtype of 16 bits, even L and K, and d_v = d_k, a "
            f"multiple of 8 up to 128; not {compute_dtype=} and query, key and value of shape "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    ways = {name: partial(_in_parts, way, compute_dtype) for name, way in _WAYS.items()}
    has_chunks = are_known(query, key, value) and query.size * key.size * value.size > 0
    if implementation == "chunked" and not has_chunks:
        implementation = "reference"
    if implementation != "auto":
        return ways[implementation](query, key, value, mask)
    on_platform = {}
    if has_chunks and math.prod(query.shape[:-1]) * key.shape[-2] > CHUNK:
        on_platform["cpu"] = ways["chunked"]
    if fits and _cudnn_is_here():
        on_platform["cuda"] = ways["cudnn"]
    if not on_platform:
        return ways["reference"](query, key, value, mask)
    return lax.platform_dependent(query, key, value, mask, default=ways["reference"], **on_platform)


def fits_cudnn(query: Array, key: Array, value: Array, compute_dtype: DTypeLike | None) -> bool:
    """Whether NVIDIA's fused attention takes such operands, and gives their gradient too."""
    *_, length, d_k = query.shape
    return (
        compute_dtype is not None
        and are_known(query, key, value)
        and query.size * key.size > 0
        and jnp.dtype(compute_dtype).itemsize == 2
        and length % 2 == key.shape[-2] % 2 == 0
        and value.shape[-1] == d_k <= 128
        and d_k % 8 == 0
    )


def _cudnn_is_here() -> bool:
    # Without it JAX refuses to trace its call, for another platform too.
    return "cuda" in jax.devices()[0].client.platform_version


def _reference(
    query: Array, key: Array, value: Array, mask: Array | None, compute_dtype: DTypeLike | None
) -> Array:
    weights = attention_weights(query, key, mask, compute_dtype=compute_dtype)
    return matmul(weights, value, compute_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    query: Array, key: Array, value: Array, mask: Array | None, compute_dtype: DTypeLike | None
) -> Array:
    """`_reference` of as many heads at a time as `CHUNK` allows."""
    return _chunked_forward(query, key, value, mask, compute_dtype)[0]


def _chunked_forward(query, key, value, mask, compute_dtype):
    def attend(mask, query, key, value):
        query = query / query.shape[-1] ** 0.5
        logits = plain_matmul(query, key.T, compute_dtype)
        exponentials, total, largest = _exponentials(logits, mask)
        return plain_matmul(exponentials, value, compute_dtype) / total, largest + jnp.log(total)

    out, log_totals = _map_heads(attend, mask, query, key, value)
    return out, (query, key, value, mask, out, log_totals)


def _chunked_backward(compute_dtype, residuals, cotangent):
    query, key, value, mask, out, log_totals = residuals
    # Σₖ y dy of the softmax's derivative y ⊙ (dy − Σₖ y dy), from the products with V.
    weighted = (cotangent * out).sum(-1, keepdims=True)

    # All of [K, L], keys first: XLA for the CPU has fast products for these, but none that would
    # turn an array of that size.
    def gradients(mask, query, key, value, cotangent, log_total, weighted):
        scale = query.shape[-1] ** -0.5
        query = query * scale
        logits = plain_matmul(key, query.T, compute_dtype)
        # The inner where: exp of an empty row would overflow, and 0 · ∞ is its second derivative.
        weights = jnp.exp(jnp.where(mask, logits - log_total.T, -jnp.inf))
        grad_weights = plain_matmul(value, cotangent.T, compute_dtype)
        grad_logits = weights * (grad_weights - weighted.T)
        return (
            plain_matmul(key.T, grad_logits, compute_dtype).T * scale,
            plain_matmul(grad_logits, query, compute_dtype),
            plain_matmul(weights, cotangent, compute_dtype),
        )

    turned_mask = None if mask is None else jnp.swapaxes(jnp.atleast_2d(mask), -1, -2)
    arrays = (query, key, value, cotangent, log_totals, weighted)
    grads = _map_heads(gradients, turned_mask, *arrays)
    return *(g.astype(x.dtype) for g, x in zip(grads, arrays, strict=False)), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _map_heads(function: Callable[..., Any], mask: Array | None, *arrays: Array) -> Any:
    """function(mask, *arrays) of each head's matrices, for the query, the key … [..., H, ·, ·]."""
    *leading, length, _ = arrays[0].shape
    mask = jnp.ones((1, 1), bool) if mask is None else jnp.atleast_2d(mask)
    masks = mask.reshape(-1, *mask.shape[-2:])
    # Which of the masks each head has: they are not copied to the heads that share one.
    which = np.broadcast_to(np.arange(len(masks)).reshape(mask.shape[:-2]), leading).reshape(-1)
    most = min(which.size, max(1, CHUNK // (length * arrays[1].shape[-2])))
    size = next(n for n in range(most, 0, -1) if which.size % n == 0)

    def one(head):
        i, *matrices = head
        return function(masks[i], *matrices)

    flat = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
    out = lax.map(one, (jnp.asarray(which), *flat), batch_size=size)
    return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), out)


def _cudnn(
    query: Array, key: Array, value: Array, mask: Array | None, compute_dtype: DTypeLike | None
) -> Array:
    """`jax.nn.dot_product_attention`, which wants [B, L, H, d_k] and has mean(V) for nothing."""

    def examples(x):  # [..., H, L, d] -> [B, H, L, d]
        return x.reshape(-1, *(1, *x.shape)[-3:])

    def rows(x):  # [..., H, L, d] -> [B, L, H, d]
        return jnp.swapaxes(examples(x), 1, 2).astype(compute_dtype)

    def few(mask):  # one for all heads, or for all examples, stays one: cuDNN reads numbers
        mask = with_axes(mask, max(query.ndim, 4))
        *leading, heads, _, _ = mask.shape
        leading = query.shape[:-3] if math.prod(leading) > 1 else leading
        shape = (*leading, heads, query.shape[-2], key.shape[-2])
        return examples(jnp.broadcast_to(mask, shape))

    attends = None
    if mask is not None:
        mask = with_axes(mask, query.ndim)
        attends = mask.any(-1, keepdims=True)
        # Of a query without a key cuDNN gives a NaN gradient where K % 128 is 64 (pytorch 196678,
        # cuDNN 9.19; seen on an H200): it sees none.
        mask = few(mask | ~attends)
    out = jax.nn.dot_product_attention(
        *map(rows, (query, key, value)), mask=mask, implementation="cudnn"
    )
    out = jnp.swapaxes(out, 1, 2).reshape(query.shape).astype(working_dtype(query, key, value))
    return out if attends is None else jnp.where(attends, out, 0)


def _in_parts(
    way: Callable[..., Array],
    compute_dtype: DTypeLike | None,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
) -> Array:
    """The attention of each device's own examples and heads, where a mesh divides them."""
    heads = ("batch", "heads", None, None)
    operands = (query, key, value) if mask is None else (query, key, value, mask)

    def attend(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
        return way(query, key, value, mask, compute_dtype)

    return on_each_device(
        attend,
        *((x, heads) for x in operands),
        out=((*query.shape[:-1], value.shape[-1]), heads),
    )


_WAYS = {"reference": _reference, "chunked": _chunked, "cudnn": _cudnn}


@partial(compiled, static_argnames="num_heads")
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


@compiled
def merge_heads(x: Array) -> Array:
    """Concat(head₁, …, head_h) (§3.2.2): the inverse of `split_heads`.

    x: [..., H, L, d_k] -> [..., L, H·d_k]
    """
    assert_fits("x", x, (..., None, None, None))
    *leading, num_heads, length, d_k = x.shape
    return jnp.swapaxes(x, -2, -3).reshape(*leading, length, num_heads * d_k)


@partial(compiled, static_argnames=("num_heads", "compute_dtype", "implementation"))
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

    headᵢ = Attention(Q Wᵢ^Q, K Wᵢ^K, V Wᵢ^V), where Wᵢ is columns i·d_k … (i+1)·d_k − 1 of w_q, w_k
    or w_v. Self-attention is `query_input is key_value_input`.

    Args:
      query_input: [..., L, D].
      key_value_input: [..., K, D].
      w_q, w_k, w_v, w_o: [D, D].
      num_heads: h; divides D.
      mask: boolean, [L, K] or broadcastable to [..., H, L, K] with as many axes; True = may attend.
      compute_dtype: see `tfm.precision`.
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
    query = split_heads(linear(query_input, w_q, compute_dtype), num_heads)
    key = split_heads(linear(key_value_input, w_k, compute_dtype), num_heads)
    value = split_heads(linear(key_value_input, w_v, compute_dtype), num_heads)
    heads = scaled_dot_product_attention(
        query, key, value, mask, compute_dtype=compute_dtype, implementation=implementation
    )
    return linear(merge_heads(heads), w_o, compute_dtype)
