"""Runs what known faults of JAX and XLA get wrong, and prints a line of JSON for each.

A process of its own, since one of them ends it, and since it has to compile as users do.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np


def matrix_vector_sum() -> float:
    """How far a jitted, vmapped matrix-vector product under a sum is off, of 32,769 rows."""
    numbers = jnp.arange(32_769.0)
    rows = jnp.stack((numbers, 0 * numbers, 0 * numbers), axis=1)

    def lengths(rows):
        return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)

    return abs(float(jax.jit(lengths)(rows)[-1]) - 32_768.0**2)


def largest_broadcast_sum() -> float:
    """The largest of 300 sums of 2²⁰ ones, a row of which is broadcast."""
    total = jax.jit(lambda x: jnp.sum(jnp.broadcast_to(x, (16, 64, 1024))))
    return max(float(total(jnp.ones((64, 1)))) for _ in range(300))


def seconds_of_writes(length: int) -> float:
    """Of 1,000 writes of one number into an array of that length, in a loop."""

    @jax.jit
    def write(x):
        return jax.lax.fori_loop(0, 1000, lambda i, x: x.at[i].set(0.5 * i), x)

    times = []
    for _ in range(5):
        x = jnp.zeros(length)
        begin = time.perf_counter()
        write(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return min(times)


def shifted(reshape: bool) -> int:
    """Wrong numbers, of 128, where all rows but the last are written over all but the first."""

    @jax.jit
    def shift(x):
        base = x + 1
        moved = base.at[1:].set(base[:-1])
        return moved[None] if reshape else moved

    x = np.arange(128).reshape(8, 16)
    right = np.concatenate([x[:1], x[:-1]]) + 1
    return int((np.asarray(shift(x)).reshape(8, 16) != right).sum())


def sum_over_one_of_eight_axes() -> float:
    """How far a product summed over one of eight axes is off."""
    x, y = jnp.ones((2, 2, 3)), jnp.ones((2, 2, 3, 4, 4, 4, 4, 4))
    product = jax.jit(lambda x, y: jnp.log(jnp.sum(x.reshape(2, 2, 3, 1, 1, 1, 1, 1) * y, axis=2)))
    return float(jnp.abs(product(x, y) - jnp.log(3.0)).max())


if __name__ == "__main__":
    for name, run in {
        "matrix_vector_sum": matrix_vector_sum,
        "largest_broadcast_sum": largest_broadcast_sum,
        "shifted": lambda: shifted(reshape=False),
        "shifted_and_reshaped": lambda: shifted(reshape=True),
        "seconds_of_writes": lambda: [seconds_of_writes(n) for n in (10_000, 1_000_000)],
        "sum_over_one_of_eight_axes": sum_over_one_of_eight_axes,  # last: it may end the process
    }.items():
        print(json.dumps({name: run()}), flush=True)
