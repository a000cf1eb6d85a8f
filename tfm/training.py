"""§5.3 Optimizer and schedule; the training step, a pure function of state and batch."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import optax
from jax import Array

from tfm.clipping import global_norm
from tfm.config import TransformerConfig
from tfm.loss import SmoothedOver, label_smoothed_cross_entropy
from tfm.model import Transformer, shift_right
from tfm.shapes import assert_ids
from tfm.sharding import constrain

Batch = dict[str, Array]
"""int32 arrays [R, L]: source, target (labels), and their _segment_ids and _positions."""


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes."""

    step: Array  # number of updates done
    params: chex.ArrayTree
    opt_state: optax.OptState
    key: Array  # raw PRNG key; the dropout of step i draws from fold_in(key, i)


def paper_schedule(d_model: int, warmup_steps: int = 4000, factor: float = 1.0) -> optax.Schedule:
    """lrate = factor · d_model^−0.5 · min(step^−0.5, step · warmup_steps^−1.5) (§5.3, equation 3).

    The paper counts steps from 1, optax from 0: its step 0 is our step 1.

    Raises:
      ValueError: warmup_steps below 1.
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps={warmup_steps} must be at least 1")

    def schedule(count):
        step = count + 1
        return factor * d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)

    return schedule


def cosine_schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup_steps`, then half a cosine down to 0 at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)


def make_optimizer(schedule: optax.Schedule, clip_threshold: float) -> optax.GradientTransformation:
    """Clipping by the global norm, then the paper's Adam: β₁ = 0.9, β₂ = 0.98, ε = 1e-9 (§5.3)."""
    return optax.chain(
        optax.clip_by_global_norm(clip_threshold),
        optax.adam(schedule, b1=0.9, b2=0.98, eps=1e-9),
    )


def init_params(model: Transformer, key: Array) -> chex.ArrayTree:
    """Fresh parameters; none of their shapes depends on the data's."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


@functools.cache
def param_shapes(config: TransformerConfig) -> chex.ArrayTree:
    """Shapes and types of a model's parameters; nothing is computed."""
    init = functools.partial(init_params, Transformer(config))
    return jax.eval_shape(init, jax.random.PRNGKey(0))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """Fresh parameters and moments; one half of `key` initialises, the other draws the dropout."""
    init_key, dropout_key = jax.random.split(key)
    params = init_params(model, init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), dropout_key)


def summed_loss(
    model: Transformer,
    params: chex.ArrayTree,
    batch: Batch,
    bos: int,
    smoothing: float,
    dropout_key: Array | None = None,
    tokens_at_once: int | None = None,
    smoothed_over: SmoothedOver = "all",
) -> tuple[Array, Array]:
    """The loss summed over the target tokens of a packed batch, and their number.

    Sums, not means, so that micro-batches of unequal token counts add up to the large batch.

    Args:
      tokens_at_once: of how many tokens the logits are held at a time, [tokens_at_once, V] in the
        place of [R·L, V]; the backward pass then computes them anew. None: of all.
      smoothed_over: the words that share ε, see `tfm.label_smoothed_cross_entropy`.

    Raises:
      ValueError: tokens_at_once below 1.
    """
    if tokens_at_once is not None and tokens_at_once < 1:
        raise ValueError(f"tokens_at_once={tokens_at_once} must be at least 1")
    target_input = shift_right(batch["target"], bos, batch["target_positions"])
    context = {
        name: batch[name]
        for side in ("source", "target")
        for name in (f"{side}_segment_ids", f"{side}_positions")
    }
    variables = {"params": params}
    y = model.apply(
        variables, batch["source"], target_input, dropout_key=dropout_key, return_features=True,
        **context,
    )  # fmt: skip

    def losses_of(y: Array, labels: Array) -> Array:
        logits = model.apply(variables, y, method="logits")
        vocab_size = model.config.vocab_size
        return label_smoothed_cross_entropy(logits, labels, smoothing, smoothed_over, vocab_size)

    real = batch["target_segment_ids"] != 0
    if tokens_at_once is None:
        losses = losses_of(y, batch["target"])
    else:
        losses = _in_chunks(losses_of, tokens_at_once, y, batch["target"])
    return jnp.where(real, losses, 0).sum(), real.sum()


