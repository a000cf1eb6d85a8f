"""Trains a model on a task's data: the validation loss, the sharded step, the training."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import numpy as np

from experiments.data.packing import packed_rows
from experiments.functions import make_model
from experiments.training.checkpointer import Batches
from experiments.training.config import TrainingConfig, parameter_count
from experiments.training.loop import Learner, train
from experiments.training.placement import Layout
from experiments.training.run import Run
from experiments.training.step_monitor import Metrics
from experiments.training.stopping import StopSignal
from tfm.training import (
    init_state,
    make_optimizer,
    make_train_step,
    skip_nonfinite,
    summed_loss,
)


def make_valid_loss(
    config: TrainingConfig, examples: Sequence[dict[str, Any]], bos: int, layout: Layout
) -> Callable[[chex.ArrayTree], float]:
    """params -> mean nats per target symbol on `examples`, without smoothing and dropout.

    The rows are sharded as in training; every process must call it.
    """
    model = make_model(config.model, config.functions)
    arrays = packed_rows(examples, config.source_length, config.target_length)
    missing = -len(arrays["source"]) % config.rows  # padding, for one static shape
    whole = {name: np.pad(rows, ((0, missing), (0, 0))) for name, rows in arrays.items()}
    batches = [
        {name: rows[i : i + config.rows][layout.own_rows] for name, rows in whole.items()}
        for i in range(0, len(whole["source"]), config.rows)
    ]
    loss = layout.evaluation(lambda params, x: summed_loss(model, params, x, bos, smoothing=0.0))

    def valid_loss(params: chex.ArrayTree) -> float:
        sums = jax.device_get([loss(params, batch) for batch in batches])
        return sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)

    return valid_loss


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a model learns from."""

    batches: Batches
    """Batches of this process's rows (`Layout.own_rows`)."""
    valid: Sequence[dict[str, Any]]
    """The examples of the validation loss."""
    bos: int
    """The id that a target begins with."""


def make_learner(
    run: Run,
    data: TrainingData,
    evaluate: Callable[[chex.ArrayTree], Metrics],
    initial: chex.ArrayTree | None,
) -> Learner:
    """The state placed on the run's devices, and the sharded step and evaluation."""
    config, layout, processes, model = run.config, run.layout, run.processes, run.model
    optimizer = make_optimizer(config.make_learning_rate(), config.clip)
    train_step = make_train_step(
        model, optimizer, bos=data.bos, smoothing=config.smoothing,
        smoothed_over=config.smoothed_over, accumulation=config.accumulation,
    )  # fmt: skip
    # A raw key is a plain array, like the rest of the state.
    # Initialised on the host, since the state may not fit on one device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        state = init_state(model, optimizer, jax.random.PRNGKey(config.seed))
    if initial is not None:
        state = state.replace(params=initial)
    state = layout.place(state)
    valid_loss = make_valid_loss(config, data.valid, data.bos, layout)

    def evaluate_all(params: chex.ArrayTree) -> Metrics:
        loss = {"valid_loss": valid_loss(params)}
        params = layout.on_one_device(params)
        metrics = loss | evaluate(params) if processes.is_first else None
        return processes.from_first(metrics, slow=True)

    return Learner(state, layout.step(skip_nonfinite(train_step), state), evaluate_all)


def train_model(
    run: Run,
    data: TrainingData,
    evaluate: Callable[[chex.ArrayTree], Metrics],
    initial: chex.ArrayTree | None = None,
) -> tuple[chex.ArrayTree, dict[str, Any]]:
    """Trains, or resumes training; returns the parameters and the facts for results.json.

    Args:
      evaluate: whole parameters -> metrics beside the validation loss; called in process 0 alone.
      initial: parameters to start from. None: random initialisation.

    Raises SystemExit after SIGINT or SIGTERM, with everything saved.
    """
    with StopSignal() as stop:
        learner = make_learner(run, data, evaluate, initial)
        state, facts = train(run, learner, data.batches, stop)
        params = run.layout.on_one_device(state.params)
    return params, {"parameters": parameter_count(run.config)} | run.layout.facts(state) | facts
