"""What a training keeps on disk: the newest checkpoints, and the best by validation."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
from experiments.checkpoints.trained import check_identity
from experiments.training.run import Run
from experiments.training.step_monitor import StepMonitor
from tfm.training import TrainState


class Batches(Iterator, Protocol):
    """An endless iterator of batches whose position can be saved (Grain's)."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Checkpointer:
    """Saves and resumes one run. Use as a context manager: leaving it waits for the saves.

    Beside the state a checkpoint holds the position of the batches, the number of batches drawn,
    the number of consecutive steps without an update, the seconds of training, and the identity of
    the run: its resolved config and its data's fingerprint.
    """

    def __init__(self, run: Run, batches: Batches) -> None:
        folder, keep = run.folder, run.config.keep_checkpoints
        self._newest = Checkpoints(folder.checkpoints, keep, distributed=True)
        self._best = Checkpoints(folder.best, keep=1, distributed=True)
        self._processes, self._identity = run.processes, run.identity
        self._batches, self._lowest = batches, math.inf
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Checkpointer":
        self._stack.enter_context(self._newest)
        self._stack.enter_context(self._best)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def resume(
        self, state: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest sound state and its notes, with the batches set to its position.

        Returns `state` and the notes of a fresh start where nothing was ever saved; else `state` is
        deleted.

        Raises:
          RunFolderError: the checkpoint belongs to a run with another config or other data.
          CheckpointError: all that was saved is damaged, or was saved with other arrays.
        """
        step, faults = self._found_by_first(self._newest)
        for line in faults:
            say(line)
        if step is None:
            self._resume_best(0, say)
            if faults:
                say("no save was ever finished: beginning anew")
            return state, {"seconds": 0.0, "batches": 0, "in_a_row": 0}
        notes = self._newest.notes(step)
        check_identity(self._newest.folder / str(step), notes, self._identity)
        for array in jax.tree.leaves(state):  # else the devices would hold two states
            array.delete()
        state = self._newest.restore(step, state)
        self._resume_best(step, say)
        self._batches.set_state(notes["data"])
        return state, notes

    def _resume_best(self, done: int, say: Callable[[str], None]) -> None:
        """Restores the lowest loss; sets aside a best that is damaged or newer than step `done`."""
        try:
            best, faults = self._found_by_first(self._best)
        except CheckpointError as error:
            best, faults = None, [f"{error}. This one is set aside, and the best sought anew"]
            self._set_aside_best(-1, "damaged")
        for line in faults:
            say(line)
        if best is not None and best > done:
            say(f"{self._best.folder / str(best)}: beyond step {done}, set aside and sought anew")
            self._set_aside_best(done, "undone")
        elif best is not None:
            self._lowest = self._best.notes(best)["valid_loss"]

    def _found_by_first(self, checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
        """The newest sound step, and one line for each step that is not sound.

        Process 0 searches and shares the result. Raises CheckpointError in every process where
        every checkpoint is damaged.
        """
        result: list[Any] = [None, [], None]
        if self._processes.is_first:
            try:
                result = [*checkpoints.newest(), None]
            except CheckpointError as error:
                result[2] = str(error)
        step, faults, error = self._processes.from_first(result)
        if error is not None:
            raise CheckpointError(error)
        return step, faults

    def _set_aside_best(self, after: int, why: str) -> None:
        if self._processes.is_first:
            self._best.set_aside(after, why)
        self._processes.from_first()

    def _notes(self, monitor: StepMonitor) -> dict[str, Any]:
        about = {"identity": self._identity, "data": self._batches.get_state()}
        return about | monitor.notes()

    def save(self, state: TrainState, monitor: StepMonitor) -> None:
        """Starts saving the state in the background; CheckpointError where it cannot."""
        self._best.wait()  # resuming from this step never evaluates that best again
        self._newest.save(monitor.step, state, self._notes(monitor))

    def save_if_best(self, state: TrainState, monitor: StepMonitor, loss: float) -> None:
        """Saves into the folder of the best if `loss` is the lowest so far."""
        if loss < self._lowest:
            self._lowest = loss
            notes = self._notes(monitor) | {"valid_loss": loss}
            self._best.save(monitor.step, state, notes)

    def wait(self) -> int | None:
        """Waits for pending saves; returns the newest saved step."""
        self._best.wait()
        self._newest.wait()
        return self._newest.last_saved
