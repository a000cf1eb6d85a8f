"""This library's implementation of each workload."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, CHECKED, EOS, attention_inputs, examples, tokens
from experiments.bench.workloads import Attention, Decoding, Stream, Training, Workload
from experiments.checkpoints.safetensors_io import export_params, import_params
from experiments.data.packing import packed_batches, packed_rows
from tfm import (
    Transformer,
    attention,
    beam_search,
    greedy,
    quantize,
    shift_right,
    start_decoding,
)
from tfm.training import (
    init_params,
    init_state,
    make_optimizer,
    make_train_step,
    param_shapes,
    summed_loss,
)


def build(name: str, work: Workload, weights: Path) -> Contender:
    if isinstance(work, Training | Stream):
        return _training(work, weights)
    if isinstance(work, Decoding):
        return _decoding(work, weights)
    return attention_contender(work, _attend)


def _batches(work: Training | Stream) -> Iterator[dict[str, np.ndarray]]:
    """The training batches; the first one of a `Stream` has just the checked examples."""
    if isinstance(work, Stream):
        made, lengths = examples(work), {"source_length": work.source, "target_length": work.target}
        yield packed_rows(made[:CHECKED], **lengths)
        yield from packed_batches(made, rows=work.rows, seed=0, **lengths)
    source, target = (x.astype(np.int32) for x in tokens(work))
    ones, positions = np.ones_like(source), np.broadcast_to(np.arange(work.length), source.shape)
    batch = {"source": source, "target": target}
    for side in ("source", "target"):
        batch |= {f"{side}_segment_ids": ones, f"{side}_positions": positions.astype(np.int32)}
    yield from itertools.repeat(batch)


def make_weights(work: Workload, path: Path) -> None:
    """Writes the initial parameters of every contender; attention has none."""
    if isinstance(work, Attention):
        return
    params = init_params(Transformer(work.config), jax.random.PRNGKey(0))
    if isinstance(work, Decoding) and work.stopping:
        params["embedding"] = _with_an_end(work, params)
    export_params(path, params)


def _with_an_end(work: Decoding, params: dict) -> np.ndarray:
    """The embedding with an end symbol that is the likeliest from a chosen length of each source.

    With random parameters no hypothesis would end. Least squares gives the end symbol's row so that
    its logit is `margin` below the best one before that length, and `margin` above it afterwards.
    """
    model, margin = Transformer(work.config), 3.0
    source, _ = tokens(work)
    step, cache = start_decoding(model, params, jnp.int32(source), 1, work.target)
    never = work.config.vocab_size
    decoded = jax.jit(partial(greedy, step, bos=BOS, eos=never, max_length=work.target))(cache)
    inputs = shift_right(decoded.tokens[:, 0], BOS)
    y = model.apply({"params": params}, source, inputs, return_features=True)
    table = np.array(params["embedding"])
    best = np.asarray(y @ table.T).max(-1)
    ends = np.random.default_rng(0).integers(work.target // 4, work.target, (work.rows, 1))
    wanted = best + np.where(np.arange(work.target) >= ends, margin, -margin)
    features = np.asarray(y).reshape(-1, y.shape[-1])
    table[EOS] = np.linalg.lstsq(features, wanted.reshape(-1), rcond=1e-2)[0]
    return table


def _training(work: Training | Stream, weights: Path) -> Contender:
    model, batches = Transformer(work.config), _batches(work)
    optimizer = make_optimizer(lambda step: 1e-4, 1.0)
    state = init_state(model, optimizer, jax.random.PRNGKey(0))
    state = state.replace(params=import_params(weights, state.params))
    step = jax.jit(make_train_step(model, optimizer, bos=BOS), donate_argnums=0)
    loss = jax.jit(partial(summed_loss, model, bos=BOS, smoothing=0.1))
    first = next(batches)

    def run() -> int:
        nonlocal state
        batch = next(batches)
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return sum(np.count_nonzero(batch[f"{side}_segment_ids"]) for side in ("source", "target"))

    def check() -> np.ndarray:
        total, count = loss(state.params, first)
        return np.asarray(total / count)

    return Contender(run, check)


def _decoding(work: Decoding, weights: Path) -> Contender:
    model = Transformer(work.config)
    params = import_params(weights, param_shapes(work.config))
    params = jax.jit(quantize)(params) if work.int8 else params
    source, target = (jnp.int32(x) for x in tokens(work))
    eos = EOS if work.stopping else work.config.vocab_size  # outside the vocabulary: never

    @jax.jit
    def decode(params):
        step, cache = start_decoding(model, params, source, work.beam, work.target)
        options = {"bos": BOS, "eos": eos, "max_length": work.target}
        search = greedy if work.beam == 1 else beam_search
        return search(step, cache, **options)

    @jax.jit
    def score(params):
        logits = model.apply({"params": params}, source, shift_right(target, BOS))
        log_probs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_probs, target[..., None], -1)[..., 0]

    return Contender(
        lambda: jax.block_until_ready(decode(params)), lambda: np.asarray(score(params))
    )


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return attention.scaled_dot_product_attention(query, key, value)


def attention_contender(work: Attention, attend, layout: str = "BHLD") -> Contender:
    """A contender from a JAX function of query, key and value in the given layout."""
    inputs = [jnp.asarray(x) for x in attention_inputs(work, layout)]
    forward = jax.jit(attend)
    both = jax.jit(jax.grad(lambda *x: (attend(*x) ** 2).sum(), argnums=(0, 1, 2)))
    timed = both if work.backward else forward

    def check() -> np.ndarray:
        output = np.asarray(forward(*inputs))
        return output if layout == "BHLD" else output.swapaxes(1, 2)

    return Contender(lambda: jax.block_until_ready(timed(*inputs)), check)
