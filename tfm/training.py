"""§5.3 Optimizer and schedule; the training step, a pure function of state and batch."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from tfm.clipping import global_norm
from tfm.compilation import compiled
from tfm.config import TransformerConfig
from tfm.functions import Functions
from tfm.loss import SmoothedOver, assert_smoothing, label_smoothed_cross_entropy
from tfm.masks import shift_right
from tfm.model import Transformer, one_sequence
from tfm.parallel.sharding import constrain
from tfm.renaming import renamed
from tfm.shapes import ArrayTree, Number, assert_fits, assert_ids
from tfm.stack import uses_our_functions

Batch = dict[str, Array]
"""Integer arrays [R, L]: source, target (labels); where a row holds several sequences, also their
_segment_ids (numbered from 1 in each row, 0 is padding), and _positions (from 0 in each)."""

_SIDES = ("source", "target")
_PARTS = ("", "_segment_ids", "_positions")


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes."""

    step: Array  # number of updates done
    params: ArrayTree
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


def init_params(model: Transformer, key: Array) -> ArrayTree:
    """Fresh parameters; none of their shapes depends on the data's."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


@cache
def param_shapes(config: TransformerConfig, functions: Functions | None = None) -> ArrayTree:
    """Shapes and types of a model's parameters; nothing is computed."""
    init = partial(init_params, Transformer(config, functions or Functions()))
    return jax.eval_shape(init, jax.random.PRNGKey(0))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """Fresh parameters and moments; one half of `key` initialises, the other draws the dropout."""
    init_key, dropout_key = jax.random.split(key)
    params = init_params(model, init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), dropout_key)


def complete(batch: Batch) -> Batch:
    """The batch with what it lacks: segment ids are 1 where there is a token and 0 where that is 0,
    as of one sequence a row, whose positions count from its first place on; where segment ids are
    given, positions count from the start of each segment.

    Raises: as `assert_batch`.
    """
    assert_batch(batch)
    for side in _SIDES:
        tokens = batch[side]
        segments, positions = (f"{side}{part}" for part in _PARTS[1:])
        if positions not in batch:
            counted = _positions_of(batch.get(segments, jnp.ones_like(tokens)))
            batch = batch | {positions: counted}
        if segments not in batch:
            batch = batch | {segments: one_sequence(tokens)}
    return batch


def assert_batch(batch: Batch) -> None:
    """Asserts that a batch has what a training needs, and nothing else.

    Raises:
      ValueError: source or target is missing, or there is something else in it.
      AssertionError: shapes that do not fit.
    """
    known = {f"{side}{part}" for part in _PARTS for side in _SIDES}
    if missing := set(_SIDES) - batch.keys():
        raise ValueError(f"the batch has no {', '.join(sorted(missing))}; it has {sorted(batch)}")
    if unknown := batch.keys() - known:
        raise ValueError(
            f"the batch has {sorted(unknown)}, of which nothing is known: {sorted(known)}"
        )
    for side in _SIDES:
        tokens = batch[side]
        assert_fits(f"batch[{side!r}]", tokens, (None, None))
        segments, positions = (f"{side}{part}" for part in _PARTS[1:])
        for name in {segments, positions} & batch.keys():
            assert_fits(f"batch[{name!r}]", batch[name], tokens.shape, **{side: tokens})


def _positions_of(segments: Array) -> Array:
    """Where each element is in its own segment: [R, L] -> the same."""
    place = jnp.arange(segments.shape[-1], dtype=jnp.int32)[None]
    starts = jnp.where(segments != jnp.roll(segments, 1, axis=-1), place, 0)
    return place - lax.cummax(starts, axis=1)


def _assert_tokens(model: Transformer, batch: Batch) -> None:
    """Asserts that a batch is one, and that concrete tokens are in the vocabulary."""
    assert_batch(batch)
    c = model.config
    assert_ids("batch['source']", batch["source"], c.source_vocab_size or c.vocab_size)
    assert_ids("batch['target']", batch["target"], c.vocab_size)


def _check_loss(
    model: Transformer,
    params: ArrayTree,
    batch: Batch,
    bos: int,
    smoothing: Number,
    *_: Any,
    **__: Any,
) -> None:
    assert_smoothing(smoothing)
    _assert_tokens(model, batch)
    assert_ids("bos", bos, model.config.vocab_size)


