"""Gradient clipping by the norm of the whole tree (Pascanu et al. 2013)."""

import jax
import jax.numpy as jnp
from jax import Array

from tfm.compilation import compiled
from tfm.kernels.precision import floating, working_dtype
from tfm.shapes import ArrayTree, Number, is_traced, nan_unless


@compiled()
def global_norm(tree: ArrayTree) -> Array:
    """‖g‖ = √(Σ over all leaves and elements of g²), in f32 or the widest type of the leaves."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    total = sum(jnp.square(leaf.astype(working_dtype(leaf))).sum() for leaf in leaves)
    # √ has no derivative at 0; the inner where keeps it from being asked for one.
    return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))


def _check(tree: ArrayTree, threshold: Number) -> None:
    if not is_traced(threshold) and not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive")


@compiled(check=_check)
def clip_by_global_norm(tree: ArrayTree, threshold: Number) -> ArrayTree:
    """g′ = min(1, θ/‖g‖) · g, with ‖g‖ over the whole tree.

    The direction stays, the length is at most θ; a zero gradient stays zero. Training uses
    `optax.clip_by_global_norm`, the same formula as a link of the optimizer chain.

    Args:
      tree: any tree of arrays or numbers.
      threshold: θ > 0; of a traced one that is not, everything is NaN.

    Returns:
      a tree of the same structure and shapes, and the same dtypes but for integers, which become
      f32; all NaN where any element is.

    Raises:
      ValueError: a threshold that is not positive.
    """
    tree = jax.tree.map(lambda leaf: floating(jnp.asarray(leaf))[0], tree)
    norm = global_norm(tree)
    # In this order a NaN norm makes every leaf NaN: half a broken gradient would pass unseen.
    factor = jnp.where(norm <= threshold, 1, threshold / jnp.where(norm == 0, 1, norm))
    factor = nan_unless(threshold > 0, factor)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), tree)
