"""Known faults of JAX and XLA on a CPU, as tests of the behaviour that this library relies on.

A failure here says that the JAX that is installed is unsound, not that this code is. What was seen:

| | 0.10.1 | 0.10.2 | 0.11.0 | 0.11.1 | 0.11.2 | 0.12.0.1 |
|---|---|---|---|---|---|---|
| jax 39103, off by | 0 | 2e6 | 0 | 0 | 0 | 0 |
| tensorflow 126812, of 2²⁰ at most | right | 1.47 × | 1.26 × | 1.04 × | 1.36 × | right |
| jax 39257, 40412 | right | segmentation fault | segmentation fault | right | right | right |
| openxla 49176, wrong of 128 | 96 | 96 | 96 | 96 | 96 | 96 |
| jax 40101, ms for 1,000 writes into 10⁶ numbers | 4 | 15 | 10 | 880 | 12 | 3 |
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tfm import (
    Transformer,
    TransformerConfig,
    beam_search,
    init_state,
    make_optimizer,
    make_train_step,
    sample,
    shift_right,
    start_decoding,
)
from tfm.jax_versions import RANGE
from tfm.kernels.precision import blocked_transpose

UNSOUND = f"jax {jax.__version__} is unsound (%s): install one of jax{RANGE}"


@pytest.fixture(scope="module")
def found():
    """What each canary found, by its name; one that ends the process has no entry."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "canaries.py")],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: value for line in lines for name, value in line.items()}


def test_a_matrix_vector_product_under_a_sum_is_right(found):
    assert found["matrix_vector_sum"] == 0, UNSOUND % "jax 39103; sound: all but 0.10.2"


# 0.11.2 stays in the range for GPUs; the fault is in what XLA uses on CPUs.
@pytest.mark.xfail(jax.__version__ == "0.11.2", reason="tensorflow 126812, on CPUs", strict=False)
def test_a_sum_of_what_is_broadcast_counts_each_number_once(found):
    # Threads write into each other's partial sums: one call in fifteen to four in five.
    why = "tensorflow 126812, google/XNNPACK 11243; sound: 0.10.1, 0.12.0 and later"
    assert found["largest_broadcast_sum"] == 2**20, UNSOUND % why


def test_a_reduction_of_many_axes_ends_and_is_right(found):
    # On x86-64, where XLA hands it to a library of its own (__ynn_fusion).
    error = found.get("sum_over_one_of_eight_axes", np.inf)
    assert error < 1e-5, UNSOUND % "jax 39257, 40412; sound: 0.10.1, 0.11.1 and later"


def test_a_small_write_in_a_loop_does_not_rewrite_the_array(found):
    short, long = found["seconds_of_writes"]
    # Of a hundred times as many numbers; the half is for copies outside of the loop.
    assert long < 50 * (short + 5e-4), UNSOUND % "jax 40101; sound: all but 0.11.1"


def test_rows_written_over_their_neighbours_are_right(found):
    assert found["shifted"] == 0, UNSOUND % "openxla 49176; sound: all that were tried"


# openxla/xla 49176, open, in every version from 0.10.1 to 0.12.0.1: where part of a buffer is
# overwritten by what is computed from another part of it, and the result is reshaped, XLA for the
# CPU may read what it has just written: jit(lambda x: (x + 1).at[1:].set((x + 1)[:-1])[None]).
# So no such write may stand in what we jit, and where elements move they are tested at such sizes.

WRITES = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2}  # name -> the update's number
VIEWS = ("reshape", "squeeze", "expand_dims", "copy", "optimization_barrier")


def writes_from_themselves(function, *arguments):
    """The writes, in all that `function` traces, whose update is computed from what they write to.

    And how many writes there are. An update that depends on the same array before something else
    was made of it, is no such write: the two are different buffers.
    """
    found, writes = [], 0
    names = iter(range(1_000_000))

    def enter(jaxpr: Jaxpr, given):
        """given: of each variable that goes in, its buffer and the set of those it is made of."""
        nonlocal writes
        known = dict(zip(jaxpr.invars, given, strict=True))
        known |= {v: (n, 1 << n) for v, n in zip(jaxpr.constvars, names, strict=False)}
        for eqn in jaxpr.eqns:
            inputs = [(None, 0) if isinstance(v, Literal) else known[v] for v in eqn.invars]
            if (name := eqn.primitive.name) in WRITES:
                writes += 1
                (buffer, _), (_, made_of) = inputs[0], inputs[WRITES[name]]
                if buffer is not None and made_of >> buffer & 1:
                    found.append(str(eqn))
            inner = [p.jaxpr if isinstance(p, ClosedJaxpr) else p for value in eqn.params.values()
                     for p in (value if isinstance(value, tuple) else (value,))
                     if isinstance(p, (Jaxpr, ClosedJaxpr))]  # fmt: skip
            if name in ("scan", "while"):  # what goes around has a buffer of its own
                inputs = [(n := next(names), made_of | 1 << n) for _, made_of in inputs]
            for each in inner:  # of a loop or a branch, conditions and indices come first
                enter(each, inputs[len(inputs) - len(each.invars) :])
            union = 0
            for _, made_of in inputs:
                union |= made_of
            for i, v in enumerate(eqn.outvars):
                n = next(names)
                known[v] = inputs[i] if name in VIEWS else (n, union | 1 << n)

    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    enter(jaxpr, [(n, 1 << n) for n in (next(names) for _ in jaxpr.invars)])
    return found, writes


