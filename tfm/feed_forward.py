"""§3.3 Position-wise feed-forward networks."""

from collections.abc import Callable
from typing import Any

from jax import Array, nn
from jax.typing import DTypeLike

from tfm.compilation import compiled
from tfm.dropout import assert_rate, dropout
from tfm.kernels.implementation import Implementation
from tfm.kernels.precision import broadcast_row, linear
from tfm.shapes import Number, assert_fits


def gelu(x: Array) -> Array:
    """x · P(N(0, 1) ≤ x), exactly (Hendrycks and Gimpel 2016)."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"relu": nn.relu, "swish": nn.silu, "gelu": gelu}
"""By the names of `TransformerConfig.activation`."""


def _check(
    *_: Any, dropout_key: Array | None = None, dropout_rate: Number = 0.0, **__: Any
) -> None:
    if dropout_key is not None:
        assert_rate(dropout_rate)


def _is_jax_s(*_: Any, activation: Callable[..., Any] = nn.relu, **__: Any) -> bool:
    """Whether the activation is one of `jax.nn`, or `gelu`. One of the user's may be made anew for
    each call, hold arrays, or read what changes."""
    name = getattr(activation, "__name__", "")
    return activation is gelu or activation is getattr(nn, name, None)


@compiled(
    static=("activation", "compute_dtype", "implementation"),
    check=_check,
    compile_if=_is_jax_s,
)
def feed_forward(
    x: Array,
    w1: Array,
    b1: Array,
    w2: Array,
    b2: Array,
    *,
    activation: Callable[[Array], Array] = nn.relu,
    dropout_key: Array | None = None,
    dropout_rate: Number = 0.0,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """FFN(x) = max(0, x W₁ + b₁) W₂ + b₂, at each position alone (§3.3, equation 2).

    x: [..., D], w1: [D, F], b1: [F], w2: [F, D], b2: [D] -> [..., D]

    One position is x [D]; more are `jax.vmap(feed_forward, (0, None, None, None, None))`.

    Args:
      activation: what stands in the place of max(0, ·). One of your own is called as it is, where
        the functions of JAX are compiled with the rest.
      dropout_key, dropout_rate: of a dropout on the hidden features; not in the paper.
      compute_dtype: see `tfm.kernels.precision`.
      implementation: see `tfm.kernels.implementation`.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
      ValueError: a dropout_rate outside [0, 1), where there is a dropout_key.
    """
    assert_fits("x", x, (..., None))
    d_model = x.shape[-1]
    assert_fits("w1", w1, (d_model, None), x=x)
    assert_fits("b1", b1, (w1.shape[1],), w1=w1)
    assert_fits("w2", w2, (w1.shape[1], d_model), w1=w1, x=x)
    assert_fits("b2", b2, (d_model,), w2=w2)
    hidden = activation(_affine(x, w1, b1, compute_dtype, implementation))
    if dropout_key is not None:
        hidden = dropout(dropout_key, hidden, dropout_rate)
    return _affine(hidden, w2, b2, compute_dtype, implementation)


@compiled(static=("compute_dtype", "implementation"))
def _affine(
    x: Array, w: Array, b: Array, compute_dtype: DTypeLike | None, implementation: Implementation
) -> Array:
    y = linear(x, w, compute_dtype, implementation)
    return y + broadcast_row(b, y.shape, implementation)
