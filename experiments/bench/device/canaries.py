"""Faults of JAX and XLA on GPUs that this library could meet: whether the ones at hand have them.

Each row names the issue. A slow one is a `flag`; wrong values do not pass.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.device import accelerator
from experiments.bench.device.inputs import BOS, full_batch
from experiments.bench.device.session import Row, Session
from experiments.bench.device.sizes import TINY
from experiments.bench.device.timing import compile_timed, median_seconds
from tfm import Transformer, init_state, make_optimizer, make_train_step
from tfm.attention import scaled_dot_product_attention
from tfm.embedding import embed


def _time(session: Session, function: Callable[..., Any], *arguments: jax.Array) -> float:
    program, _ = compile_timed(function, *arguments)
    return median_seconds(lambda: program(*arguments), session.sizes.least_runs)["seconds"]


def compared(session: Session, seconds: float, sound: float, most: float, why: str) -> Row:
    """A row of a way's seconds and the sound way's, flagged where it takes `most` times as long."""
    made: Row = {"seconds": seconds, "sound_seconds": sound, "ratio": seconds / sound}
    slow = seconds > most * sound and not session.tiny  # tiny times are noise
    return made | ({"flag": why} if slow else {})


def scatter_add(session: Session) -> Row:
    """jax 38806 (openxla 46225): f32 scatter-add into few rows, as `x.at[ids].add(y)`.

    jaxlib 0.10.2 and 0.11.0 make it a loop of compare-and-swap: 450 to 2,000 times as slow where
    all ids are one. Sound: up to 0.10.1, and from 0.11.1 on. The sound way here is to add to as
    many different rows; with one id the hardware's own addition takes tens of times as long, the
    loop thousands of times.
    """
    table, ids, updates = _additions(session)

    def add(table, ids, updates):
        return table.at[ids].add(updates)

    same = _time(session, add, table, jnp.zeros_like(ids), updates)
    spread = _time(session, add, jnp.zeros(updates.shape), jnp.arange(len(ids)), updates)
    return compared(session, same, spread, 500, "scatter-add of one id is a loop: jax 38806")


def _additions(session: Session) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A table [399, 128], ids into it, and rows [N, 128] to add, as openxla 46225 has them."""
    count = session.sizes.updates
    ids = jax.random.randint(jax.random.key(0), (count,), 0, 399)
    return jnp.zeros((399, 128)), ids, jax.random.normal(jax.random.key(1), (count, 128))


def embedding_gradient(session: Session) -> Row:
    """The gradient of `tfm.embed` beside the plain scatter-add, of ids as frequent as words.

    The i-th word comes in proportion to 1/i. The library sorts the ids and sums segments, which
    must not fall into the loop of jax 38806 either. The sound way is a scatter-add of different
    ids: the same bytes.
    """
    model = session.sizes.models[0][1]
    vocabulary, d = model.vocab_size, model.d_model
    frequency = 1 / np.arange(1, vocabulary + 1)
    rng = np.random.default_rng(0)
    ids = jnp.int32(rng.choice(vocabulary, session.sizes.updates, p=frequency / frequency.sum()))
    table = jax.random.normal(jax.random.key(0), (vocabulary, d))
    cotangent = jax.random.normal(jax.random.key(1), (len(ids), d))

    def ours(table, ids, cotangent):
        return jax.vjp(lambda t: embed(ids, t, scale=False), table)[1](cotangent)[0]

    def plain(table, ids, cotangent):
        return jnp.zeros_like(table).at[ids].add(cotangent)

    different = jnp.arange(len(ids), dtype=ids.dtype) % vocabulary
    seconds, scattered = (_time(session, f, table, ids, cotangent) for f in (ours, plain))
    sound = _time(session, plain, table, different, cotangent)
    made = compared(session, seconds, sound, 10, "the embedding's gradient is slow: see jax 38806")
    return made | {"scatter_seconds": scattered}


def strided_segment_sum(session: Session) -> Row:
    """jax 39959 (openxla 47203): a vmapped `segment_sum` whose batch comes first in the result.

    The library sums rows, [segments, features], which is not concerned unless XLA turns them. XLA
    since jax 0.9.2 writes [batch, segments] with strides, 6 times as slow as with the batch
    last, which is the sound way. Sound: up to 0.9.1; open since.
    """
    batch, segments = session.sizes.segment_batch, session.sizes.segments
    count = 4 * segments
    ids = jax.random.randint(jax.random.key(0), (count,), 0, segments)
    values = jax.random.normal(jax.random.key(1), (count, batch))

    def summed(values, ids, out_axes):
        one = partial(jax.ops.segment_sum, segment_ids=ids, num_segments=segments)
        return jax.vmap(one, in_axes=1, out_axes=out_axes)(values)

    first, last = (
        _time(session, partial(summed, out_axes=axis), values, ids) for axis in (0, 1)
    )  # fmt: skip
    return compared(session, first, last, 3, "a strided segment_sum is slow: jax 39959")


