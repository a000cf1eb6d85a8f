"""§5.4 Label smoothing."""

from typing import Any, get_args

import jax.numpy as jnp
from jax import Array, nn

from tfm.compilation import compiled
from tfm.kernels.implementation import Implementation, resolve
from tfm.kernels.label_smoothing import SmoothedOver, expected_logit, smoothed_labels, weighted
from tfm.kernels.precision import working_dtype
from tfm.shapes import Number, are_known, as_ids, assert_fits, assert_ids, is_traced, nan_unless


def assert_smoothing(smoothing: Number) -> None:
    """Asserts that a concrete smoothing is one.

    Raises:
      ValueError: it is outside [0, 1].
    """
    if not is_traced(smoothing) and not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], not {smoothing}")


def _check(
    logits: Array,
    labels: Array,
    smoothing: Number = 0.1,
    over: SmoothedOver = "all",
    vocab_size: int | None = None,
    **_: Any,
) -> None:
    assert_smoothing(smoothing)
    if getattr(logits, "ndim", 0):
        assert_ids("labels", labels, logits.shape[-1] if vocab_size is None else vocab_size)


@compiled(static=("over", "vocab_size", "implementation"), check=_check)
def label_smoothed_cross_entropy(
    logits: Array,
    labels: Array,
    smoothing: Number = 0.1,
    over: SmoothedOver = "all",
    vocab_size: int | None = None,
    *,
    implementation: Implementation = "auto",
) -> Array:
    """−Σᵥ q(v) log p(v) with q = (1 − ε)·onehot(label) + ε/V and p = softmax(logits) (§5.4).

    In nats a token. Computed as lse(z) − Σᵥ q(v) z(v): the same, since Σᵥ q(v) = 1.

    The paper does not say which words share ε. Over `all`, as here, the label gets 1 − ε + ε/V.
    Over the `others` it gets 1 − ε, and each of them ε/(V − 1) (tensor2tensor, fairseq);
    `others_but_padding` leaves out symbol 0 too, ε/(V − 2) (the Annotated Transformer).

    Where `vocab_size` is less than V, the words beyond it are none: their logits are −∞, and they
    have no share of ε.

    A word that is forbidden by a logit of −∞ costs nothing where q(v) = 0, and ∞ elsewhere.

    logits: [..., V], labels: [...] integers in [0, vocab_size), smoothing: a number -> [...]. One
    token is [V] and [], more are `jax.vmap(label_smoothed_cross_entropy)`.
    implementation: see `tfm.kernels.implementation`.

    Inside jit, which cannot raise, a label or a smoothing outside gives NaN, and no gradient: a
    `jnp.where` that leaves such positions out leaves nothing of them.

    Raises:
      AssertionError: labels whose shape is not that of the logits without their last axis.
      ValueError: smoothing outside [0, 1], an unknown `over` or too few words for it, a vocab_size
        above V, or a label outside [0, vocab_size).
    """
    assert_fits("logits", logits, (..., None))
    assert_fits("labels", labels, logits.shape[:-1], logits=logits)
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    if vocab_size > logits.shape[-1]:
        raise ValueError(f"{vocab_size=} is more than the logits' {logits.shape[-1]}")
    if over not in get_args(SmoothedOver):
        raise ValueError(f"over={over!r} must be one of {get_args(SmoothedOver)}")
    least = {"all": 0, "others": 2, "others_but_padding": 3}[over]
    if are_known(logits) and vocab_size < least:
        raise ValueError(f"over={over!r} takes a vocabulary of at least {least}, not {vocab_size}")
    logits = logits.astype(working_dtype(logits))
    labels = as_ids(labels)
    inside = (labels >= 0) & (labels < vocab_size)
    label = jnp.where(inside, labels, 0)[..., None]
    if resolve(implementation) == "formula":
        q = smoothed_labels(logits, label, smoothing, over, vocab_size)
        loss = -weighted(q, nn.log_softmax(logits)).sum(-1)
    else:
        expected = expected_logit(logits, label, smoothing, over, vocab_size)
        loss = nn.logsumexp(logits, axis=-1) - expected
    is_smoothing = (smoothing >= 0) & (smoothing <= 1)
    return nan_unless(inside & is_smoothing, loss)
