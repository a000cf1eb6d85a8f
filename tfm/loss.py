"""§5.4 Label smoothing."""

from functools import partial
from typing import get_args

import jax.numpy as jnp
from jax import Array, nn
from jax.typing import ArrayLike

from tfm.compilation import compiled
from tfm.kernels.label_smoothing import SmoothedOver, expected_logit
from tfm.kernels.precision import working_dtype
from tfm.shapes import as_ids, assert_fits, assert_ids, is_traced, nan_unless


def label_smoothed_cross_entropy(
    logits: Array,
    labels: Array,
    smoothing: ArrayLike = 0.1,
    over: SmoothedOver = "all",
    vocab_size: int | None = None,
) -> Array:
    """−Σᵥ q(v) log p(v) with q = (1 − ε)·onehot(label) + ε/V and p = softmax(logits) (§5.4).

    In the form lse(z) − (1 − ε)·z_y − ε·mean(z), which needs no one-hot array, on a CPU; elsewhere
    as lse(z) − Σᵥ q(v) z(v), which is one sweep there. In nats a token.

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
    expected = expected_logit(logits, label, weights, over, vocab_size)
    is_distribution = (weights[0] >= 0) & (weights[1] >= 0)
    return nan_unless(inside & is_distribution, nn.logsumexp(logits, axis=-1) - expected)
