"""What every task's training has: its flags, its validation loss, and the training itself."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import chex
import jax
import numpy as np

from experiments.checkpoints.run_folder import RunFolder, named, plain
from experiments.checkpoints.safetensors_io import export_params
from experiments.data.packing import packed_rows
from experiments.distributed.cluster import ClusterConfig, start
from experiments.distributed.processes import Processes
from experiments.functions import make_model
from experiments.training.checkpointer import Batches
from experiments.training.loop import Schedule, train
from experiments.training.placement import Layout
from experiments.training.step_monitor import Metrics
from experiments.training.stopping import StopSignal
from tfm.config import TransformerConfig
from tfm.loss import SmoothedOver
from tfm.parallel.mesh import MeshConfig, fit_vocabulary
from tfm.training import (
    cosine_schedule,
    init_state,
    make_optimizer,
    make_train_step,
    paper_schedule,
    param_shapes,
    skip_nonfinite,
    summed_loss,
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What a training is, whatever it learns."""

    run: Path = Path("runs/run")
    """Folder of the run: config, metrics, checkpoints, results, report."""
    mesh: MeshConfig = MeshConfig()
    """How many devices divide the batch, the parameters and the heads."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs for the next sitting, or the other processes of a
    machine. None: JAX_COMPILATION_CACHE_DIR, or nothing is kept."""
    cluster: ClusterConfig = ClusterConfig()
    """Which process of how many this is (also --coordinator, --process-id …)."""
    seed: int = 0
    """Seed of the initialisation, the dropout and the order of the data."""
    steps: int = 5600
    """Updates in all; a larger number extends a finished run (its schedule is then stretched)."""
    save_every: int = 1400
    """Steps between checkpoints; an interrupted run resumes from the newest."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best by validation is kept apart."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1400
    """Steps between evaluations on the validation data."""
    most_skipped: int = 5
    """Steps in a row without a finite loss and gradient that end the run; one makes no update."""
    patience: int | None = None
    """Evaluations in a row without a lower validation loss that end the run. None: none do."""
    rows: int = 25
    """Packed rows in a batch."""
    source_length: int = 40
    """Source symbols in a packed row, end symbols included."""
    target_length: int = 36
    """Target symbols in a packed row, end symbols included."""
    accumulation: int = 1
    """Micro-batches that a batch's rows are cut into, to save memory; divides rows."""
    model: TransformerConfig = TransformerConfig()
    """The Transformer. Its vocabulary sizes must be those of the data."""
    functions: str | None = None
    """FILE:NAME of a `tfm.Functions` (my.py:MINE), functions and modules in the place of the
    model's. The file is run at each start, and must stay as it is: config.json has its SHA-256."""
    schedule: Literal["cosine", "paper"] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0, or the paper's inverse square root."""
    learning_rate: float = 1.5e-3
    """Peak of the learning rate, at the end of the warm-up (the paper's own is
    1 / √(d_model · warmup_steps))."""
    warmup_steps: int = 400
    """Steps of linear warm-up; the cosine schedule takes at most half of all steps."""
    clip: float = 1.0
    """Threshold θ of the global gradient norm."""
    smoothing: float = 0.1
    """Label smoothing ε."""
    smoothed_over: SmoothedOver = "all"
    """The symbols that share ε: see `tfm.label_smoothed_cross_entropy`."""
    beam: int = 4
    """Beam width of the evaluation and of predict."""
    alpha: float = 0.6
    """Exponent of the beam's length penalty ((5 + n)/6)^α."""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep_checkpoints", "log_every", "evaluate_every",
                     "most_skipped", "rows", "source_length", "target_length", "accumulation",
                     "beam", "warmup_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience} must be at least 1")
        if self.rows % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide rows={self.rows}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be at least 0 and finite")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing} must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        longest = max(self.source_length, self.target_length)
        if self.model.positions == "learned" and self.model.max_learned_positions < longest:
            raise ValueError(
                f"model.max_learned_positions={self.model.max_learned_positions} is less than the "
                f"packing lengths' {longest}"
            )

    def make_learning_rate(self) -> Callable:
        """The schedule that `schedule` names, with its peak at `learning_rate`."""
        if self.schedule == "paper":
            d_model, warmup = self.model.d_model, self.warmup_steps
            papers_peak = (d_model * warmup) ** -0.5
            return paper_schedule(d_model, warmup, self.learning_rate / papers_peak)
        warmup = min(self.warmup_steps, self.steps // 2)
        return cosine_schedule(self.learning_rate, warmup, self.steps)

    def when(self) -> Schedule:
        """What the loop does at which step."""
        return Schedule(
            self.steps, self.log_every, self.evaluate_every, self.save_every, self.most_skipped,
            self.keep_checkpoints, self.patience,
        )  # fmt: skip


def decide_compute_dtype(model: TransformerConfig, folder: RunFolder) -> TransformerConfig:
    """The model with `compute_dtype="auto"` decided: as in the folder's last sitting, or else by
    the devices that are here."""
    if model.compute_dtype != "auto":
        return model
    before = (folder.read("config.json") or {}).get("model", {}).get("compute_dtype")
    platform = jax.default_backend()
    if before is not None:
        decided, why = dataclasses.replace(model, compute_dtype=before), f"as in {folder.path}"
    else:
        decided, why = model.for_platform(platform), f"this is a {platform}"
    if jax.process_index() == 0:
        print(f"compute_dtype auto: {decided.compute_dtype}, {why}", flush=True)
    return decided


MAY_DIFFER = {
    "mesh", *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    "cluster", *(f"cluster.{field.name}" for field in dataclasses.fields(ClusterConfig)),
    "compilation_cache", "functions", "preset", "run", "steps", "save_every", "log_every",
    "evaluate_every", "most_skipped", "keep_checkpoints", "patience",
}  # fmt: skip
"""Fields that may change from one sitting to the next: they change no update, or (steps) extend."""


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


def parameter_count(config: TrainingConfig) -> int:
    """The number of the model's parameters, without rows that only a mesh needs."""
    model = dataclasses.replace(config.model, vocab_multiple=1)
    if config.functions is None:
        return model.parameter_count()
    shapes = param_shapes(model, make_model(model, config.functions).functions)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def write_params(
    folder: RunFolder, model: TransformerConfig, params: chex.ArrayTree, steps: int
) -> None:
    """params.safetensors: the final parameters alone, without rows that only a mesh needed."""
    model = dataclasses.replace(model, vocab_multiple=1)
    path = folder.path / "params.safetensors"
    with named(path):
        about = {"config": json.dumps(plain(model)), "steps": str(steps)}
        export_params(path, fit_vocabulary(params, model), about)
