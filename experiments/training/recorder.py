"""Records the steps: on the screen, in metrics.jsonl, in checkpoints."""

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
    """Shows, logs and saves the steps. Process 0 alone shows and logs; all processes save."""

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
        """Reports and logs a step that made no update."""
        self.display.say(f"{skipped}; no update was made")
        if self._log:
            self._log.write_skipped(skipped.to_json())

    def figures(self) -> Metrics:
        """Reads the metrics since the last call, shows them, and returns them for the log."""
        step = self._monitor.step
        figures, status = self._monitor.meter.read()
        self.display.update(status)
        return figures | {"step": step, "learning_rate": float(self._learning_rate(step - 1))}

    def evaluated(self, state: TrainState, line: Metrics) -> None:
        """Shows an evaluation, and saves the state if it is the best so far."""
        self._checkpointer.save_if_best(state, self._monitor, line["valid_loss"])
        self.display.say(validation_line(line))
        self._monitor.meter.restart()  # an evaluation is not part of the speed

    def log(self, line: Metrics) -> None:
        """Writes a line of metrics.jsonl."""
        if self._log:
            self._log.write(line)

    def save(self, state: TrainState) -> None:
        """Starts saving the state in the background; CheckpointError where it cannot."""
        self.display.now("saving")
        self._checkpointer.save(state, self._monitor)

    def wait(self) -> int | None:
        """Waits for pending saves; returns the newest saved step."""
        return self._checkpointer.wait()

    def leave(self, signal: int) -> NoReturn:
        """Waits for pending saves, then ends the process."""
        self.wait()
        step = self._monitor.step
        self.display.say(f"stopped and saved at step {step}; the same command goes on")
        raise Stopped(128 + signal)

    def stalls(self) -> bool:
        """Whether the evaluations have used up the patience, by process 0's log."""
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
    """Resumes from the newest sound checkpoint, else starts from `state`.

    Sets the batches to the checkpoint's position. Leaving the context waits for pending saves.
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
            if is_first:  # in other processes the signal prints its own line
                stop.say = display.say
            if step:
                display.say(f"resuming {folder.path} at step {step}")
            yield state, monitor, Recorder(run, monitor, checkpointer, display, log)
            checkpointer.wait()  # while the bar is still shown


def evaluations_since_the_best(metrics: list[Metrics]) -> int:
    """The number of evaluations after the one with the lowest validation loss."""
    losses = [m["valid_loss"] for m in metrics if m.get("valid_loss") is not None]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def validation_line(line: Metrics) -> str:
    """`step 500  loss 0.912  valid_loss 0.321  …`"""
    figures = {"loss": line["loss"]} | {k: v for k, v in line.items() if k.startswith("valid_")}
    return f"step {line['step']}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items())
