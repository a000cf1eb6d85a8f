"""The softmax of attention, over the keys that a query may attend to."""

import jax
import jax.numpy as jnp
from jax import Array

from tfm.shapes import with_axes


@jax.custom_jvp
def masked_softmax(logits: Array, mask: Array | None = None) -> Array:
    """softmax over the last axis, restricted to where `mask` is True.

    y = softmax(z): yₖ = exp(zₖ) / Σⱼ exp(zⱼ), summed over allowed j only; dy = y ⊙ (dz − Σ y dz).
    A row with nothing allowed gives zeros, and no gradient: there is nothing to attend to.

    logits: [..., K], mask: boolean, broadcastable to it -> [..., K]
    """
    numerators, total, _ = exponentials(logits, mask)
    return numerators / total


def exponentials(logits: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """exp(z − largest) where allowed, else 0; its sum, or 1 of an empty row; and the largest z."""
    mask = jnp.ones((), bool) if mask is None else with_axes(mask, logits.ndim)
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(mask, logits, lowest)
    # Subtracting a row's maximum changes nothing but keeps exp from overflowing.
    largest = logits.max(-1, keepdims=True, initial=lowest if logits.shape[-1] == 0 else None)
    numerators = jnp.where(mask, jnp.exp(logits - largest), 0)
    total = numerators.sum(-1, keepdims=True)
    return numerators, jnp.where(total > 0, total, 1), largest


# Autodiff would keep the exponentials and their sums too; the weights alone are enough.
@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    weights = masked_softmax(*primals)
    weighted = weights * tangents[0]
    return weights, weighted - weights * weighted.sum(-1, keepdims=True)
