"""§6.1 Averaging the parameters of several checkpoints."""

from collections.abc import Sequence
from functools import reduce

import chex
import jax
import jax.numpy as jnp
from jax import Array

from tfm.compilation import compiled
from tfm.shapes import ArrayTree


@compiled()
def average(trees: Sequence[ArrayTree]) -> ArrayTree:
    """x̄ = Σᵢ xᵢ / n, leaf by leaf, summed in f32 or wider; the leaves keep their dtypes.

    The paper averages the parameters of the last 5 checkpoints of a base model, 20 of a big one.

    Args:
      trees: n ≥ 1 trees of one structure and the same shapes.

    Raises:
      ValueError: no trees.
      AssertionError: trees that differ in structure or shapes.
    """
    if not trees:
        raise ValueError("trees=[] has no average")
    chex.assert_trees_all_equal_shapes_and_dtypes(*trees)

    def mean(*leaves: Array) -> Array:
        dtype = leaves[0].dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        total = reduce(jnp.add, (jnp.asarray(x, wide) for x in leaves))
        return (total / len(leaves)).astype(dtype)

    return jax.tree.map(mean, *trees)
