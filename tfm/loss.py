"""§5.4 Label smoothing."""

from functools import partial
from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array, lax, nn
from jax.typing import ArrayLike

from tfm.compilation import compiled
from tfm.precision import on_cpu, working_dtype
from tfm.shapes import as_ids, assert_fits, assert_ids, is_traced, nan_unless

SmoothedOver = Literal["all", "others", "others_but_padding"]


def label_smoothed_cross_entropy(
    logits: Array,
    labels: Array,
    smoothing: ArrayLike = 0.1,
    over: SmoothedOver = "all",
    vocab_size: int | None = None,
) -> Array:
    """−Σᵥ q(v) log p(v) with q = (1 − ε)·onehot(label) + ε/V and p = softmax(logits) (§5.4).

    In the form lse(z) − (1 − ε)·z_y − ε·mean(z), which needs no one-hot array; in nats a token.

    The paper does not say which words share ε. Over `all`, as here, the label gets 1 − ε + ε/V.
    Over the `others` it gets 1 − ε, and each of them ε/(V − 1) (tensor2tensor, fairseq);
    `others_but_padding` leaves out symbol 0 too, ε/(V − 2) (the Annotated Transformer).

    Where `vocab_size` is less than V, the words beyond it are none: their logits are −∞, and they
    have no share of ε.

    A word that is forbidden by a logit of −∞ costs nothing where q(v) = 0, and ∞ elsewhere.

    logits: [..., V], labels: [...] integers in [0, vocab_size), smoothing: a number -> [...]

    Inside jit, which cannot raise, a label or a smoothing outside gives NaN, and no gradient: a
    `jnp.where` that leaves such positions out leaves nothing of them.

    Raises:
      AssertionError: labels whose shape is not that of the logits without their last axis.
      ValueError: smoothing outside [0, 1], an unknown `over`, a vocab_size above V, or a label
        outside [0, vocab_size).
    """
    assert_fits("logits", logits, (..., None))
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    if vocab_size > logits.shape[-1]:
        raise ValueError(f"{vocab_size=} is more than the logits' {logits.shape[-1]}")
    assert_ids("labels", labels, vocab_size)
    assert_smoothing(smoothing)
    if over not in get_args(SmoothedOver):
        raise ValueError(f"over={over!r} must be one of {get_args(SmoothedOver)}")
    weights = 1 - smoothing, smoothing
    return _label_smoothed_cross_entropy(logits, labels, weights, over, vocab_size)


def assert_smoothing(smoothing: ArrayLike) -> None:
    """Asserts that a concrete smoothing is one.

    Raises:
      ValueError: it is outside [0, 1].
    """
    if not is_traced(smoothing) and not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], not {smoothing}")


@partial(compiled, static_argnames=("over", "vocab_size"))
def _label_smoothed_cross_entropy(
    logits: Array,
    labels: Array,
    weights: tuple[ArrayLike, ArrayLike],
    over: SmoothedOver,
    vocab_size: int,
) -> Array:
    """The loss, with `weights` 1 − ε and ε."""
    assert_fits("labels", labels, logits.shape[:-1], logits=logits)
    logits = logits.astype(working_dtype(logits))
    labels = as_ids(labels)
    inside = (labels >= 0) & (labels < vocab_size)
    label = jnp.where(inside, labels, 0)[..., None]
    expected_logit = _expected_by_gather if on_cpu() else _expected_in_one_sum
    expected = expected_logit(over, vocab_size, logits, label, weights)
    is_distribution = (weights[0] >= 0) & (weights[1] >= 0)
    return nan_unless(inside & is_distribution, nn.logsumexp(logits, axis=-1) - expected)


def _expected_by_gather(
    over: SmoothedOver, vocab_size: int, logits: Array, label: Array, weights: tuple
) -> Array:
    """Σᵥ q(v) z(v): the label's logit, and a sum over the words that share ε."""
    label_logit = jnp.take_along_axis(logits, label, axis=-1)[..., 0]
    _, shares, number = _sharing(logits, label, over, vocab_size)
    sharing = logits if shares is None else jnp.where(shares, logits, 0)
    return _weighted(weights[0], label_logit) + _weighted(weights[1], sharing.sum(-1) / number)


def _expected_in_one_sum(
    over: SmoothedOver, vocab_size: int, logits: Array, label: Array, weights: tuple
) -> Array:
    """The same in one sweep: the gradient of a gather is a scatter, before which XLA for a GPU
    would write the gradient of all logits to memory, and once more to round it."""
    is_label, shares, number = _sharing(logits, label, over, vocab_size)
    q = jnp.where(is_label, weights[0], 0)
    q += weights[1] / number if shares is None else jnp.where(shares, weights[1] / number, 0)
    return _weighted(q, logits).sum(-1)


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


def _weighted(weight: ArrayLike, logit: Array) -> Array:
    """weight · logit, with 0 · −∞ = 0: a forbidden word without weight does not count."""
    return weight * jnp.where((weight == 0) & jnp.isneginf(logit), 0, logit)
