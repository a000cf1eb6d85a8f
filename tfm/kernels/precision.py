"""How two arrays are multiplied: one contraction, in one place.

Without a `compute_dtype` the product is exact for its type: f32 operands (or the wider of the
inputs) at the highest precision of the device, so that a GPU or TPU does not silently round the
operands to fewer bits. With `compute_dtype=jnp.bfloat16` the operands are rounded to bfloat16 and
the products are summed in f32, in the forward and in the backward pass. A GPU or TPU rounds the
sums of the linear maps between the layers too, which it has to write to memory and read again: half
the bytes, of which such a step has too many. Logits and the gradients of the weights stay as they
are summed.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from tfm.compilation import compiled
from tfm.kernels.implementation import Implementation, resolve
from tfm.kernels.quantization import Quantized, quantized_linear
from tfm.parallel.sharding import is_divided
from tfm.shapes import are_known


def on_cpu() -> bool:
    """Whether to write sums as XLA for the CPU has them fast.

    By `jax.default_device`, or else the process's first device: a program that is lowered for
    another platform keeps the form of this one. Of `lax.platform_dependent` JAX would compile the
    transpose anew in each gradient outside of jit.
    """
    # None, a platform by name, or a device.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return platform == "cpu"


def working_dtype(*arrays: Array) -> jnp.dtype:
    """What softmax, normalisation and losses work in: f32, or the widest of the inputs."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def floating(*arrays: Array) -> list[Array]:
    """Each array, integers and booleans as numbers of the working type: the rules below have a
    tangent for each of their operands, and integers have none."""
    dtype = working_dtype(*arrays)
    return [x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype) for x in arrays]


def _batched(
    a: Array, a_axis: int, b: Array, b_axis: int, compute_dtype: DTypeLike, rounded: bool = False
) -> Array:
    """Contracts one of the last two axes of each operand; all axes before them are batch axes.

    Of operands cast to `compute_dtype`, accumulated in at least f32, which is the result's type; on
    a GPU or TPU `rounded` to `compute_dtype` before.
    """
    batch = tuple(range(a.ndim - 2))
    axes = (((a.ndim + a_axis,), (b.ndim + b_axis,)), (batch, batch))
    summed_in = jnp.promote_types(jnp.float32, compute_dtype)
    rounded = rounded and compute_dtype == jnp.bfloat16 and not on_cpu()  # float16 might overflow
    product = lax.dot_general(
        a.astype(compute_dtype),
        b.astype(compute_dtype),
        axes,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=compute_dtype if rounded else summed_in,
    )
    return product.astype(summed_in)


# Plain autodiff would multiply the f32 cotangent by a bf16 operand, which is an f32 product: the
# backward pass, two thirds of the work, would gain nothing. The rules below round the cotangent.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision_matmul(a: Array, b: Array, compute_dtype: DTypeLike) -> Array:
    return _batched(a, -1, b, -2, compute_dtype)


def _forward(a, b, compute_dtype):
    return _batched(a, -1, b, -2, compute_dtype), (a, b)


def _backward(compute_dtype, operands, cotangent):
    a, b = operands
    grad_a = _batched(cotangent, -1, b, -1, compute_dtype)  # g bᵀ
    grad_b = _batched(a, -2, cotangent, -2, compute_dtype)  # aᵀ g
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


_low_precision_matmul.defvjp(_forward, _backward)


