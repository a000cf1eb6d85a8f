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

Kernel = Callable[[Array, Array, Array, Array | None, Array | None], Array]
"""query, key, value, mask, bias -> [..., H, L, d_v]"""


def attend(
    formula: Kernel,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
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
        "chunked": partial(_chunked, compute_dtype),
        "cudnn": partial(_cudnn, compute_dtype),
    }
    kernels = {name: partial(_in_parts, kernel) for name, kernel in named.items()}
    has_chunks = are_known(query, key, value) and query.size * key.size * value.size > 0
    if implementation == "chunked" and not has_chunks:
        implementation = "formula"
    operands = query, key, value, mask, bias
    if implementation != "auto":
        return kernels[implementation](*operands)
    on_platform = {}
    if has_chunks and math.prod(query.shape[:-1]) * key.shape[-2] > CHUNK:
        on_platform["cpu"] = kernels["chunked"]
    if fits and bias is None and _cudnn_is_here():  # it would round the bias
        on_platform["cuda"] = kernels["cudnn"]
    if not on_platform:
        return kernels["formula"](*operands)
    return lax.platform_dependent(*operands, default=kernels["formula"], **on_platform)


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


def _chunked(
    compute_dtype: DTypeLike | None,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
) -> Array:
    """The formula for as many heads at a time as `CHUNK` allows."""
    if bias is not None:  # its gradient is summed over what is broadcast here
        bias = with_axes(bias, query.ndim)
        bias = jnp.broadcast_to(bias, (*bias.shape[:-2], query.shape[-2], key.shape[-2]))
    return _attend_in_chunks(compute_dtype, query, key, value, mask, bias)


# Of `jax.checkpoint` the backward pass would need the sums of the softmax anew: with its own rule
# forward and backward take three quarters of the time (2 cores, 32 × 8 heads, L 256 and 1,024).
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_chunks(compute_dtype, query, key, value, mask, bias):
    return _chunked_forward(compute_dtype, query, key, value, mask, bias)[0]


def _chunked_forward(compute_dtype, query, key, value, mask, bias):
    def attend(mask, bias, query, key, value):
        query = query / query.shape[-1] ** 0.5
        logits = plain_matmul(query, key.T, compute_dtype)
        logits = logits if bias is None else logits + bias
        numerators, total, largest = exponentials(logits, mask)
        out = plain_matmul(numerators, value, compute_dtype) / total
        return (out, largest + jnp.log(total)), None

    (out, log_totals), _ = _map_chunks(attend, mask, bias, query, key, value)
    return out, (query, key, value, mask, bias, out, log_totals)


def _chunked_backward(compute_dtype, residuals, cotangent):
    query, key, value, mask, bias, out, log_totals = residuals
    # Σₖ y dy of the softmax's derivative y ⊙ (dy − Σₖ y dy), from the products with V.
    weighted = (cotangent * out).sum(-1, keepdims=True)

    # All of [K, L], keys first: XLA for the CPU has fast products for these, but none that would
    # transpose an array of that size.
    def gradients(mask, bias, query, key, value, cotangent, log_total, weighted):
        scale = query.shape[-1] ** -0.5
        query = query * scale
        logits = plain_matmul(key, query.T, compute_dtype)
        logits = logits if bias is None else logits + bias
        # The inner where: exp of an empty row would overflow, and 0 · ∞ is its second derivative.
        weights = jnp.exp(jnp.where(mask, logits - log_total.T, -jnp.inf))
        grad_weights = plain_matmul(value, cotangent.T, compute_dtype)
        grad_logits = weights * (grad_weights - weighted.T)
        grads = (
            plain_matmul(key.T, grad_logits, compute_dtype).T * scale,
            plain_matmul(grad_logits, query, compute_dtype),
            plain_matmul(weights, cotangent, compute_dtype),
        )
        return grads, None if bias is None else grad_logits

    def keys_first(x):
        return None if x is None else jnp.swapaxes(jnp.atleast_2d(x), -1, -2)

    arrays = (query, key, value, cotangent, log_totals, weighted)
    grads, grad_bias = _map_chunks(gradients, keys_first(mask), keys_first(bias), *arrays)
    grads = (g.astype(x.dtype) for g, x in zip(grads, arrays, strict=False))
    return *grads, None, None if bias is None else keys_first(grad_bias).astype(bias.dtype)


_attend_in_chunks.defvjp(_chunked_forward, _chunked_backward)


