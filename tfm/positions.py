"""§3.5 Positional encoding."""

from functools import partial
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim

from tfm.compilation import compiled
from tfm.kernels.positions import sines_and_cosines
from tfm.shapes import assert_fits

SinusoidLayout = Literal["interleaved", "halves", "tensor2tensor"]


def _angles(positions: np.ndarray, d_model: int, layout: SinusoidLayout) -> np.ndarray:
    """i / 10000^{2k/d_model} in float64: [positions, d_model / 2]."""
    k = np.arange(d_model // 2, dtype=np.float64)
    exponents = k / max(d_model // 2 - 1, 1) if layout == "tensor2tensor" else 2 * k / d_model
    return positions.astype(np.float64)[:, None] / 10000.0**exponents


def _is_array(positions: int | Array, *_: Any, **__: Any) -> bool:
    """Not a length, whose positions NumPy encodes."""
    return hasattr(positions, "shape") and not isinstance(positions, np.integer)


@compiled(static=("d_model", "layout"), compile_if=_is_array)
def sinusoidal_positions(
    positions: int | Array, d_model: int, layout: SinusoidLayout = "interleaved"
) -> Array:
    """PE(i, 2k) = sin(i / 10000^{2k/d_model}), PE(i, 2k+1) = cos(i / 10000^{2k/d_model}) (§3.5).

    Exact to f32 at large i too: a length's are computed in float64 and cast, for an array see
    `tfm.kernels.positions`.

    Args:
      positions: a length L for positions 0 … L−1: a Python integer, or a symbolic size of
        `jax.export`. Or an array [...] of at least one axis, of integers in [0, 262144); beyond
        that range the encoding is NaN.
      d_model: even.
      layout: interleaved, as the paper prints it. halves: all sines, then all cosines (Hugging
        Face's Marian). tensor2tensor: halves with the exponent k/(d_model/2 − 1) in the place of
        2k/d_model (tensor2tensor, fairseq, Marian), so that the last one is 1.

    A batch of positions is `jax.vmap(partial(sinusoidal_positions, d_model=512))`.

    Returns:
      [L, D] or [..., D]; f32, or f64 where x64 is enabled.

    Raises:
      ValueError: an unknown layout; a negative length; d_model is odd, since sines and cosines
        come in pairs.
      TypeError: positions that are not integers; an array without axes, which may be either.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model={d_model} is odd or below 2: sines and cosines come in pairs")
    if layout not in get_args(SinusoidLayout):
        raise ValueError(f"layout={layout!r} must be one of {get_args(SinusoidLayout)}")
    if isinstance(positions, int | np.integer):
        if positions < 0:
            raise ValueError(f"positions={positions} must be a length, or an array of positions")
        angles = _angles(np.arange(positions), d_model, layout)
        return jnp.asarray(_joined(np.sin(angles), np.cos(angles), layout, np))
    length: Any = positions
    if is_symbolic_dim(length):
        positions = jnp.arange(length)
    assert_fits("positions", positions, (...,))
    if positions.ndim == 0:
        raise TypeError(
            "positions is an array without axes: a length is a Python integer, int(length), and "
            "one position an array of one, positions[None]"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, not {positions.dtype}")
    angles_of = partial(_angles, d_model=d_model, layout=layout)
    return _joined(*sines_and_cosines(positions, angles_of), layout, jnp)


def _joined(sines: Array, cosines: Array, layout: SinusoidLayout, numpy: Any) -> Array:
    """sines and cosines [..., D/2] -> [..., D]"""
    if layout != "interleaved":
        return numpy.concatenate([sines, cosines], axis=-1)
    pairs = numpy.stack([sines, cosines], axis=-1)
    return pairs.reshape(*sines.shape[:-1], 2 * sines.shape[-1])
