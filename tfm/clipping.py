"""Gradient clipping by the norm of the whole tree (Pascanu et al. 2013)."""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def global_norm(tree: chex.ArrayTree) -> Array:
    """‖g‖ = √(Σ over all leaves and elements of g²)."""
    return jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


def clip_by_global_norm(tree: chex.ArrayTree, threshold: float) -> chex.ArrayTree:
    """g′ = min(1, θ/‖g‖) · g, with ‖g‖ over the whole tree.

    The direction stays, the length is at most θ; a zero gradient stays zero. Training uses
    `optax.clip_by_global_norm`, the same formula as a link of the optimizer chain.

    Args:
      tree: any tree of arrays.
      threshold: θ > 0.

    Returns:
      a tree of the same structure, shapes and dtypes.
    """
    norm = global_norm(tree)
    factor = jnp.where(norm > threshold, threshold / jnp.where(norm > 0, norm, 1), 1)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), tree)
