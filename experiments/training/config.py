"""The flags of every training, and what follows from them: learning rate, dtype, periods."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from experiments.checkpoints.run_folder import RunFolder
from experiments.distributed.cluster import ClusterConfig
from experiments.functions import make_model
from tfm.config import TransformerConfig
from tfm.loss import SmoothedOver
from tfm.parallel.mesh import MeshConfig
from tfm.training import cosine_schedule, paper_schedule, param_shapes


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The flags that all tasks share."""

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

    def due(self, step: int) -> set[str]:
        """Which of log, evaluate and save are due after `step` (counted from 1).

        The first step is logged, and the last does all three.
        """
        periods = {"log": self.log_every, "evaluate": self.evaluate_every, "save": self.save_every}
        due = {name for name, every in periods.items() if step == self.steps or step % every == 0}
        return due | {"log"} if step == 1 or "evaluate" in due else due


MAY_DIFFER = {
    "mesh", *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    "cluster", *(f"cluster.{field.name}" for field in dataclasses.fields(ClusterConfig)),
    "compilation_cache", "functions", "preset", "run", "steps", "save_every", "log_every",
    "evaluate_every", "most_skipped", "keep_checkpoints", "patience",
}  # fmt: skip
"""Fields that may change when a run is resumed: they change no update, or (steps) extend it."""


def decide_compute_dtype(model: TransformerConfig, folder: RunFolder) -> TransformerConfig:
    """The model with `compute_dtype="auto"` resolved: as in the folder's config.json, else by the
    platform."""
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


def parameter_count(config: TrainingConfig) -> int:
    """The number of the model's parameters, without the rows that pad the vocabulary for a mesh."""
    model = dataclasses.replace(config.model, vocab_multiple=1)
    if config.functions is None:
        return model.parameter_count()
    shapes = param_shapes(model, make_model(model, config.functions).functions)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
