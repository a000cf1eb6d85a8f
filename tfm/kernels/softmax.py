"""The softmax of attention, over the keys that a query may attend to."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from tfm.kernels.implementation import Implementation, resolve
from tfm.shapes import with_axes


def masked_softmax(
    logits: Array, mask: Array | None = None, implementation: Implementation = "auto"
) -> Array:
    """softmax over the last axis, restricted to where `mask` is True.

    y = softmax(z): yₖ = exp(zₖ) / Σⱼ exp(zⱼ), summed over allowed j only; dy = y ⊙ (dz − Σ y dz).
    A row with nothing allowed gives zeros, and no gradient: there is nothing to attend to.

    logits: [..., K], mask: boolean, broadcastable to it -> [..., K]
    """
    form = _softmax if resolve(implementation) == "formula" else _softmax_with_derivative
    return form(logits, mask)


def _softmax(logits: Array, mask: Array | None) -> Array:
    numerators, total, _ = exponentials(logits, mask)
    return numerators / total


def exponentials(logits: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """exp(z − largest) where allowed, else 0; its sum, or 1 of an empty row; and the largest z."""
    mask = jnp.ones((), bool) if mask is None else with_axes(mask, logits.ndim)
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(mask, logits, lowest)
    # Subtracting a row's maximum changes nothing, nor does its gradient: it keeps exp from
    # overflowing.
    largest = logits.max(-1, keepdims=True, initial=lowest if logits.shape[-1] == 0 else None)
    largest = lax.stop_gradient(largest)
    numerators = jnp.where(mask, jnp.exp(logits - largest), 0)
    total = numerators.sum(-1, keepdims=True)
    return numerators, jnp.where(total > 0, total, 1), largest


_softmax_with_derivative = jax.custom_jvp(_softmax)


# Autodiff would keep the exponentials and their sums too; the weights alone are enough.
@_softmax_with_derivative.defjvp
def _softmax_jvp(primals, tangents):
    weights = _softmax_with_derivative(*primals)
    weighted = weights * tangents[0]
    return weights, weighted - weights * weighted.sum(-1, keepdims=True)
