"""How two arrays are multiplied: one contraction, in one place.

Without a `compute_dtype` the product is exact for its type: f32 operands (or the wider of the
inputs) at the highest precision of the device, so that a GPU or TPU does not silently round the
operands to fewer bits. With `compute_dtype=jnp.bfloat16` the operands are rounded to bfloat16 and
the products are summed in f32, in the forward and in the backward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from tfm.quantization import Quantized, quantized_linear


def working_dtype(*arrays: Array) -> jnp.dtype:
    """What softmax, normalisation and losses work in: f32, or the widest of the inputs."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _product(a: Array, b: Array, dimension_numbers, compute_dtype: DTypeLike) -> Array:
    """`lax.dot_general` of operands cast to `compute_dtype`, accumulated in at least f32."""
    return lax.dot_general(
        a.astype(compute_dtype),
        b.astype(compute_dtype),
        dimension_numbers,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(jnp.float32, compute_dtype),
    )


def _batched(a: Array, a_axis: int, b: Array, b_axis: int, compute_dtype: DTypeLike) -> Array:
    """Contracts one of the last two axes of each operand; all axes before them are batch axes."""
    batch = tuple(range(a.ndim - 2))
    axes = (((a.ndim + a_axis,), (b.ndim + b_axis,)), (batch, batch))
    return _product(a, b, axes, compute_dtype)


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


def matmul(a: Array, b: Array, compute_dtype: DTypeLike | None = None) -> Array:
    """a b over the last two axes, with equal (or broadcastable) leading axes.

    a: [..., L, I], b: [..., I, O] -> [..., L, O] in f32, or the wider of the inputs.
    """
    leading = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = jnp.broadcast_to(a, leading + a.shape[-2:])
    b = jnp.broadcast_to(b, leading + b.shape[-2:])
    if compute_dtype is None:
        return _batched(a, -1, b, -2, working_dtype(a, b))
    return _low_precision_matmul(a, b, jnp.dtype(compute_dtype))


def linear(x: Array, w: Array | Quantized, compute_dtype: DTypeLike | None = None) -> Array:
    """x w, one row at a time; of a `Quantized` matrix in 8 bits, whatever the compute_dtype.

    x: [..., I], w: [I, O] -> [..., O] in f32, or the wider of the inputs.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = quantized_linear(rows, w) if isinstance(w, Quantized) else matmul(rows, w, compute_dtype)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def over_rows(row: Array, shape: tuple[int, ...]) -> Array:
    """`row` [D], repeated to `shape` [..., D].

    Its gradient is a sum over rows. XLA for the CPU takes ten times as long for that sum as for a
    product with ones, and for a product of one row as long as for one of eight: so it is that one.
    """

    def repeat(_, row):
        return jnp.broadcast_to(row, shape)

    def sum_rows(_, cotangent):
        rows = cotangent.reshape(-1, shape[-1])
        ones = jnp.ones((8, rows.shape[0]), rows.dtype)
        return matmul(ones, rows)[0].astype(row.dtype)

    return jax.custom_derivatives.linear_call(repeat, sum_rows, (), row)
