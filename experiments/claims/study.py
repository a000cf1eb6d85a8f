"""Trains many small models as one program: all seeds, and whole sweeps where shapes allow.

A study compares settings. Each is trained from the same seeds, so that differences are paired by
seed. Equal seeds give the same order of the data, the same dropout, and, for equal shapes, the same
initial parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.claims.evidence import PIECES, Budget
from experiments.data import pronunciations
from experiments.data.packing import packed_rows
from experiments.data.vocabulary import BOS, EOS, Vocabulary
from tfm.config import TransformerConfig
from tfm.loss import label_smoothed_cross_entropy
from tfm.masks import shift_right
from tfm.model import Transformer
from tfm.training import Batch, cosine_schedule, init_state, make_optimizer, make_train_step

ROWS = 16  # packed rows in a batch
LEARNING_RATE = 2e-3
SAMPLE = 128  # training rows that the fit to the training data is judged by


class Task(NamedTuple):
    """Packed rows to learn from and to be judged by (`experiments.data.packing.packed_rows`)."""

    train: Batch
    valid: Batch
    source_vocab_size: int
    vocab_size: int

    def config(self, **changes: Any) -> TransformerConfig:
        """The small model of the studies, with changes by name."""
        small = {
            "d_model": 64, "d_ff": 256, "num_heads": 4, "num_encoder_layers": 1,
            "num_decoder_layers": 1, "dropout_rate": 0.0,
        }  # fmt: skip
        sizes = {"vocab_size": self.vocab_size, "source_vocab_size": self.source_vocab_size}
        return TransformerConfig(**(sizes | small | changes))


class Trainee(NamedTuple):
    """A model and its optimizer."""

    model: Transformer
    optimizer: optax.GradientTransformation


class Trained(NamedTuple):
    """The result of a study: settings × seeds."""

    loss: np.ndarray  # [settings, seeds, steps], nats a token
    params: chex.ArrayTree  # [settings, seeds, ...]
    probes: dict[str, np.ndarray]  # [settings, seeds, probes, ...]


@functools.cache
def pronunciation() -> Task:
    """CMUdict's training words, packed; judged by its validation words."""
    train, valid, test = pronunciations.split_by_family(pronunciations.load_cmudict())
    letters = Vocabulary.of(word for part in (train, valid, test) for word in part)
    phones = Vocabulary.of(p for variants in train.values() for p in variants)
    packed = [
        packed_rows(pronunciations.examples(p, letters, phones), 40, 36) for p in (train, valid)
    ]
    order = np.random.default_rng(0).permutation(len(packed[0]["source"]))
    train_rows = {name: rows[order] for name, rows in packed[0].items()}
    return Task(train_rows, packed[1], letters.size, phones.size)


def reversal(lengths: range, symbols: int = 16, seed: int = 0) -> Task:
    """The task of reversing random symbols, where only the order matters."""
    rng = np.random.default_rng(seed)

    def rows(count: int) -> Batch:
        drawn = [
            rng.integers(EOS + 1, EOS + 1 + symbols, rng.integers(lengths.start, lengths.stop))
            for _ in range(count)
        ]
        sides = {"source": drawn, "target": [s[::-1] for s in drawn]}
        batch = {}
        for side, sequences in sides.items():
            ids = pronunciations.padded([[*s, EOS] for s in sequences], lengths.stop, count)
            positions = np.broadcast_to(np.arange(lengths.stop, dtype=np.int32), ids.shape)
            batch[side] = ids
            batch[f"{side}_segment_ids"] = (ids != 0).astype(np.int32)
            batch[f"{side}_positions"] = positions
        return batch

    return Task(rows(20_000), rows(512), EOS + 1 + symbols, EOS + 1 + symbols)


