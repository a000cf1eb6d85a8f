"""What a sitting shows and keeps of its steps: the screen, metrics.jsonl, the checkpoints."""

import contextlib
from collections.abc import Iterator
from typing import NoReturn

from experiments.checkpoints.run_folder import MetricsLog
from experiments.progress import ProgressBar
from experiments.training.checkpointer import Batches, Checkpointer
from experiments.training.run import Run
from experiments.training.step_monitor import Metrics, Skipped, StepMonitor
from experiments.training.stopping import Stopped, StopSignal
from tfm.training import TrainState


class Recorder:
    """Shows and keeps what the steps did. Process 0 logs and speaks, all save."""

    def __init__(
        self,
        run: Run,
        monitor: StepMonitor,
        checkpointer: Checkpointer,
        display: ProgressBar,
        log: MetricsLog | None,
    ) -> None:
        self._run, self._monitor, self._checkpointer = run, monitor, checkpointer
        self.display, self._log = display, log
        self._learning_rate = run.config.make_learning_rate()

    def skipped(self, skipped: Skipped) -> None:
        """A step that made no update."""
        self.display.say(f"{skipped}; no update was made")
        if self._log:
            self._log.write_skipped(skipped.to_json())

    def figures(self) -> Metrics:
        """Those of the steps since the last reading; they are shown, and to be logged."""
        step = self._monitor.step
        figures, status = self._monitor.meter.read()
        self.display.update(status)
        return figures | {"step": step, "learning_rate": float(self._learning_rate(step - 1))}

    def evaluated(self, state: TrainState, line: Metrics) -> None:
        """Shows an evaluation, and keeps the state where it is the best so far."""
        self._checkpointer.save_if_best(state, self._monitor, line["valid_loss"])
        self.display.say(validation_line(line))
        self._monitor.meter.restart()  # evaluating is not training's speed

    def log(self, line: Metrics) -> None:
        """A line of metrics.jsonl."""
        if self._log:
            self._log.write(line)

    def save(self, state: TrainState) -> None:
        """Begins to save the state; CheckpointError where it cannot."""
        self.display.now("saving")
        self._checkpointer.save(state, self._monitor)

    def wait(self) -> int | None:
        """Waits for the saves under way; the newest step that is safe."""
        return self._checkpointer.wait()

    def leave(self, signal: int) -> NoReturn:
        """Ends the process once all is saved."""
        self.wait()
        step = self._monitor.step
        self.display.say(f"stopped and saved at step {step}; the same command goes on")
        raise Stopped(128 + signal)

    def stalls(self) -> bool:
        """Whether the evaluations have used up the patience, by the log of process 0."""
        patience, processes = self._run.config.patience, self._run.processes
        if patience is None:
            return False
        used_up = processes.is_first and (
            evaluations_since_the_best(self._run.folder.metrics()) >= patience
        )
        return processes.from_first(used_up)


@contextlib.contextmanager
def begin_sitting(
    run: Run, state: TrainState, batches: Batches, stop: StopSignal
) -> Iterator[tuple[TrainState, StepMonitor, Recorder]]:
    """The state to train on from: of the newest sound checkpoint, or else `state`.

    The batches are set to its position; the end waits for the saves.
    """
    folder, is_first = run.folder, run.processes.is_first
    with Checkpointer(run, batches) as checkpointer:
        state, notes = checkpointer.resume(state, stop.say)
        step = int(state.step)
        run.processes.from_first(folder.note_sitting(step) if is_first else None)
        folder.check_shared()
        monitor = StepMonitor(step, notes)
        log = MetricsLog(folder, step + 1, monitor.batches_consumed) if is_first else None
        with (
            log or contextlib.nullcontext(),
            ProgressBar("training", run.config.steps, step, silent=not is_first) as display,
        ):
            display.now("compiling")
            if is_first:  # else it speaks for itself
                stop.say = display.say
            if step:
                display.say(f"resuming {folder.path} at step {step}")
            yield state, monitor, Recorder(run, monitor, checkpointer, display, log)
            checkpointer.wait()  # while the bar says that it saves


def evaluations_since_the_best(metrics: list[Metrics]) -> int:
    """How many evaluations there were after that of the lowest validation loss."""
    losses = [m["valid_loss"] for m in metrics if m.get("valid_loss") is not None]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def validation_line(line: Metrics) -> str:
    """`step 500  loss 0.912  valid_loss 0.321  …`"""
    figures = {"loss": line["loss"]} | {k: v for k, v in line.items() if k.startswith("valid_")}
    return f"step {line['step']}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items())