def single_operations(session: Session) -> Row:
    """jax 40633: operations outside jit give wrong values on one GPU; here those of its report.

    √512 = 22.627, 1 + 1 = 2; normal numbers are finite, uniform ones in [0, 1), integers in their
    range. Wrong with 0.11.0 and 0.11.1 on an RTX A6000. Sound: 0.10.2; not known of 0.11.2 on.
    """
    with jax.disable_jit():
        root, two = float(jnp.sqrt(jnp.float32(512))), np.asarray(jnp.ones(4) + 1)
        key = jax.random.key(0)
        normal = np.asarray(jax.random.normal(key, (16,)))
        uniform = np.asarray(jax.random.uniform(key, (16,)))
        integers = np.asarray(jax.random.randint(key, (16,), 0, 32_000))
    sound = {
        "sqrt": abs(root - 512**0.5) < 1e-4,
        "add": bool((two == 2).all()),
        "normal": bool(np.isfinite(normal).all()),
        "uniform": bool(((uniform >= 0) & (uniform < 1)).all()),
        "randint": bool(((integers >= 0) & (integers < 32_000)).all()),
    }
    wrong = [name for name, is_sound in sound.items() if not is_sound]
    return {"passed": not wrong} | ({"flag": f"wrong: {', '.join(wrong)}"} if wrong else {})


def first_steps(session: Session) -> Row:
    """jax 40633 again: three jitted training steps, whose losses there became NaN, against a CPU's.

    Without dropout, so that both compute the same. error: the largest relative one of the losses.
    """
    losses = []
    model = Transformer(dataclasses.replace(TINY.agreeing, dropout_rate=0.0))
    optimizer = make_optimizer(lambda step: 1e-3, 1.0)
    step = make_train_step(model, optimizer, bos=BOS)
    batch = full_batch(TINY.agreeing, 4, 8)
    start = jax.device_get(init_state(model, optimizer, jax.random.PRNGKey(0)))
    for device in (accelerator.first(), jax.local_devices(backend="cpu")[0]):
        state, fed = jax.device_put((start, batch), device)
        run, curve = jax.jit(step), []
        for _ in range(3):
            state, metrics = run(state, fed)
            curve.append(float(metrics["loss"]))
        losses.append(np.array(curve))
    error = float(np.abs(losses[0] / losses[1] - 1).max())
    return {"error": error, "bound": 1e-4, "passed": bool(error <= 1e-4)}


def masked_attention(session: Session) -> Row:
    """pytorch 196678: NaN gradients of cuDNN where K % 128 is 64 and a query may attend to nothing.

    Seen with cuDNN 9.19 on an H200; the issue names H100 and H200. The library shows cuDNN no such
    query, so that its own gradient has to be finite. Flagged where cuDNN alone has the fault.
    """
    if missing := accelerator.why_no_cudnn():
        return {"skipped": missing}
    shape = (2, 64, 4, 64)
    operands = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)]
    mask = jnp.broadcast_to(jnp.arange(64)[:, None] < 48, (1, 1, 64, 64))

    def alone(*x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*x, mask=mask, implementation="cudnn")

    def ours(*x: jax.Array) -> jax.Array:
        heads = (jnp.swapaxes(y, 1, 2) for y in x)
        return scaled_dot_product_attention(
            *heads, mask, compute_dtype="bfloat16", implementation="cudnn"
        )

    def is_finite(attend: Callable[..., jax.Array]) -> bool:
        gradients = jax.grad(lambda *x: attend(*x)[..., 0].sum(), argnums=(0, 1, 2))
        return all(np.isfinite(jnp.float32(g)).all() for g in jax.jit(gradients)(*operands))

    flag = {} if is_finite(alone) else {"flag": "cuDNN alone gives NaN: pytorch 196678"}
    return {"passed": is_finite(ours)} | flag


CANARIES = {
    "jax 40633: single operations": (single_operations, "0.10.2; not 0.11.0, 0.11.1"),
    "jax 40633: three training steps": (first_steps, "0.10.2; not 0.11.0, 0.11.1"),
    "pytorch 196678: masked attention": (masked_attention, "not cuDNN 9.19"),
    "jax 38806: scatter-add of one id": (scatter_add, "to 0.10.1, from 0.11.1"),
    "jax 38806: the embedding's gradient": (embedding_gradient, "to 0.10.1, from 0.11.1"),
    "jax 39959: segment_sum, batch first": (strided_segment_sum, "to 0.9.1"),
}
"""name -> what is measured, and which versions of JAX are sound"""


def run(session: Session) -> None:
    for name, (measure, sound) in CANARIES.items():
        session.row(name, lambda measure=measure, sound=sound: measure(session) | {"sound": sound})
