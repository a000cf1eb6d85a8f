"""§5.4 Label smoothing."""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array, nn

from tfm.precision import working_dtype
from tfm.shapes import assert_fits, assert_ids

SmoothedOver = Literal["all", "others", "others_but_padding"]


def label_smoothed_cross_entropy(
    logits: Array,
    labels: Array,
    smoothing: float = 0.1,
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

    logits: [..., V], labels: [...] integers in [0, V) -> [...]. Inside jit, which cannot raise, a
    label outside [0, V) gives NaN.

    Raises:
      AssertionError: labels whose shape is not that of the logits without their last axis.
      ValueError: smoothing outside [0, 1], an unknown `over`, or a label outside [0, V).
    """
    assert_fits("logits", logits, (..., None))
    assert_fits("labels", labels, logits.shape[:-1], logits=logits)
    assert_ids("labels", labels, logits.shape[-1])
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], not {smoothing}")
    if over not in get_args(SmoothedOver):
        raise ValueError(f"over={over!r} must be one of {get_args(SmoothedOver)}")
    logits = logits.astype(working_dtype(logits))
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    words, v = logits, logits.shape[-1] if vocab_size is None else vocab_size
    if v < logits.shape[-1]:
        words = jnp.where(jnp.arange(logits.shape[-1]) < v, logits, 0)
    if over == "all":
        shared = words.sum(-1) / v
    elif over == "others":
        shared = (words.sum(-1) - picked) / (v - 1)
    else:
        shared = (words[..., 1:].sum(-1) - picked) / (v - 2)
    expected = (1 - smoothing) * picked + smoothing * shared
    return nn.logsumexp(logits, axis=-1) - expected
