"""§3.4 Embeddings and the output distribution."""

import jax.numpy as jnp
from jax import Array, nn
from jax.typing import DTypeLike

from tfm.compilation import compiled
from tfm.kernels.implementation import Implementation
from tfm.kernels.precision import linear, working_dtype
from tfm.kernels.table import lookup
from tfm.shapes import as_ids, assert_fits, assert_ids


def _check(ids: Array, table: Array, **_: object) -> None:
    if getattr(table, "ndim", 0) == 2:
        assert_ids("ids", ids, table.shape[0])


@compiled(static=("scale", "implementation"), check=_check)
def embed(
    ids: Array, table: Array, *, scale: bool = True, implementation: Implementation = "auto"
) -> Array:
    """E(id) · √d_model (§3.4).

    ids: [...] integers in [0, V), table: [V, D] -> [..., D] in f32, or f64 for an f64 table. One
    word is an id [], more are `jax.vmap(embed, (0, None))`.
    Without `scale` E(id) alone, which is not the paper's. implementation: see
    `tfm.kernels.implementation`.

    Inside jit, which cannot raise, an id outside [0, V) gives NaN. Its derivative by the table is
    there in reverse mode alone, which is the faster for it (see `tfm.kernels.table`).

    Raises:
      AssertionError: a table that is not [V, D].
      ValueError: an id outside [0, V), named.
    """
    assert_fits("table", table, (None, None))
    assert_fits("ids", ids, (...,))
    table = jnp.asarray(table)
    rows = lookup(table.astype(working_dtype(table)), as_ids(ids), implementation)
    return rows * table.shape[1] ** 0.5 if scale else rows


@compiled(static=("compute_dtype", "implementation"))
def output_logits(
    y: Array,
    w: Array,
    b: Array | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """y W + b: one logit a word. With tied weights W is the embedding table transposed (§3.4).

    y: [..., D], w: [D, V], b: [V] or None -> [..., V]; one position is y [D], more are
    `jax.vmap(output_logits, (0, None))`. implementation: see `tfm.kernels.implementation`.
    """
    assert_fits("y", y, (..., None))
    assert_fits("w", w, (y.shape[-1], None), y=y)
    logits = linear(y, w, compute_dtype, implementation, rounded=False)
    if b is None:
        return logits
    assert_fits("b", b, (w.shape[1],), w=w)
    return logits + jnp.broadcast_to(b, logits.shape)


@compiled(static=("compute_dtype", "implementation"))
def output_distribution(
    y: Array,
    w: Array,
    b: Array | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """P(word) = softmax(y W + b) (§3.4).

    y: [..., D], w: [D, V], b: [V] or None -> [..., V]; each row sums to 1. One position is y [D],
    more are `jax.vmap(output_distribution, (0, None, None))`.

    Raises:
      AssertionError: shapes that do not fit; the message names the argument and both shapes.
    """
    logits = output_logits(y, w, b, compute_dtype=compute_dtype, implementation=implementation)
    return nn.softmax(logits.astype(working_dtype(logits)))
