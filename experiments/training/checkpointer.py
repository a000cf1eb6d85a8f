"""What a run keeps on disk: the newest checkpoints, the best by validation, the final model."""

import contextlib
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, changes
from experiments.distributed.processes import Processes
from experiments.functions import check_recorded, make_model
from experiments.training.step_monitor import Guard, Meter
from tfm.config import TransformerConfig, current_fields
from tfm.model import Transformer
from tfm.parallel.mesh import fit_vocabulary
from tfm.training import TrainState, param_shapes


class Batches(Iterator, Protocol):
    """An endless iterator of batches whose position can be saved (Grain's)."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def check_identity(path: Path, notes: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises RunFolderError where the checkpoint at `path` was trained as another run.

    The position of the batches is only a number: other data would be gone through all the same.
    """
    if differing := changes(notes["identity"], identity):
        raise RunFolderError(
            f"{path} belongs to another run ({'; '.join(differing)}): "
            "name another folder with --run"
        )


def check_newest(folder: RunFolder, steps: int, identity: dict[str, Any]) -> None:
    """Before anything is written: RunFolderError where the run cannot go on so, since its newest
    checkpoint is another run's, is beyond `steps`, or is gone."""
    step = None
    if folder.checkpoints.is_dir():
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            step, _ = checkpoints.newest()
            if step is not None:
                check_identity(folder.checkpoints / str(step), checkpoints.notes(step), identity)
            if step is not None and step > steps:
                raise RunFolderError(f"{folder.path} is at step {step}, beyond --steps {steps}")
    finished = (folder.read("results.json") or {}).get("steps", 0)
    before = max(finished, *folder.sittings(), 0)
    if step is None and before and finished != steps:
        raise RunFolderError(
            f"{folder.checkpoints}: its checkpoints are gone, though the run was at step {before}: "
            "put them back, or name another folder with --run"
        )


def newest_model(
    folder: RunFolder, functions: str | None = None
) -> tuple[dict[str, Any], Transformer, chex.ArrayTree]:
    """The identity, model and parameters that a run ended with, or of its newest checkpoint.

    functions: the FILE:NAME of those that it was trained with; of a folder none is ever run.

    A damaged checkpoint is named on standard error, and the one before it taken.

    Raises RunFolderError where nothing is saved; CheckpointError where all of it is damaged;
    FunctionsError where it was trained with other functions.
    """
    for place in (folder.final, folder.checkpoints):
        if not place.is_dir():
            continue
        with Checkpoints(place, read_only=True) as checkpoints:
            step, found = checkpoints.newest()
            for line in found:
                print(line, file=sys.stderr)
            if not step:  # 0: saved before anything was learned
                continue
            identity = checkpoints.notes(step)["identity"]
            check_recorded(folder.path, identity.get("functions_of"), functions)
            trained = TransformerConfig(**current_fields(identity["model"]))
            model = make_model(trained, functions)
            params = checkpoints.restore_params(step, param_shapes(trained, model.functions))
            # Rows that only a mesh needed are left out.
            config = dataclasses.replace(trained, vocab_multiple=1)
            model = Transformer(config, model.functions)
            return identity, model, fit_vocabulary(params, config)
    raise RunFolderError(f"{folder.checkpoints}: no checkpoint; was the run interrupted?")


def without_moments(params: chex.ArrayTree, step: int) -> TrainState:
    """Parameters as a checkpoint holds them, where there is nothing to go on training from."""
    return TrainState(jnp.int32(step), params, {}, jax.random.PRNGKey(0))


def write_final(
    folder: RunFolder, params: chex.ArrayTree, step: int, identity: dict[str, Any]
) -> None:
    """Writes the model that a run ends with; one that is there already goes.

    Raises CheckpointError where it cannot be written.
    """
    shutil.rmtree(folder.final, ignore_errors=True)
    with Checkpoints(folder.final) as checkpoints:
        state = jax.device_get(without_moments(params, step))
        checkpoints.save(step, state, {"identity": identity})