def test_a_write_of_an_array_into_itself_is_seen():
    def moved(x):
        return x.at[1:].set(x[:-1])

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: x.at[i].set(x[i + 1] * 2), x)

    for function in (moved, jax.jit(moved), lambda x: jax.jit(moved)(x + 1).reshape(1, -1), looped):
        assert len(writes_from_themselves(function, jnp.ones(8))[0]) == 1
    assert writes_from_themselves(lambda x, y: x.at[1:].set(y[1:]), *jnp.ones((2, 8))) == ([], 1)


CONFIG = TransformerConfig(
    vocab_size=16, d_model=16, d_ff=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    attention_dropout_rate=0.1,
)  # fmt: skip
MODEL = Transformer(CONFIG)
TOKENS = jax.ShapeDtypeStruct((4, 8), jnp.int32)
OPTIMIZER = make_optimizer(lambda step: 1e-3, clip_threshold=1.0)


def state():
    return jax.eval_shape(partial(init_state, MODEL, OPTIMIZER), jax.random.PRNGKey(0))


def trained(model, **options):
    sides = ("source", "target")
    names = ("", "_segment_ids", "_positions")
    batch = {f"{side}{name}": TOKENS for side in sides for name in names}
    return make_train_step(model, OPTIMIZER, bos=1, **options), state(), batch


def decoded(search):
    def decode(params, source):
        step, cache = start_decoding(MODEL, params, source, num_hypotheses=3, max_length=6)
        return search(step, cache, bos=1, eos=2, max_length=6)

    return decode, state().params, TOKENS


@pytest.mark.parametrize(
    "case",
    [
        lambda: trained(MODEL, accumulation=2, logit_chunk=8),
        lambda: decoded(beam_search),
        lambda: decoded(partial(sample, key=jax.random.PRNGKey(0), top_k=5, top_p=0.9)),
        lambda: (blocked_transpose, jax.ShapeDtypeStruct((1024, 512), jnp.float32)),
        lambda: (
            jax.grad(lambda x, w: blocked_transpose(x @ w).sum(), 1),
            *jnp.ones((2, 1024, 1024)),
        ),
    ],
    ids=["training step", "beam search", "sampling", "turned", "gradient"],
)
def test_nothing_is_written_into_what_it_is_computed_from(case):
    found, writes = writes_from_themselves(*case())
    assert writes > 0 and found == []


# Of (4,) and (3, 1, 40) the faulty form, written with .at[1:].set, gives wrong values.
@pytest.mark.parametrize("shape", [(4,), (3, 1, 40), (8, 16)])
def test_labels_are_shifted_right_in_a_donated_buffer(shape):
    labels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    wanted = np.insert(labels[..., :-1] + 1, 0, 1, axis=-1)
    shifted = jax.jit(lambda x: shift_right(x + 1, 1).reshape(1, *shape, 1), donate_argnums=0)
    assert np.array_equal(shifted(jnp.asarray(labels)).reshape(shape), wanted)


def test_a_matrix_is_turned_in_a_donated_buffer():
    x = np.arange(1024 * 512, dtype=np.float32).reshape(1024, 512)
    flat = jax.jit(lambda x: blocked_transpose(x + 1).reshape(1, -1, 1), donate_argnums=0)(
        jnp.asarray(x)
    )
    assert np.array_equal(np.ravel(flat), np.ravel(x.T + 1))


def test_a_step_of_decoding_writes_its_own_place_in_a_donated_cache(rng):
    """What 3 hypotheses write is the same whatever was there, and all else stays as it was."""

    def method(name, params, *arguments):
        return MODEL.apply({"params": params}, *arguments, method=name)

    params = state().params
    memory, cache = jax.eval_shape(lambda p, x: method("start", p, x, 3, 6), params, TOKENS)
    params, old = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), (params, cache)
    )
    memory, ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), (memory, cache))
    step = jax.jit(partial(method, "step"), donate_argnums=4)

    def written(index, cache):
        """Keys and values [2, B, H, 18, d_k] after a step that may write over the cache."""
        own = jax.tree.map(jnp.asarray, cache)
        _, new = step(params, memory, np.full((4, 3), 7), index, own)
        return np.stack(new.written.layers[0].pair())

    before = np.stack(old.written.layers[0].pair())
    for index in (0, 2, 5):
        after, of_ones = written(index, old), written(index, ones)
        own = slice(3 * index, 3 * index + 3)
        np.testing.assert_allclose(after[..., own, :], of_ones[..., own, :], rtol=1e-6)
        assert not np.any(after[..., own, :] == before[..., own, :])
        others = np.delete(np.arange(18), own)
        assert np.array_equal(after[..., others, :], before[..., others, :])
        assert np.all(of_ones[..., others, :] == 1)
