"""§3.4 Embeddings and the output distribution."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, nn
from jax.typing import DTypeLike

from tfm import sharding
from tfm.compilation import compiled
from tfm.precision import linear, working_dtype
from tfm.shapes import as_ids, assert_fits, assert_ids, nan_unless

TABLE = ("vocabulary", None)


def _batched(ids: Array) -> tuple[str | None, ...]:
    """What the axes of ids mean: one sequence alone has no batch."""
    return ("batch",) + (None,) * (ids.ndim - 1) if ids.ndim > 1 else (None,) * ids.ndim


def _rows(table: Array, ids: Array) -> Array:
    """table[ids], and NaN for an id outside the table."""
    vocabulary, d_model = table.shape

    def rows_of(table: Array, ids: Array) -> Array:
        own = sharding.within_part(ids, "vocabulary", vocabulary)
        # mode='fill' answers for an id outside the table, where clipping would hide the mistake.
        rows = table.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return sharding.total(rows, "vocabulary", vocabulary)

    rows = sharding.on_each_device(
        rows_of,
        (table, TABLE),
        (ids, _batched(ids)),
        out=((*ids.shape, d_model), (*_batched(ids), None)),
    )
    return nan_unless(((ids >= 0) & (ids < vocabulary))[..., None], rows)


_lookup = jax.custom_vjp(_rows)


def _lookup_forward(table, ids):
    return _rows(table, ids), (table, ids)


def _lookup_backward(residuals, cotangent):
    table, ids = residuals
    vocabulary, batch = len(table), ids.shape[0] if ids.ndim else 1

    def gradient_of(table: Array, ids: Array, cotangent: Array) -> Array:
        own = sharding.within_part(ids, "vocabulary", vocabulary).reshape(-1)
        # Equal ids side by side are summed in one sweep, where a scatter would update row by row.
        order = jnp.argsort(own)
        rows = cotangent.reshape(-1, table.shape[1])[order]
        gradient = jax.ops.segment_sum(
            rows, own[order], num_segments=len(table), indices_are_sorted=True
        )
        gradient = gradient.astype(table.dtype)
        return sharding.total(gradient, "batch", batch) if ids.ndim > 1 else gradient

    batched = _batched(ids)
    gradient = sharding.on_each_device(
        gradient_of, (table, TABLE), (ids, batched), (cotangent, (*batched, None)),
        out=(table.shape, TABLE),
    )  # fmt: skip
    return gradient, None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def embed(ids: Array, table: Array, *, scale: bool = True) -> Array:
    """E(id) · √d_model (§3.4).

    ids: [...] integers in [0, V), table: [V, D] -> [..., D] in f32, or f64 for an f64 table.
    Without `scale` E(id) alone, which is not the paper's.

    Inside jit, which cannot raise, an id outside [0, V) gives NaN. Its derivative by the table is
    there in reverse mode alone, which is the faster for it (see `_lookup_backward`).

    Raises:
      AssertionError: a table that is not [V, D].
      ValueError: an id outside [0, V), named.
    """
    assert_fits("table", table, (None, None))
    assert_fits("ids", ids, (...,))
    assert_ids("ids", ids, table.shape[0])
    return _embed(ids, table, scale)


@partial(compiled, static_argnames="scale")
def _embed(ids: Array, table: Array, scale: bool) -> Array:
    table = jnp.asarray(table)
    rows = _lookup(table.astype(working_dtype(table)), as_ids(ids))
    return rows * table.shape[1] ** 0.5 if scale else rows


@partial(compiled, static_argnames="compute_dtype")
def output_logits(
    y: Array, w: Array, b: Array | None = None, *, compute_dtype: DTypeLike | None = None
) -> Array:
    """y W + b: one logit a word. With tied weights W is the embedding table transposed (§3.4).

    y: [..., D], w: [D, V], b: [V] or None -> [..., V]
    """
    assert_fits("y", y, (..., None))
    assert_fits("w", w, (y.shape[-1], None), y=y)
    logits = linear(y, w, compute_dtype, rounded=False)
    if b is None:
        return logits
    assert_fits("b", b, (w.shape[1],), w=w)
    return logits + jnp.broadcast_to(b, logits.shape)


@compiled
def output_distribution(y: Array, w: Array, b: Array) -> Array:
    """P(word) = softmax(y W + b) (§3.4).

    y: [..., D], w: [D, V], b: [V] -> [..., V]; each row sums to 1.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
    """
    logits = output_logits(y, w, b)
    return nn.softmax(logits.astype(working_dtype(logits)))
