"""Rows of a table, and the gradient of the table as one sweep over sorted rows."""

import jax
import jax.numpy as jnp
from jax import Array

from tfm.kernels.implementation import Implementation, resolve
from tfm.parallel import sharding
from tfm.shapes import nan_unless

TABLE = ("vocabulary", None)


def _batched(ids: Array) -> tuple[str | None, ...]:
    """What the axes of ids mean: one sequence alone has no batch."""
    return ("batch",) + (None,) * (ids.ndim - 1) if ids.ndim > 1 else (None,) * ids.ndim


def lookup(table: Array, ids: Array, implementation: Implementation = "auto") -> Array:
    """table[ids], and NaN for an id outside the table: [V, D], [...] -> [..., D]"""
    form = _rows if resolve(implementation) == "formula" else _rows_with_derivative
    return form(table, ids)


def _rows(table: Array, ids: Array) -> Array:
    vocabulary, d_model = table.shape

    def rows_of(table: Array, ids: Array) -> Array:
        own = sharding.local_ids(ids, "vocabulary", vocabulary)
        # mode='fill' answers for an id outside the table, where clipping would hide the mistake.
        rows = table.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return sharding.psum_over(rows, "vocabulary", vocabulary)

    rows = sharding.shard_map_logical(
        rows_of,
        (table, TABLE),
        (ids, _batched(ids)),
        out=((*ids.shape, d_model), (*_batched(ids), None)),
    )
    return nan_unless(((ids >= 0) & (ids < vocabulary))[..., None], rows)


_rows_with_derivative = jax.custom_vjp(_rows)


def _forward(table, ids):
    return _rows(table, ids), (table, ids)


def _backward(residuals, cotangent):
    table, ids = residuals
    vocabulary, batch = len(table), ids.shape[0] if ids.ndim else 1

    def gradient_of(table: Array, ids: Array, cotangent: Array) -> Array:
        own = sharding.local_ids(ids, "vocabulary", vocabulary).reshape(-1)
        # Equal ids side by side are summed in one sweep, where a scatter would update row by row.
        order = jnp.argsort(own)
        rows = cotangent.reshape(-1, table.shape[1])[order]
        gradient = jax.ops.segment_sum(
            rows, own[order], num_segments=len(table), indices_are_sorted=True
        )
        gradient = gradient.astype(table.dtype)
        return sharding.psum_over(gradient, "batch", batch) if ids.ndim > 1 else gradient

    batched = _batched(ids)
    parts = (table, TABLE), (ids, batched), (cotangent, (*batched, None))
    return sharding.shard_map_logical(gradient_of, *parts, out=(table.shape, TABLE)), None


_rows_with_derivative.defvjp(_forward, _backward)
