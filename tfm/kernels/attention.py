"""Attention without all of its weights in memory: a few heads at a time, or NVIDIA's kernel."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from tfm.kernels.implementation import Implementation, resolve
from tfm.kernels.precision import plain_matmul, working_dtype
from tfm.kernels.softmax import exponentials
from tfm.parallel.sharding import shard_map_logical
from tfm.shapes import are_known, with_axes

CHUNK = 2**20
"""Logits that the chunked attention holds at a time: 4 MB in f32, which a CPU's cache takes."""

Kernel = Callable[[Array, Array, Array, Array | None], Array]
"""query, key, value, mask -> [..., H, L, d_v]"""


def attend(
    formula: Kernel,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    compute_dtype: DTypeLike | None,
    implementation: Implementation,
) -> Array:
    """`formula` of these operands, or the same function computed in another way.

    See `tfm.scaled_dot_product_attention`, which has checked the operands.
    """
    implementation = resolve(implementation)
    fits = fits_cudnn(query, key, value, compute_dtype)
    if implementation == "cudnn" and not fits:
        raise ValueError(
            "cudnn attention takes a compute_dtype of 16 bits, even L and K, and d_v = d_k, a "
            f"multiple of 8 up to 128; not {compute_dtype=} and query, key and value of shape "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    named: dict[str, Kernel] = {
        "formula": formula,
        "chunked": lambda q, k, v, mask: _chunked(q, k, v, mask, compute_dtype),
        "cudnn": lambda q, k, v, mask: _cudnn(q, k, v, mask, compute_dtype),
    }
    kernels = {name: partial(_in_parts, kernel) for name, kernel in named.items()}
    has_chunks = are_known(query, key, value) and query.size * key.size * value.size > 0
    if implementation == "chunked" and not has_chunks:
        implementation = "formula"
    if implementation != "auto":
        return kernels[implementation](query, key, value, mask)
    on_platform = {}
    if has_chunks and math.prod(query.shape[:-1]) * key.shape[-2] > CHUNK:
        on_platform["cpu"] = kernels["chunked"]
    if fits and _cudnn_is_here():
        on_platform["cuda"] = kernels["cudnn"]
    if not on_platform:
        return kernels["formula"](query, key, value, mask)
    default = kernels["formula"]
    return lax.platform_dependent(query, key, value, mask, default=default, **on_platform)


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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    query: Array, key: Array, value: Array, mask: Array | None, compute_dtype: DTypeLike | None
) -> Array:
    """The formula for as many heads at a time as `CHUNK` allows."""
    return _chunked_forward(query, key, value, mask, compute_dtype)[0]


def _chunked_forward(query, key, value, mask, compute_dtype):
    def attend(mask, query, key, value):
        query = query / query.shape[-1] ** 0.5
        logits = plain_matmul(query, key.T, compute_dtype)
        numerators, total, largest = exponentials(logits, mask)
        return plain_matmul(numerators, value, compute_dtype) / total, largest + jnp.log(total)

    out, log_totals = _map_chunks(attend, mask, query, key, value)
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
    grads = _map_chunks(gradients, turned_mask, *arrays)
    return *(g.astype(x.dtype) for g, x in zip(grads, arrays, strict=False)), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _map_chunks(function: Callable[..., Any], mask: Array | None, *arrays: Array) -> Any:
    """function(mask, *arrays) of each head's matrices, for the query, the key … [..., H, ·, ·]."""
    *leading, length, _ = arrays[0].shape
    mask = jnp.ones((1, 1), bool) if mask is None else jnp.atleast_2d(mask)
    masks = mask.reshape(-1, *mask.shape[-2:])
    # Heads that share a mask read one copy of it.
    mask_index = np.arange(len(masks)).reshape(mask.shape[:-2])
    mask_index = np.broadcast_to(mask_index, leading).reshape(-1)
    most = min(mask_index.size, max(1, CHUNK // (length * arrays[1].shape[-2])))
    size = next(n for n in range(most, 0, -1) if mask_index.size % n == 0)

    def one(head):
        i, *matrices = head
        return function(masks[i], *matrices)

    flat = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
    out = lax.map(one, (jnp.asarray(mask_index), *flat), batch_size=size)
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
        rows(query), rows(key), rows(value), mask=mask, implementation="cudnn"
    )
    out = jnp.swapaxes(out, 1, 2).reshape(query.shape).astype(working_dtype(query, key, value))
    return out if attends is None else jnp.where(attends, out, 0)


def _in_parts(kernel: Kernel, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """The attention of each device's own examples and heads, where a mesh divides them."""
    heads = ("batch", "heads", None, None)
    operands = (query, key, value) if mask is None else (query, key, value, mask)

    def attend(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
        return kernel(query, key, value, mask)

    return shard_map_logical(
        attend,
        *((x, heads) for x in operands),
        out=((*query.shape[:-1], value.shape[-1]), heads),
    )
