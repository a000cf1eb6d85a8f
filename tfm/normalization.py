"""§3.1 Layer normalisation (Ba et al. 2016), applied by the paper as LayerNorm(x + Sublayer(x))."""

import jax.numpy as jnp
from jax import Array, lax

from tfm.compilation import compiled
from tfm.kernels.implementation import Implementation
from tfm.kernels.precision import broadcast_row, working_dtype
from tfm.shapes import Number, assert_fits


@compiled(static=("implementation",))
def layer_norm(
    x: Array,
    scale: Array,
    bias: Array,
    epsilon: Number = 1e-6,
    *,
    implementation: Implementation = "auto",
) -> Array:
    """LN(x) = (x − μ) / √(σ² + ε) · γ + β over the features of one position (§3.1).

    μ and σ² are the mean and the biased variance of x's last axis; ε stands inside the root, so
    that a constant row gives β and no division by zero.

    x: [..., D], scale γ: [D], bias β: [D] -> [..., D]; one position is x [D], more are
    `jax.vmap(layer_norm, (0, None, None))`.

    implementation: see `tfm.kernels.implementation`.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
    """
    assert_fits("x", x, (..., None))
    assert_fits("scale", scale, (x.shape[-1],), x=x)
    assert_fits("bias", bias, (x.shape[-1],), x=x)
    x = x.astype(working_dtype(x))
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * lax.rsqrt(variance + epsilon)
    scale, bias = (broadcast_row(row, x.shape, implementation) for row in (scale, bias))
    return normed * scale + bias