@compiled(static=("compute_dtype", "implementation"))
def matmul(
    a: Array,
    b: Array,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """a b over the last two axes, with equal (or broadcastable) leading axes.

    a: [..., L, I], b: [..., I, O] -> [..., L, O] in f32, or the wider of the inputs.
    """
    a, b = floating(a, b)
    leading = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = jnp.broadcast_to(a, leading + a.shape[-2:])
    b = jnp.broadcast_to(b, leading + b.shape[-2:])
    if compute_dtype is None or resolve(implementation) == "formula":
        return plain_matmul(a, b, compute_dtype)
    return _low_precision_matmul(a, b, jnp.dtype(compute_dtype))


def plain_matmul(a: Array, b: Array, compute_dtype: DTypeLike | None = None) -> Array:
    """`matmul` of equal leading axes without a custom rule: rules of differentiation use it too,
    since forward mode cannot go through a custom_vjp."""
    return _batched(a, -1, b, -2, compute_dtype or working_dtype(a, b))


@compiled(static=("compute_dtype", "implementation", "rounded"))
def linear(
    x: Array,
    w: Array | Quantized,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    rounded: bool = True,
) -> Array:
    """x w, one row at a time; of a `Quantized` matrix in 8 bits, whatever the compute_dtype.

    x: [..., I], w: [I, O] -> [..., O] in f32, or the wider of the inputs. In bfloat16 a GPU or TPU
    rounds it too, and its gradient by x, unless `rounded` is False.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(w, Quantized):
        y = quantized_linear(rows, w)
    elif resolve(implementation) == "formula":
        rows, w = floating(rows, w)
        y = plain_matmul(rows, w, compute_dtype)
    elif compute_dtype is None:
        y = _linear(*floating(rows, w))
    else:
        y = _low_precision_linear(*floating(rows, w), jnp.dtype(compute_dtype), rounded)
    return y.reshape(*x.shape[:-1], w.shape[-1])


# xᵀ g, the gradient of w, contracts the rows of both: XLA for the CPU has no fast product for that,
# in bf16 one of half the speed. It has one for the same numbers with x turned beforehand, which is
# what the transpose of the product below is.
@jax.custom_jvp
def _linear(x: Array, w: Array) -> Array:
    return _batched(x, -1, w, -2, working_dtype(x, w))


@_linear.defjvp
def _linear_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    dtype = working_dtype(x, w)
    by_w = _batched(blocked_transpose(x), -2, dw, -2, dtype)
    return _linear(x, w), _batched(dx, -1, w, -2, dtype) + by_w


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _low_precision_linear(x: Array, w: Array, compute_dtype: DTypeLike, rounded: bool) -> Array:
    return _batched(x, -1, w, -2, compute_dtype, rounded)


def _linear_forward(x, w, compute_dtype, rounded):
    return _batched(x, -1, w, -2, compute_dtype, rounded), (x, w)


def _linear_backward(compute_dtype, rounded, operands, cotangent):
    x, w = operands
    grad_x = _batched(cotangent, -1, w, -1, compute_dtype, rounded)
    # The barrier: where w is a transpose (of tied embeddings), XLA would swap the operands of this
    # product to turn its result, and the CPU has no bf16 product of those.
    grad_w = lax.optimization_barrier(
        _batched(blocked_transpose(x), -1, cotangent, -2, compute_dtype)
    )
    return grad_x.astype(x.dtype), grad_w.astype(w.dtype)


_low_precision_linear.defvjp(_linear_forward, _linear_backward)


@compiled()
def blocked_transpose(x: Array) -> Array:
    """xᵀ, on a CPU written out a few rows at a time: [N, I] -> [I, N].

    All rows at once it would be read column by column, from another cache line each time.
    """
    if not are_known(x) or x.size < 2**19 or is_divided():  # of rows on other devices: no loop
        return x.T
    rows = next((n for n in range(24, 7, -1) if len(x) % n == 0), None)
    if rows is None:
        return x.T

    def in_blocks(x):
        def write(i, out):
            block = lax.dynamic_slice_in_dim(x, i * rows, rows)
            return lax.dynamic_update_slice_in_dim(out, block.T, i * rows, axis=1)

        return lax.fori_loop(0, len(x) // rows, write, jnp.zeros(x.shape[::-1], x.dtype))

    return lax.platform_dependent(x, cpu=in_blocks, default=jnp.transpose)


def broadcast_row(
    row: Array, shape: tuple[int, ...], implementation: Implementation = "auto"
) -> Array:
    """`row` [D], repeated to `shape` [..., D]."""
    (row,) = floating(row)
    if resolve(implementation) == "formula":
        return jnp.broadcast_to(row, shape)
    return _over_rows(row, shape)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _over_rows(row: Array, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(row, shape)


# The gradient of a row is a sum over all rows. XLA for the CPU takes ten times as long for it as
# for the product that is the transpose of this one; of eight rows, since it has no fast one of one.
# For a GPU the sum is part of the kernel that makes the rows.
@_over_rows.defjvp
def _over_rows_jvp(shape, primals, tangents):
    (row,), (tangent,) = primals, tangents
    if not on_cpu():
        return _over_rows(row, shape), jnp.broadcast_to(tangent, shape)
    first = jnp.zeros((8, math.prod(shape[:-1])), row.dtype).at[0].set(1)
    eight = jnp.pad(tangent[None], [(0, 7), (0, 0)])
    rows = _batched(first, -2, eight, -2, row.dtype)
    return _over_rows(row, shape), rows.reshape(shape).astype(row.dtype)