class Keeper:
    """Saves and resumes one run. Use as a context manager: leaving it waits for the saves.

    Beside the state a checkpoint holds the position of the batches, how many were drawn, how many
    steps in a row made no update, the seconds so far, and the identity of the run: its resolved
    config and its data's fingerprint.
    """

    def __init__(
        self,
        folder: RunFolder,
        batches: Batches,
        identity: dict[str, Any],
        keep: int,
        processes: Processes = Processes(),  # noqa: B008 (alone it has no state)
    ) -> None:
        self._newest = Checkpoints(folder.checkpoints, keep, together=True)
        self._best = Checkpoints(folder.best, keep=1, together=True)
        self._processes = processes
        self._batches, self._identity, self._lowest = batches, identity, math.inf
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Keeper":
        self._stack.enter_context(self._newest)
        self._stack.enter_context(self._best)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def resume(
        self, state: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest sound state and its notes, with the batches set to its position.

        Where none was ever saved: `state`, and the notes of a beginning.

        Raises:
          RunFolderError: the checkpoint belongs to a run with another config or other data.
          CheckpointError: all that was saved is damaged, or was saved with other arrays.
        """
        step, found = self._found_by_first(self._newest)
        for line in found:
            say(line)
        if step is None:
            self._resume_best(0, say)
            if found:
                say("no save was ever finished: beginning anew")
            return state, {"seconds": 0.0, "batches": 0, "in_a_row": 0}
        notes = self._newest.notes(step)
        check_identity(self._newest.folder / str(step), notes, self._identity)
        state = self._newest.restore(step, state)
        self._resume_best(step, say)
        self._batches.set_state(notes["data"])
        return state, notes

    def _resume_best(self, done: int, say: Callable[[str], None]) -> None:
        """The lowest loss so far; a best that is damaged or beyond `done` is set aside."""
        try:
            best, found = self._found_by_first(self._best)
        except CheckpointError as error:
            best, found = None, [f"{error}. This one is set aside, and the best sought anew"]
            self._set_aside_best(-1, "damaged")
        for line in found:
            say(line)
        if best is not None and best > done:
            say(f"{self._best.folder / str(best)}: beyond step {done}, set aside and sought anew")
            self._set_aside_best(done, "undone")
        elif best is not None:
            self._lowest = self._best.notes(best)["valid_loss"]

    def _found_by_first(self, checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
        """The newest sound step, which process 0 looks for, and what it found on the way.

        Raises CheckpointError in all where all of it is damaged.
        """
        found: list[Any] = [None, [], None]
        if self._processes.is_first:
            try:
                found = [*checkpoints.newest(), None]
            except CheckpointError as error:
                found[2] = str(error)
        step, lines, error = self._processes.from_first(found)
        if error is not None:
            raise CheckpointError(error)
        return step, lines

    def _set_aside_best(self, after: int, why: str) -> None:
        if self._processes.is_first:
            self._best.set_aside(after, why)
        self._processes.from_first()

    def _notes(self, guard: Guard, meter: Meter) -> dict[str, Any]:
        return {
            "identity": self._identity,
            "data": self._batches.get_state(),
            "batches": guard.drawn,
            "in_a_row": guard.in_a_row,
            "seconds": meter.seconds,
        }

    def save(self, state: TrainState, guard: Guard, meter: Meter) -> None:
        """Begins to save the state after `guard.step` updates; CheckpointError where it cannot."""
        self._best.wait()  # else a best of before could be lost for good, as it will not come again
        self._newest.save(guard.step, state, self._notes(guard, meter))

    def save_if_best(self, state: TrainState, guard: Guard, meter: Meter, loss: float) -> None:
        """The same into the folder of the best, where `loss` is the lowest so far."""
        if loss < self._lowest:
            self._lowest = loss
            notes = self._notes(guard, meter) | {"valid_loss": loss}
            self._best.save(guard.step, state, notes)

    def wait(self) -> int | None:
        """Waits for the saves under way; the newest step that is safe."""
        self._best.wait()
        self._newest.wait()
        return self._newest.last_saved
