"""§3.5 Positional encoding."""

import jax.numpy as jnp
import numpy as np
from jax import Array

TABLE_STEP = 512  # positions are split as high · TABLE_STEP + low
TABLE_SIZE = 512  # so positions below TABLE_STEP · TABLE_SIZE = 262,144 are exact


def _angles(positions: np.ndarray, d_model: int) -> np.ndarray:
    """i / 10000^{2k/d_model} in float64: [positions, d_model / 2]."""
    exponents = np.arange(0, d_model, 2, dtype=np.float64) / d_model
    return positions.astype(np.float64)[:, None] / 10000.0**exponents


def sinusoidal_positions(positions: int | Array, d_model: int) -> Array:
    """PE(i, 2k) = sin(i / 10000^{2k/d_model}), PE(i, 2k+1) = cos(i / 10000^{2k/d_model}) (§3.5).

    The angle of a large i has too few digits left in f32 (at i = 10⁵ the sine is wrong by 6e-3).
    A length is therefore computed in float64 and cast; traced positions are split as
    i = 512·a + b, and sin and cos of the two parts, tabulated in float64, are combined by the
    addition theorem.

    Args:
      positions: a length L for positions 0 … L−1, or an array [...] of integers in
        [0, 262144); beyond that range the encoding is NaN.
      d_model: even.

    Returns:
      [L, D] or [..., D]; f32, or f64 where x64 is enabled.

    Raises:
      ValueError: d_model is odd, since sines and cosines come in pairs; a negative length.
      TypeError: positions that are not integers.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model={d_model} is odd or below 2: sines and cosines come in pairs")
    dtype = jnp.zeros((), float).dtype
    if isinstance(positions, int | np.integer):
        if positions < 0:
            raise ValueError(f"positions={positions} must be a length, or an array of positions")
        angles = _angles(np.arange(positions), d_model)
        pairs = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        return jnp.asarray(pairs.reshape(positions, d_model), dtype)
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, not {positions.dtype}")
    positions = positions.astype(jnp.int32)
    coarse = _angles(np.arange(TABLE_SIZE) * TABLE_STEP, d_model)
    fine = _angles(np.arange(TABLE_STEP), d_model)
    high, low = positions // TABLE_STEP, positions % TABLE_STEP
    # mode='fill' answers NaN outside the table, where clipping would answer a wrong encoding.
    sin_a, cos_a = (
        jnp.asarray(f(coarse), dtype).at[high].get(mode="fill", wrap_negative_indices=False)
        for f in (np.sin, np.cos)
    )
    sin_b, cos_b = (jnp.asarray(f(fine), dtype)[low] for f in (np.sin, np.cos))
    pairs = jnp.stack([sin_a * cos_b + cos_a * sin_b, cos_a * cos_b - sin_a * sin_b], axis=-1)
    return pairs.reshape(*positions.shape, d_model)
