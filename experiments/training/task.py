"""The stages of every task, from its flags to results.json, in one process or several."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import chex
import jax

from experiments.checkpoints.run_folder import RunFolder, named, plain, write_json
from experiments.checkpoints.safetensors_io import export_params
from experiments.checkpoints.trained import check_newest
from experiments.distributed.cluster import start
from experiments.distributed.processes import Processes
from experiments.errors import UserError
from experiments.functions import keep_copy
from experiments.training.config import TrainingConfig
from experiments.training.run import Run
from tfm.parallel.mesh import fit_vocabulary


@contextlib.contextmanager
def distributed_session(config: TrainingConfig) -> Iterator[Processes]:
    """The processes of a training; an error in one of them ends all."""
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.compilation_cache))
    processes = start(config.cluster, config.run)
    with processes.ending_together():
        yield processes


def check_same_run(processes: Processes, config: dict[str, Any]) -> None:
    """Raises ProcessError, naming the difference, where the processes' runs are not the same.

    config: JSON values, the periods of logging, evaluating and saving among them.
    """
    setup = {k: v for k, v in config.items() if k not in ("cluster", "compilation_cache")}
    setup["num_processes"] = config.get("cluster", {}).get("num_processes")
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    setup |= {"versions": versions, "python": platform.python_version()}
    processes.check_equal("the run", setup)


class Prepared(Protocol):
    """A task with its data. All processes train it; process 0 alone does the rest."""

    run: Run

    def summary(self) -> str:
        """One line with the sizes of the data and of the model."""

    def train(self) -> tuple[Any, dict[str, Any]]:
        """The trained model, and the facts that `train_model` returns."""

    def finish(
        self, trained: Any, facts: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[], None]]:
        """Evaluates the model and writes the report; returns the content of results.json, and what
        prints it."""


class Task(Protocol):
    """A task before anything is written, as `carry_out` takes it."""

    run: Run
    """The run, without what only `prepare` can tell."""
    may_differ: Collection[str]
    """Fields of config.json that may change when the run is resumed."""
    makes: Collection[str]
    """Names of what `prepare` writes into the run folder."""

    def is_finished(self, results: dict[str, Any], config: dict[str, Any]) -> bool:
        """Whether a run with these results.json and config.json needs no more work."""

    def prepare(self) -> Prepared:
        """Makes the data, or finds it in the run folder; called in process 0 before the others."""


def carry_out(task: Task) -> None:
    """Runs a task whose flags and files have been read; called in every process."""
    processes = task.run.processes
    check_same_run(processes, task.run.record)
    if processes.is_first:
        lead(task)
    elif processes.from_first(slow=True):  # what it has prepared is in the folder
        learn(task.prepare())


def lead(task: Task) -> None:
    """Process 0's part: it locks the folder, prepares, prints, trains and reports."""
    config, folder, processes = task.run.config, task.run.folder, task.run.processes
    with (
        folder.claim(task.run.record, task.may_differ, rewrite=False),
        _withdrawn_unless_begun(folder, task.makes),
    ):
        earlier, its_config = folder.read("results.json"), folder.read("config.json")
        if earlier and its_config and task.is_finished(earlier, its_config):
            processes.from_first(False, slow=True)
            steps = earlier["steps"]
            flag = "steps" if steps == config.steps else "patience"
            print(f"{config.run} is finished ({steps} steps); a larger --{flag} extends it")
            return
        prepared = task.prepare()
        run = prepared.run
        check_newest(folder, config.steps, run.identity)
        write_json(folder.path / "config.json", run.record)
        keep_copy(folder.path, config.functions)
        if earlier:
            folder.set_aside(earlier.get("steps", 0))
        print(prepared.summary(), flush=True)
        processes.from_first(True, slow=True)
        trained, facts = learn(prepared)
        results, show = prepared.finish(trained, facts)
        write_params(run, trained.params, results["steps"])
        # Written last, so that a folder with results.json is complete.
        write_json(folder.path / "results.json", results)
        show()  # only now: what a terminal cannot show costs no result
        print(f"report: {folder.report}")


def learn(prepared: Prepared) -> tuple[Any, dict[str, Any]]:
    """Trains, once all processes have confirmed that they prepared the same run."""
    check_same_run(prepared.run.processes, prepared.run.identity)
    return prepared.train()


@contextlib.contextmanager
def _withdrawn_unless_begun(folder: RunFolder, made: Collection[str]) -> Iterator[None]:
    """Removes what `prepare` made if an error comes before the first step.

    Otherwise the folder would refuse the same command with the mistake corrected.
    """
    try:
        yield
    except UserError:
        if not folder.has_begun:
            for name in made:
                shutil.rmtree(folder.path / name, ignore_errors=True)
            (folder.path / "config.json").unlink(missing_ok=True)
        raise


def write_params(run: Run, params: chex.ArrayTree, steps: int) -> None:
    """Writes params.safetensors: the final parameters, without the rows of padding for a mesh."""
    model = dataclasses.replace(run.config.model, vocab_multiple=1)
    path = run.folder.path / "params.safetensors"
    with named(path):
        about = {"config": json.dumps(plain(model)), "steps": str(steps)}
        export_params(path, fit_vocabulary(params, model), about)
