"""Random tokens, full or packed, and random parameters for what is only timed."""

from typing import Any

import jax
import numpy as np

from tfm.config import TransformerConfig
from tfm.model import Transformer
from tfm.training import init_params

BOS = 1


def full_batch(config: TransformerConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of one sequence each, without padding."""
    rng = np.random.default_rng(0)
    batch = {}
    for side in ("source", "target"):
        ids = rng.integers(3, config.vocab_size, (rows, length), np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        batch |= {
            side: ids,
            f"{side}_segment_ids": np.ones_like(ids),
            f"{side}_positions": np.ascontiguousarray(positions),
        }
    return batch


def packed_batch(config: TransformerConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of two sequences, of different lengths in each row and side, and then padding."""
    rng, batch = np.random.default_rng(1), full_batch(config, rows, length)
    for side in ("source", "target"):
        for row in range(rows):
            first = rng.integers(1, length // 2)
            end = rng.integers(first + 1, length)
            batch[f"{side}_segment_ids"][row, first:end] = 2
            batch[f"{side}_positions"][row, first:end] = np.arange(end - first)
            for name in (side, f"{side}_segment_ids", f"{side}_positions"):
                batch[name][row, end:] = 0
    return batch


def random_params(model: Transformer) -> Any:
    """Normal random parameters with deviation 1/√d_model.

    Times do not depend on the values, and the model's own initialisation takes long to compile.
    """
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    deviation = model.config.d_model**-0.5
    arrays = [
        deviation * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)
