"""The sinusoids of given positions, exact to f32: of float64 tables, by the addition theorem."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from tfm.shapes import as_ids

TABLE_STEP = 512  # positions are split as high · TABLE_STEP + low
TABLE_SIZE = 512  # so positions below TABLE_STEP · TABLE_SIZE = 262,144 are exact


def sines_and_cosines(
    positions: Array, angles_of: Callable[[np.ndarray], np.ndarray]
) -> tuple[Array, Array]:
    """sin and cos of the angles of positions [...]: twice [..., D/2], NaN beyond the tables.

    angles_of: positions [N] -> their angles [N, D/2] in float64, linear in the positions.

    The angle of a large position has too few digits left in f32 (at 10⁵ the sine is wrong by 6e-3).
    """
    positions = as_ids(positions)
    coarse = angles_of(np.arange(TABLE_SIZE) * TABLE_STEP)
    fine = angles_of(np.arange(TABLE_STEP))
    high, low = positions // TABLE_STEP, positions % TABLE_STEP
    # mode='fill' answers NaN outside the table, where clipping would answer a wrong encoding.
    sin_a, cos_a = (
        jnp.asarray(f(coarse), float).at[high].get(mode="fill", wrap_negative_indices=False)
        for f in (np.sin, np.cos)
    )
    sin_b, cos_b = (jnp.asarray(f(fine), float)[low] for f in (np.sin, np.cos))
    return sin_a * cos_b + cos_a * sin_b, cos_a * cos_b - sin_a * sin_b
