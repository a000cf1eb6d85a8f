"""§5.4 Label smoothing."""

import jax.numpy as jnp
from jax import Array, nn

from tfm.precision import working_dtype
from tfm.shapes import assert_fits, assert_ids


def label_smoothed_cross_entropy(logits: Array, labels: Array, smoothing: float = 0.1) -> Array:
    """−Σᵥ q(v) log p(v) with q = (1 − ε)·onehot(label) + ε/V and p = softmax(logits) (§5.4).

    In the form lse(z) − (1 − ε)·z_y − ε·mean(z), which needs no one-hot array; in nats a token.

    logits: [..., V], labels: [...] integers in [0, V) -> [...]. Inside jit, which cannot raise, a
    label outside [0, V) gives NaN.

    Raises:
      AssertionError: labels whose shape is not that of the logits without their last axis.
      ValueError: smoothing outside [0, 1], or a label outside [0, V).
    """
    assert_fits("logits", logits, (..., None))
    assert_fits("labels", labels, logits.shape[:-1], logits=logits)
    assert_ids("labels", labels, logits.shape[-1])
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], not {smoothing}")
    logits = logits.astype(working_dtype(logits))
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    expected = (1 - smoothing) * picked + smoothing * logits.mean(-1)
    return nn.logsumexp(logits, axis=-1) - expected