def optimizer(
    steps: int, learning_rate: float | Array = LEARNING_RATE
) -> optax.GradientTransformation:
    """The studies' optimizer: a tenth of the steps is warm-up; the peak rate may be traced."""
    shape = cosine_schedule(1.0, steps // 10, steps)
    return make_optimizer(lambda count: learning_rate * shape(count), 1.0)


def forward(model: Transformer, params: chex.ArrayTree, batch: Batch, **options: Any) -> Any:
    """Runs the model on a packed batch with teacher forcing."""
    context = {name: batch[name] for name in batch if name not in ("source", "target")}
    target = shift_right(batch["target"], BOS, batch["target_positions"])
    return model.apply({"params": params}, batch["source"], target, **context, **options)


def judge_batch(
    model: Transformer, params: chex.ArrayTree, batch: Batch, **options: Any
) -> dict[str, Array]:
    """`loss` in nats per token, and the shares of `wrong_tokens` and `wrong` sequences.

    Tokens are predicted with teacher forcing. A sequence is wrong if any token is, which is exactly
    where greedy decoding would produce another sequence.
    """
    logits = forward(model, params, batch, **options)
    segments = batch["target_segment_ids"]
    real = segments != 0
    losses = label_smoothed_cross_entropy(logits, batch["target"], 0.0)
    missed = real & (logits.argmax(-1) != batch["target"])
    most = logits.shape[-2] + 1
    by_row = jax.vmap(lambda m, s: jax.ops.segment_max(m.astype(jnp.int32), s, most))
    wrong = jnp.where(jnp.arange(most) > 0, by_row(missed, segments), 0)
    return {
        "loss": jnp.where(real, losses, 0).sum() / real.sum(),
        "wrong_tokens": missed.sum() / real.sum(),
        "wrong": jnp.maximum(wrong, 0).sum() / segments.max(-1).sum(),
    }


def judge(model: Transformer, params: chex.ArrayTree, task: Task) -> dict[str, Array]:
    """`judge_batch` on the validation rows, and on some training rows as `train_…`."""
    sample = {name: rows[:SAMPLE] for name, rows in task.train.items()}
    seen = judge_batch(model, params, sample)
    return judge_batch(model, params, task.valid) | {f"train_{k}": v for k, v in seen.items()}


def _orders(seeds: range, steps: int, available: np.ndarray) -> np.ndarray:
    """Row numbers [settings, seeds, steps, ROWS], epoch by epoch below each `available`."""
    drawn = np.empty((len(available), len(seeds), steps, ROWS), np.int32)
    for i, rows in enumerate(available):
        epochs = -(-steps * ROWS // rows)
        for j, seed in enumerate(seeds):
            rng = np.random.default_rng((seed, int(rows)))
            order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
            drawn[i, j] = order[: steps * ROWS].reshape(steps, ROWS)
    return drawn


def _mesh(models: int) -> Mesh:
    """A mesh of as many devices as divide the models evenly."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if models % n == 0)
    return Mesh(np.array(devices[:count]), ("models",))


def _programs(
    models: int, task: Task, make: Callable[..., Trainee], probe: Callable[..., dict[str, Array]]
) -> tuple[Callable, Callable, Callable]:
    """(settings, seeds) -> states; (settings, states, orders, rows) -> states, losses, a piece
    further; (settings, params) -> probes: each of all models at once."""

    def start(setting, seed):
        return init_state(*make(**setting), jax.random.PRNGKey(seed))

    def advance(setting, state, order, rows):
        step = make_train_step(*make(**setting), bos=BOS, smoothing=0.0)

        def body(state, chosen):
            state, metrics = step(state, jax.tree.map(lambda x: x[chosen], rows))
            return state, metrics["loss"]

        return jax.lax.scan(body, state, order)

    def look(settings, params):
        # One after another: the probes look at many rows, and memory would be short.
        return jax.lax.map(lambda sp: probe(make(**sp[0]).model, sp[1], task), (settings, params))

    mesh, each, same = _mesh(models), P("models"), P()

    def shared_out(function, *specs):
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)

    advance = jax.vmap(advance, in_axes=(0, 0, 0, None))
    return (
        jax.jit(shared_out(jax.vmap(start), each, each)),
        jax.jit(shared_out(advance, each, each, each, same), donate_argnums=1),
        jax.jit(shared_out(look, each, each)),
    )


def train(
    budget: Budget,
    task: Task,
    make: Callable[..., Trainee],
    steps: int,
    settings: dict[str, Any] | None = None,
    *,
    seeds: int | None = None,
    train_rows: Sequence[int] | None = None,
    probe: Callable[[Transformer, chex.ArrayTree, Task], dict[str, Array]] = judge,
    probe_at: tuple[int, ...] = (PIECES,),
) -> Trained:
    """Trains every setting from every seed under one vmap.

    The models are independent and divided evenly over the devices (on a CPU there are
    `jax_num_cpu_devices`).

    Args:
      make: called with one traced value of each entry of `settings`, by name; so a setting may
        affect numbers of the program, but not its shapes.
      steps: a multiple of `PIECES`, as from `Budget.steps`.
      settings: name -> values; all of one length. None: one setting, or one for each `train_rows`.
      seeds: the number of seeds. None: the budget's.
      train_rows: for each setting, the number of training rows. None: all.
      probe: computes arrays from the parameters, which are collected.
      probe_at: the pieces after which to probe, 0 (before training) to `PIECES`.

    Raises:
      ValueError: steps that are not a multiple of `PIECES`.
    """
    if steps < 1 or steps % PIECES:
        raise ValueError(f"steps={steps} must be a multiple of {PIECES}")
    settings = {name: jnp.asarray(values) for name, values in (settings or {}).items()}
    count = len(next(iter(settings.values()), train_rows or (0,)))
    chosen = range(budget.first_seed, budget.first_seed + (seeds or budget.seeds))
    flat = {name: jnp.repeat(values, len(chosen), axis=0) for name, values in settings.items()}
    available = np.broadcast_to(train_rows or len(task.train["source"]), count)
    orders = _orders(chosen, steps, available).reshape(-1, PIECES, steps // PIECES, ROWS)
    start, advance, look = _programs(count * len(chosen), task, make, probe)
    states = start(flat, jnp.tile(jnp.asarray(chosen), count))
    losses, seen = [], []
    for done in range(PIECES + 1):
        if done:
            states, loss = advance(flat, states, orders[:, done - 1], task.train)
            losses.append(np.asarray(loss))
            models = f"{count} × {len(chosen)} models"
            budget.report(done / PIECES, f"{models}  loss {loss.mean():.3f}")
        if done in probe_at:
            seen.append(jax.device_get(look(flat, states.params)))
    probes = {k: np.stack([s[k] for s in seen], 1) for k in seen[0]} if seen else {}
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(count, len(chosen), *x.shape[1:]),
        Trained(np.concatenate(losses, 1), states.params, probes),
    )