@renamed(tokens_at_once="logit_chunk")
@compiled(
    static=("model", "logit_chunk", "smoothed_over"),
    check=_check_loss,
    compile_if=lambda model, *_, **__: uses_our_functions(model=model),
)
def summed_loss(
    model: Transformer,
    params: ArrayTree,
    batch: Batch,
    bos: int,
    smoothing: Number,
    dropout_key: Array | None = None,
    logit_chunk: int | None = None,
    smoothed_over: SmoothedOver = "all",
) -> tuple[Array, Array]:
    """The loss summed over the target tokens of a batch, and their number.

    Sums, not means, so that micro-batches of unequal token counts add up to the large batch.

    Args:
      batch: see `Batch`; what it lacks but for the tokens is filled in (`complete`).
      logit_chunk: of how many tokens the logits are held at a time, [logit_chunk, V] instead of
        [R·L, V], to save memory; the backward pass then computes them again. None: of all.
      smoothed_over: the words that share ε, see `tfm.label_smoothed_cross_entropy`.

    Raises:
      ValueError: logit_chunk below 1, a smoothing outside [0, 1], a batch without tokens or with
        something else, or bos or a token outside the vocabulary.
    """
    if logit_chunk is not None and logit_chunk < 1:
        raise ValueError(f"logit_chunk={logit_chunk} must be at least 1")
    batch = complete(batch)
    target_input = shift_right(batch["target"], bos, batch["target_positions"])
    context = {name: value for name, value in batch.items() if name not in _SIDES}
    variables = {"params": params}
    options: dict[str, Any] = {"dropout_key": dropout_key, "return_features": True} | context
    y: Any = model.apply(variables, batch["source"], target_input, **options)

    def losses_of(y: Array, labels: Array) -> Array:
        logits: Any = model.apply(variables, y, method="logits")
        return label_smoothed_cross_entropy(
            logits,
            labels,
            smoothing,
            smoothed_over,
            model.config.vocab_size,
            implementation=model.config.implementation,
        )

    real = batch["target_segment_ids"] != 0
    if logit_chunk is None:
        losses = losses_of(y, batch["target"])
    else:
        losses = _in_chunks(losses_of, logit_chunk, y, batch["target"])
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
    values = lax.map(lambda chunk: jax.checkpoint(function)(*chunk), tuple(chunks))
    return values.reshape(-1)[: labels.size].reshape(labels.shape)


def _sum_gradients(
    gradient: Callable[..., Any], params: ArrayTree, batch: Batch, key: Array, parts: int
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
    return lax.scan(add, zeros, (jnp.arange(parts), micro_batches))[0]


@renamed(tokens_at_once="logit_chunk")
def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    bos: int,
    smoothing: float = 0.1,
    smoothed_over: SmoothedOver = "all",
    accumulation: int = 1,
    logit_chunk: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, batch) -> (state, metrics). It is compiled; in a loop give the old
    state's memory to the new one: `jax.jit(step, donate_argnums=0)`.

    The batch's rows are cut into `accumulation` micro-batches, one after another to save memory.
    Their gradients are summed over tokens, divided by the batch's tokens and clipped once: the
    update equals that of the whole batch (without dropout, which draws anew for each micro-batch).
    `logit_chunk` bounds the memory of the logits (`summed_loss`).

    Metrics: `loss` in nats a token with smoothing, `tokens` and `sequences` (target),
    `gradient_norm` before clipping, `largest_gradient`: the greatest |element|, which tells a norm
    that overflows from a gradient that does.

    Raises:
      ValueError: bos is outside the vocabulary, smoothing outside [0, 1]; from the step:
        accumulation does not divide the batch's rows, or as `summed_loss`.
    """
    assert_ids("bos", bos, model.config.vocab_size)
    assert_smoothing(smoothing)

    def gradient(params: ArrayTree, batch: Batch, key: Array):
        of = jax.value_and_grad(summed_loss, argnums=1, has_aux=True)
        return of(model, params, batch, bos, smoothing, key, logit_chunk, smoothed_over)

    def check(state: TrainState, batch: Batch) -> None:
        _assert_tokens(model, batch)

    @compiled(check=check)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        batch = complete(batch)
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
            "sequences": batch["target_segment_ids"].max(-1, initial=0).sum(),
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

    def guarded(state: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        updated, metrics = train_step(state, batch)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        # The key is the same in both; a choice between the two would count as a use of it.
        both = updated.replace(key=None), state.replace(key=None)
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), *both)
        return kept.replace(key=state.key), metrics | {"skipped": ~sound}

    return guarded
