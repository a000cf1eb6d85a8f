"""This library's way to do each workload."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, attention_inputs, tokens
from experiments.bench.workloads import Attention, Decoding, Training, Workload
from tfm import Transformer, attention, beam_search, greedy, shift_right, start_decoding
from tfm.sharing import export_params, import_params
from tfm.training import init_params, init_state, make_optimizer, make_train_step, summed_loss


def build(name: str, work: Workload, weights: Path) -> Contender:
    if isinstance(work, Training):
        return _training(work, weights)
    if isinstance(work, Decoding):
        return _decoding(work, weights)
    return attention_contender(work, _attend)


def _batch(work: Training) -> dict[str, jax.Array]:
    source, target = tokens(work)
    ones, positions = np.ones_like(source), np.broadcast_to(np.arange(work.length), source.shape)
    batch = {"source": source, "target": target}
    for side in ("source", "target"):
        batch |= {f"{side}_segment_ids": ones, f"{side}_positions": positions}
    return jax.tree.map(jnp.int32, batch)


def make_weights(work: Workload, path: Path) -> None:
    """Writes the parameters that every contender starts from; of attention there are none."""
    if not isinstance(work, Attention):
        export_params(path, init_params(Transformer(work.config), jax.random.PRNGKey(0)))


def _training(work: Training, weights: Path) -> Contender:
    model, batch = Transformer(work.config), _batch(work)
    optimizer = make_optimizer(lambda step: 1e-4, 1.0)
    state = init_state(model, optimizer, jax.random.PRNGKey(0))
    state = state.replace(params=import_params(weights, state.params))
    step = jax.jit(make_train_step(model, optimizer, bos=BOS), donate_argnums=0)
    loss = jax.jit(partial(summed_loss, model, bos=BOS, smoothing=0.1))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    def check() -> np.ndarray:
        total, count = loss(state.params, batch)
        return np.asarray(total / count)

    return Contender(run, check)


def _decoding(work: Decoding, weights: Path) -> Contender:
    model = Transformer(work.config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.PRNGKey(0)))
    params = import_params(weights, params)
    source, target = (jnp.int32(x) for x in tokens(work))
    never = work.config.vocab_size  # an end symbol outside the vocabulary

    @jax.jit
    def decode(params):
        step, cache = start_decoding(model, params, source, work.beam, work.target)
        options = {"bos": BOS, "eos": never, "max_length": work.target}
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
    """Of a function of JAX that takes query, key and value in that layout."""
    inputs = [jnp.asarray(x) for x in attention_inputs(work, layout)]
    forward = jax.jit(attend)
    both = jax.jit(jax.grad(lambda *x: (attend(*x) ** 2).sum(), argnums=(0, 1, 2)))
    timed = both if work.backward else forward

    def check() -> np.ndarray:
        output = np.asarray(forward(*inputs))
        return output if layout == "BHLD" else output.swapaxes(1, 2)

    return Contender(lambda: jax.block_until_ready(timed(*inputs)), check)
