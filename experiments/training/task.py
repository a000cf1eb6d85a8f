"""What every task's training has: its processes, its validation loss, and the training itself."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import numpy as np

from experiments.checkpoints.run_folder import RunFolder, named, plain
from experiments.checkpoints.safetensors_io import export_params
from experiments.data.packing import packed_rows
from experiments.distributed.cluster import start
from experiments.distributed.processes import Processes
from experiments.functions import make_model
from experiments.training.checkpointer import Batches
from experiments.training.config import TrainingConfig, parameter_count
from experiments.training.loop import train
from experiments.training.placement import Layout
from experiments.training.step_monitor import Metrics
from experiments.training.stopping import StopSignal
from tfm.config import TransformerConfig
from tfm.parallel.mesh import fit_vocabulary
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
    """params -> nats a target symbol on all `examples`, without smoothing and dropout.

    The devices share the rows as they do in training, and all processes take part.
    """
    model = make_model(config.model, config.functions)
    arrays = packed_rows(examples, config.source_length, config.target_length)
    missing = -len(arrays["source"]) % config.rows  # rows of padding, so that one shape serves all
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


@contextlib.contextmanager
def distributed_session(config: TrainingConfig) -> Iterator[Processes]:
    """The processes that train together; what ends one of them ends all."""
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.compilation_cache))
    processes = start(config.cluster, config.run)
    with processes.ending_together():
        yield processes


def check_same_run(processes: Processes, config: dict[str, Any]) -> None:
    """Raises ProcessError where the processes would not train the same: the difference is named.

    config: as JSON, all that decides what is done when, too.
    """
    told = {k: v for k, v in config.items() if k not in ("cluster", "compilation_cache")}
    told["num_processes"] = config.get("cluster", {}).get("num_processes")
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    told |= {"versions": versions, "python": platform.python_version()}
    processes.check_equal("the run", told)


def train_model(
    config: TrainingConfig,
    bos: int,
    batches: Batches,
    valid_loss: Callable[[Any], float],
    evaluate: Callable[[Any], Metrics],
    identity: dict[str, Any],
    folder: RunFolder,
    layout: Layout,
    processes: Processes,
    initial: chex.ArrayTree | None = None,
) -> tuple[chex.ArrayTree, dict[str, Any]]:
    """Trains (or goes on training); returns the parameters and what there is to say of the run.

    Args:
      batches: of the rows of each batch that are the layout's own.
      valid_loss: as `make_valid_loss` returns it; called in every process.
      evaluate: whole parameters -> the other metrics; called in process 0 alone.
      initial: parameters to begin with. None: fresh ones.

    Raises SystemExit after SIGINT or SIGTERM, with everything saved.
    """
    model = make_model(config.model, config.functions)
    learning_rate = config.make_learning_rate()
    optimizer = make_optimizer(learning_rate, config.clip)
    train_step = make_train_step(
        model, optimizer, bos=bos, smoothing=config.smoothing, smoothed_over=config.smoothed_over,
        accumulation=config.accumulation,
    )  # fmt: skip
    with StopSignal() as stop:
        # A raw key: a plain array, like all else in the state.
        # On the host, since it may be more than a device holds.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            state = init_state(model, optimizer, jax.random.PRNGKey(config.seed))
        if initial is not None:
            state = state.replace(params=initial)
        state = layout.place(state)
        step = layout.step(skip_nonfinite(train_step), state)

        def evaluate_all(params: chex.ArrayTree) -> Metrics:
            loss = {"valid_loss": valid_loss(params)}
            params = layout.on_one_device(params)
            found = loss | evaluate(params) if processes.is_first else None
            return processes.from_first(found, slow=True)

        trained, facts = train(
            step, state, batches, folder, config.when(), learning_rate=learning_rate,
            evaluate=evaluate_all, identity=identity, stop=stop, agree=layout.agreement(),
            on_host=layout.on_host, processes=processes,
        )  # fmt: skip
        params = layout.on_one_device(trained.params)
    return params, {"parameters": parameter_count(config)} | layout.facts(trained) | facts


def write_params(
    folder: RunFolder, model: TransformerConfig, params: chex.ArrayTree, steps: int
) -> None:
    """params.safetensors: the final parameters alone, without rows that only a mesh needed."""
    model = dataclasses.replace(model, vocab_multiple=1)
    path = folder.path / "params.safetensors"
    with named(path):
        about = {"config": json.dumps(plain(model)), "steps": str(steps)}
        export_params(path, fit_vocabulary(params, model), about)
