"""Batches of random tokens for the device, full or packed."""

import numpy as np

from tfm.config import TransformerConfig

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
    """Rows of two sequences, cut somewhere else in each row and side, and padding behind them."""
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
