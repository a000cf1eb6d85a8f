"""What is jitted lowers for every platform. `jax.export` needs no such device."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tfm import (
    Transformer,
    TransformerConfig,
    beam_search,
    greedy,
    init_state,
    make_optimizer,
    make_train_step,
    paper_schedule,
    sample,
    start_decoding,
)
from tfm.parallel.mesh import MeshConfig, batch_sharding, make_mesh, state_shardings

CONFIG = TransformerConfig(
    vocab_size=32,
    d_model=16,
    d_ff=32,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    attention_dropout_rate=0.1,
)
OPTIMIZER = make_optimizer(paper_schedule(16), clip_threshold=1.0)
TOKENS = jax.ShapeDtypeStruct((4, 8), jnp.int32)
KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)


def decode(search, model, params, source, **options):
    step, cache = start_decoding(model, params, source, num_hypotheses=3, max_length=6)
    return search(step, cache, bos=1, eos=2, max_length=6, **options)


def draw(model, params, source, key):
    return decode(partial(sample, key=key, top_k=5, top_p=0.9), model, params, source)


def functions(model):
    """Name -> a function and the shapes of its arguments."""
    state = jax.eval_shape(partial(init_state, model, OPTIMIZER), KEY)
    batch = {
        f"{side}{name}": TOKENS
        for side in ("source", "target")
        for name in ("", "_segment_ids", "_positions")
    }
    train_step = partial(make_train_step, model, OPTIMIZER, bos=1)
    forward = lambda params, batch: model.apply({"params": params}, **batch)  # noqa: E731
    params = state.params
    return {
        "training step": (train_step(), state, batch),
        "accumulating step": (train_step(accumulation=2), state, batch),
        "forward": (forward, params, batch),
        "greedy": (partial(decode, greedy, model), params, TOKENS),
        "beam search": (partial(decode, beam_search, model), params, TOKENS),
        "sampling": (partial(draw, model), params, TOKENS, KEY),
    }


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["training step", "accumulating step", "forward", "greedy", "beam search", "sampling"],
)
def test_it_lowers_for_every_platform(name, compute_dtype):
    model = Transformer(replace(CONFIG, compute_dtype=compute_dtype))
    function, *arguments = functions(model)[name]
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*arguments)
    assert exported.platforms == platforms
    # The operands of the products are what the config says.
    assert ("xbf16>" in exported.mlir_module()) == (compute_dtype == "bfloat16")


@pytest.mark.parametrize("name", ["training step", "greedy", "beam search"])
def test_it_lowers_with_shardings_for_accelerators(name):
    """Over 2 × 2 × 2 devices that are not here."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    model = Transformer(replace(CONFIG, compute_dtype="bfloat16"))
    function, params, *others = functions(model)[name]
    shardings = [state_shardings(mesh, params)]
    shardings += [jax.tree.map(lambda _: batch_sharding(mesh), other) for other in others]
    arguments = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        [params, *others], shardings,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(function), platforms=("cuda", "tpu"))(*arguments)
    assert exported.nr_devices == 8 and exported.platforms == ("cuda", "tpu")
    assert '[{"fsdp"}, {"tensor"}]' in exported.mlir_module()  # of a matrix
    assert '[{"data", "fsdp"}' in exported.mlir_module()  # of the batch
