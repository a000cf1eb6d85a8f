"""Several matrices side by side, so that one product serves for all of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tfm.kernels.quantization import Quantized


def side_by_side(matrices: list[Any]) -> Any:
    """[I, O₁], [I, O₂], … -> [I, O₁ + O₂ + …], also of `Quantized`; biases [O₁], … -> [O₁ + …]."""
    if isinstance(matrices[0], Quantized):  # it lies transposed, [O, I]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *matrices)
    return jnp.concatenate(matrices, axis=-1)


def side_by_side_by_head(arrays: list[Array], num_heads: int) -> Array:
    """The same with the columns of each head together: head 1 of every array, then head 2 …"""
    by_head = [a.reshape(*a.shape[:-1], num_heads, -1) for a in arrays]
    joined = jnp.concatenate(by_head, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)