def _map_chunks(
    function: Callable[..., Any], mask: Array | None, bias: Array | None, *arrays: Array
) -> Any:
    """function(mask, bias, *arrays) of each head's matrices: of query, key … [..., H, ·, ·].

    Of the two results of the function the second is summed over the heads that share a bias.
    """
    *leading, length, _ = arrays[0].shape
    number = math.prod(leading)
    most = min(number, max(1, CHUNK // (length * arrays[1].shape[-2])))
    size = next(n for n in range(most, 0, -1) if number % n == 0)

    def shared(x: Array) -> tuple[Array, Array]:
        """The matrices [N, ·, ·], and the number of each head's, by chunks: they are not copied."""
        index = np.arange(math.prod(x.shape[:-2])).reshape(x.shape[:-2])
        index = np.broadcast_to(index, leading).reshape(-1, size)
        return x.reshape(-1, *x.shape[-2:]), jnp.asarray(index)

    masks, mask_index = shared(jnp.ones((1, 1), bool) if mask is None else jnp.atleast_2d(mask))
    biases, bias_index = (None, None) if bias is None else shared(bias)

    def chunk(sums, own):
        i, j, *matrices = own
        its_biases = None if biases is None else biases[j]
        results, parts = jax.vmap(function)(masks[i], its_biases, *matrices)
        return sums if parts is None else _add_rows(sums, j, parts), results

    by_chunk = [x.reshape(-1, size, *x.shape[-2:]) for x in arrays]
    sums: Any = None if biases is None else jnp.zeros_like(biases)
    sums, results = lax.scan(chunk, sums, (mask_index, bias_index, *by_chunk))
    results = jax.tree.map(lambda x: x.reshape(*leading, *x.shape[2:]), results)
    return results, None if bias is None else sums.reshape(bias.shape)


def _add_rows(total: Array, index: Array, rows: Array) -> Array:
    """total.at[index].add(rows) row by row, which XLA for the CPU does in place, and fast."""

    def add(i, total):
        row = total[index[i]] + rows[i]
        return lax.dynamic_update_index_in_dim(total, row, index[i], 0)

    return lax.fori_loop(0, len(rows), add, total)


def _cudnn(
    compute_dtype: DTypeLike | None,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
) -> Array:
    """`jax.nn.dot_product_attention`, which wants [B, L, H, d_k] and has mean(V) for nothing; it
    takes the bias in the compute_dtype."""

    def examples(x):  # [..., H, L, d] -> [B, H, L, d]
        return x.reshape(-1, *(1, *x.shape)[-3:])

    def rows(x):  # [..., H, L, d] -> [B, L, H, d]
        return jnp.swapaxes(examples(x), 1, 2).astype(compute_dtype)

    def few(x):  # one for all heads, or for all examples, stays one: cuDNN reads numbers
        x = with_axes(x, max(query.ndim, 4))
        *leading, heads, _, _ = x.shape
        leading = query.shape[:-3] if math.prod(leading) > 1 else leading
        shape = (*leading, heads, query.shape[-2], key.shape[-2])
        return examples(jnp.broadcast_to(x, shape))

    attends = None
    if mask is not None:
        mask = with_axes(mask, query.ndim)
        attends = mask.any(-1, keepdims=True)
        # Of a query without a key cuDNN gives a NaN gradient where K % 128 is 64 (pytorch 196678,
        # cuDNN 9.19; seen on an H200): it sees none.
        mask = few(mask | ~attends)
    bias = None if bias is None else few(bias).astype(compute_dtype)
    out = jax.nn.dot_product_attention(
        rows(query), rows(key), rows(value), bias, mask, implementation="cudnn"
    )
    out = jnp.swapaxes(out, 1, 2).reshape(query.shape).astype(working_dtype(query, key, value))
    return out if attends is None else jnp.where(attends, out, 0)


def _in_parts(
    kernel: Kernel,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
) -> Array:
    """The attention of each device's own examples and heads, where a mesh divides them."""
    heads = ("batch", "heads", None, None)
    others = {name: x for name, x in {"mask": mask, "bias": bias}.items() if x is not None}

    def attend(query: Array, key: Array, value: Array, *own: Array) -> Array:
        given = dict(zip(others, own, strict=True))
        return kernel(query, key, value, given.get("mask"), given.get("bias"))

    return shard_map_logical(
        attend,
        *((x, heads) for x in (query, key, value, *others.values())),
        out=((*query.shape[:-1], value.shape[-1]), heads),
    )