def _in_chunks(function: Callable[..., Array], size: int, y: Array, labels: Array) -> Array:
    """function(y [..., D], labels [...]) -> [...], a chunk of `size` tokens after another."""
    flat = y.reshape(-1, y.shape[-1]), labels.reshape(-1)
    missing = -labels.size % size
    chunks = [
        jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        for x in flat
    ]
    # Without the checkpoint the scan would keep each chunk's logits for the backward pass.
    values = jax.lax.map(lambda chunk: jax.checkpoint(function)(*chunk), tuple(chunks))
    return values.reshape(-1)[: labels.size].reshape(labels.shape)


def _sum_gradients(
    gradient: Callable[..., Any], params: chex.ArrayTree, batch: Batch, key: Array, parts: int
) -> Any:
    """gradient(params, batch, key), or the sum of those of the batch's rows in `parts`."""
    if parts == 1:
        return gradient(params, batch, key)
    rows = batch["source"].shape[0]
    if rows % parts:
        raise ValueError(f"accumulation={parts} does not divide the batch's {rows} rows")

    def cut(x: Array) -> Array:
        return constrain(x.reshape(parts, rows // parts, *x.shape[1:]), "batch", None)

    micro_batches = jax.tree.map(cut, batch)

    def of(i: Array, micro: Batch) -> Any:
        return gradient(params, micro, jax.random.fold_in(key, i))

    def add(total: Any, indexed: tuple[Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(*indexed)), None

    shapes = jax.eval_shape(of, 0, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(parts), micro_batches))[0]


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    bos: int,
    smoothing: float = 0.1,
    smoothed_over: SmoothedOver = "all",
    accumulation: int = 1,
    tokens_at_once: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, batch) -> (state, metrics); jit it with `donate_argnums=0`.

    The batch's rows are cut into `accumulation` micro-batches, one after another in memory's sake.
    Their gradients are summed over tokens, divided by the batch's tokens and clipped once: the
    update equals that of the whole batch (without dropout, which draws anew for each micro-batch).
    `tokens_at_once` bounds the memory of the logits (`summed_loss`).

    Metrics: `loss` in nats a token with smoothing, `tokens` and `sequences` (target),
    `gradient_norm` before clipping, `largest_gradient`: the greatest |element|, which tells a norm
    that overflows from a gradient that does.

    Raises:
      ValueError: bos is outside the vocabulary; from the step, when traced: accumulation does not
        divide the batch's rows.
    """
    assert_ids("bos", bos, model.config.vocab_size)

    def gradient(params: chex.ArrayTree, batch: Batch, key: Array):
        of = jax.value_and_grad(summed_loss, argnums=1, has_aux=True)
        return of(model, params, batch, bos, smoothing, key, tokens_at_once, smoothed_over)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, tokens), grads = _sum_gradients(gradient, state.params, batch, key, accumulation)
        count = jnp.maximum(tokens, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss / count,
            "tokens": tokens,
            # Segments number from 1 in each row, so the largest number is the count.
            "sequences": batch["target_segment_ids"].max(-1).sum(),
            "gradient_norm": global_norm(grads),
            "largest_gradient": jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(grads)]).max(),
        }
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def skip_nonfinite(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """The same step, but without its update where its loss or gradient norm is not finite.

    The state then stays as it was, step count, moments and all: one NaN would make every parameter
    NaN, and a norm whose square overflows would make the clipped gradient 0. The metrics gain
    `skipped`, whether that was so.
    """

    def guarded(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        updated, metrics = train_step(state, batch)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
        return kept, metrics | {"skipped": ~sound}

    return guarded
