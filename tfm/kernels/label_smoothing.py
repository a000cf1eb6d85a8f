"""Σᵥ q(v) z(v) of the smoothed distribution q, as a CPU and as other devices have it fast."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from tfm.kernels.precision import on_cpu
from tfm.shapes import Number

SmoothedOver = Literal["all", "others", "others_but_padding"]
"""Which words share ε; see `tfm.label_smoothed_cross_entropy`."""


def expected_logit(
    logits: Array,
    label: Array,
    smoothing: Number,
    over: SmoothedOver,
    vocab_size: int,
) -> Array:
    """Σᵥ q(v) z(v): logits [..., V], label [..., 1] -> [...]"""
    form = by_gather if on_cpu() else in_one_sum
    return form(logits, label, smoothing, over, vocab_size)


def by_gather(
    logits: Array, label: Array, smoothing: Number, over: SmoothedOver, vocab_size: int
) -> Array:
    """(1 − ε) z(label) + ε · mean of z over the words that share ε."""
    label_logit = jnp.take_along_axis(logits, label, axis=-1)[..., 0]
    _, shares, number = _sharing(logits, label, over, vocab_size)
    sharing = logits if shares is None else jnp.where(shares, logits, 0)
    return weighted(1 - smoothing, label_logit) + weighted(smoothing, sharing.sum(-1) / number)


def in_one_sum(
    logits: Array, label: Array, smoothing: Number, over: SmoothedOver, vocab_size: int
) -> Array:
    """The same in one sweep: the gradient of a gather is a scatter, before which XLA for a GPU
    would write the gradient of all logits to memory, and once more to round it."""
    q = smoothed_labels(logits, label, smoothing, over, vocab_size)
    return weighted(q, logits).sum(-1)


def smoothed_labels(
    logits: Array, label: Array, smoothing: Number, over: SmoothedOver, vocab_size: int
) -> Array:
    """q(v) = (1 − ε)·onehot(label) + ε/n for the n words that share ε: [..., V] as the logits."""
    is_label, shares, number = _sharing(logits, label, over, vocab_size)
    q = jnp.where(is_label, 1 - smoothing, 0)
    return q + (smoothing / number if shares is None else jnp.where(shares, smoothing / number, 0))


def _sharing(
    logits: Array, label: Array, over: SmoothedOver, vocab_size: int
) -> tuple[Array, Array | None, int]:
    """Which word is the label, which words share ε (None: all), and their number."""
    first = 1 if over == "others_but_padding" else 0
    number = vocab_size - first - (over != "all")
    words = lax.broadcasted_iota(label.dtype, logits.shape, logits.ndim - 1)
    is_label = words == label
    if number == logits.shape[-1]:
        return is_label, None, number
    shares = (words >= first) & (words < vocab_size)
    return is_label, shares & ~is_label if over != "all" else shares, number


def weighted(weight: Number, logit: Array) -> Array:
    """weight · logit, with 0 · −∞ = 0: a forbidden word without weight does not count."""
    return weight * jnp.where((weight == 0) & jnp.isneginf(logit), 0, logit)
