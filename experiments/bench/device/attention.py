"""Attention alone, operands of bf16, without a mask: forward, and with its gradients (both).

FLOPs: 4·R·H·L²·d forward; with the backward pass, two products for each, three times as many.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.device import accelerator
from experiments.bench.device.session import Row, Session
from experiments.bench.device.timing import compile_timed, median_seconds, program_bytes
from tfm.attention import scaled_dot_product_attention
from tfm.kernels.implementation import Implementation


def shape_of(session: Session, length: int) -> tuple[int, int, int, int]:
    """[R, H, L, d_k], of about as many tokens at any length."""
    sizes = session.sizes
    return max(1, sizes.attention_tokens // length), sizes.heads, length, sizes.features


def flops(shape: tuple[int, int, int, int], backward: bool) -> int:
    rows, heads, length, features = shape
    return (3 if backward else 1) * 4 * rows * heads * length**2 * features


def measure(session: Session, way: Implementation, length: int, backward: bool) -> Row:
    shape = shape_of(session, length)
    *operands, weights = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4)
    )

    def attend(*x: jax.Array) -> jax.Array:
        return scaled_dot_product_attention(*x, compute_dtype="bfloat16", implementation=way)

    def both(weights: jax.Array, *x: jax.Array) -> Any:
        output, pull = jax.vjp(attend, *x)
        return pull(weights.astype(output.dtype))

    function, arguments = (both, (weights, *operands)) if backward else (attend, operands)
    program, compiling = compile_timed(function, *arguments)
    timed = median_seconds(lambda: program(*arguments), session.sizes.least_runs)
    made = timed | {"compile_seconds": compiling, "program_bytes": program_bytes(program)}
    return made | session.share_of_peak(flops(shape, backward) / timed["seconds"])


def titles(session: Session) -> list[tuple[str, int, bool]]:
    """`forward, 8×2,048` and the like, with length and whether backward."""
    return [
        (f"{'both' if backward else 'forward'}, {shape_of(session, n)[0]}×{n:,}", n, backward)
        for n in session.sizes.attention_lengths
        for backward in (False, True)
    ]


def run(session: Session) -> None:
    for title, length, backward in titles(session):
        for way in ("cudnn", "formula", "chunked"):
            name = f"{title}, {way}"
            if way == "cudnn" and (missing := accelerator.why_no_cudnn()):
                session.skip(name, missing)
                continue
            work = partial(measure, session, way, length, backward)
            session.row(name, work, needs=0 if session.tiny else 2)
