"""The training loop: step, evaluate, log, checkpoint, stop. The only place with a clock."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from experiments.checkpoints.checkpoint import state_sha256
from experiments.checkpoints.run_folder import MetricsLog, RunFolder
from experiments.distributed.processes import Processes
from experiments.errors import UserError
from experiments.training.checkpointer import Batches, Checkpointer
from experiments.training.config import Schedule
from experiments.training.progress import Display
from experiments.training.step_monitor import Meter, Metrics, StepMonitor
from experiments.training.stopping import Stopped, StopSignal
from tfm.training import TrainState


class DivergedError(UserError):
    """The training has left the numbers."""


class Outcome(NamedTuple):
    """A finished training."""

    state: TrainState
    facts: dict[str, Any]
    """`steps`; `stopped_early`, whether patience ended it; `batches` drawn; `train_seconds` of all
    sittings; `state_sha256` of parameters, moments and the batches' position; `resumed_from`, the
    step that each sitting but the first began at."""


@dataclasses.dataclass
class _Record:
    """Tells what the steps did: on the screen, in the log, and to the checkpointer of the best."""

    folder: RunFolder
    checkpointer: Checkpointer
    processes: Processes
    monitor: StepMonitor
    meter: Meter
    log: MetricsLog | None
    display: Display
    learning_rate: Callable[[int], float]
    evaluate: Callable[[Any], Metrics]

    def steps(
        self,
        train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
        state: TrainState,
        batches: Batches,
        schedule: Schedule,
        asked_to_stop: Callable[[], int | None],
    ) -> TrainState:
        """Step after step, to the last or until the patience is used up."""
        stalled = self.stalls(schedule)
        while self.monitor.step < schedule.steps and not stalled:
            state, metrics = train_step(state, next(batches))
            self.monitor.add(metrics)
            step = self.monitor.reached
            stopping = asked_to_stop()  # once a step: a later signal can wait
            self.display.advance(step)
            due = schedule.due(step)
            # Else one step stays under way, so that the device need not wait for the host.
            self.skips(0 if due or stopping else 1, schedule.most_skipped)
            if self.monitor.step != step:
                due = set()  # a step was skipped, so this is not yet the one
            if due or stopping:  # evaluating and saving may take long
                self.processes.unwatch()
            stalled = self.settle(state, due, schedule, at_once=bool(stopping))
            if stopping:
                self.leave(stopping)
            self.processes.watch()  # after the first step, which compiles
        self.processes.unwatch()
        if stalled:
            told = f"evaluations without a lower validation loss: {schedule.patience}"
            self.display.say(f"stopped early at step {self.monitor.step}; {told}")
        return state

    def skips(self, pending: int, most: int) -> None:
        """Waits for all but `pending` steps; DivergedError at `most` skipped in a row."""
        for skipped in self.monitor.collect(self.meter, pending):
            self.display.say(f"{skipped}; no update was made")
            if self.log:
                self.log.write_skipped(dataclasses.asdict(skipped))
            if skipped.in_a_row == most:
                saved = self.checkpointer.wait()
                kept = (
                    f"the checkpoint of step {saved} is kept" if saved else "nothing was saved yet"
                )
                raise DivergedError(
                    f"{most} steps in a row made no update, at last {skipped}; {kept}. Begin "
                    "another run folder with a lower --learning-rate or more --warmup-steps"
                )

    def line(self, state: TrainState, evaluating: bool) -> None:
        """The figures since the last line, with those of an evaluation where one is due."""
        step = self.monitor.step
        line, status = self.meter.read()
        line |= {"step": step, "learning_rate": float(self.learning_rate(step - 1))}
        self.display.update(step, status)
        if evaluating:
            line |= self.evaluate(state.params)
            self.checkpointer.save_if_best(state, self.monitor, self.meter, line["valid_loss"])
            self.display.say(validation_line(line))
            self.meter.restart()  # evaluating is not training's speed
        if self.log:
            self.log.write(line)

    def settle(self, state: TrainState, due: set[str], schedule: Schedule, at_once: bool) -> bool:
        """Logs, evaluates and saves what is due; whether that has used up the patience."""
        if at_once:
            self.checkpointer.save(state, self.monitor, self.meter)  # evaluating may take long
        if "log" in due:
            self.line(state, "evaluate" in due)
        stalled = "evaluate" in due and self.stalls(schedule)
        if stalled or "save" in due:
            self.checkpointer.save(state, self.monitor, self.meter)
        return stalled

    def stalls(self, schedule: Schedule) -> bool:
        """Whether the patience is used up, by the log of process 0."""
        if schedule.patience is None:
            return False
        return self.processes.from_first(self.log and schedule.stalls(self.folder))

    def leave(self, signal: int) -> NoReturn:
        """Ends the process once all is saved."""
        self.checkpointer.wait()
        step = self.monitor.step
        self.display.say(f"stopped and saved at step {step}; the same command goes on")
        raise Stopped(128 + signal)


def train(
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    state: TrainState,
    batches: Batches,
    folder: RunFolder,
    schedule: Schedule,
    *,
    learning_rate: Callable[[int], float],
    evaluate: Callable[[Any], Metrics],
    identity: dict[str, Any],
    stop: StopSignal,
    agree: Callable[[int | None], int | None] = lambda signal: signal,
    on_host: Callable[[TrainState], TrainState] = lambda state: state,
    processes: Processes = Processes(),  # noqa: B008 (alone it has no state)
) -> Outcome:
    """Trains to `schedule.steps`, from the newest sound checkpoint where there is one.

    Args:
      train_step: as `tfm.skip_nonfinite` returns it.
      evaluate: params -> metrics, `valid_loss` among them.
      identity: what the run is (config, data); a checkpoint of another one is refused.
      stop: once it has received a signal, the step is finished and saved, and SystemExit raised.
      agree: makes of the signal of each process one for all, at the same step.
      on_host: the state whole, where this process can read it.
      processes: those that train together. The first logs and speaks, all save.

    Raises:
      RunFolderError: the checkpoint belongs to another run.
      CheckpointError: all that was saved is damaged, or a save failed.
      DivergedError: too many steps in a row without a finite loss and gradient.
    """
    with Checkpointer(folder, batches, identity, schedule.keep, processes) as checkpointer:
        state, notes = checkpointer.resume(state, stop.say)
        done = int(state.step)
        resumed_from = processes.from_first(
            folder.note_sitting(done) if processes.is_first else None
        )
        folder.check_shared()
        monitor = StepMonitor(done, notes["batches"], notes["in_a_row"])
        meter = Meter(notes["seconds"])
        log = MetricsLog(folder, done + 1, monitor.batches_consumed) if processes.is_first else None
        with (
            log or contextlib.nullcontext(),
            Display(schedule.steps, done, silent=not processes.is_first) as display,
        ):
            if processes.is_first:  # else it speaks for itself
                stop.say = display.say
            if done:
                display.say(f"resuming {folder.path} at step {done}")

            record = _Record(
                folder,
                checkpointer,
                processes,
                monitor,
                meter,
                log,
                display,
                learning_rate,
                evaluate,
            )
            state = record.steps(train_step, state, batches, schedule, lambda: agree(stop.received))
    facts = {
        "steps": monitor.step,
        "stopped_early": monitor.step < schedule.steps,
        "batches": monitor.batches_consumed,
        "train_seconds": meter.seconds,
        "state_sha256": state_sha256(on_host(state), batches.get_state()),
        "resumed_from": resumed_from,
    }
    return Outcome(state, facts)


def validation_line(line: Metrics) -> str:
    """`step 500  loss 0.912  valid_loss 0.321  …`"""
    figures = {"loss": line["loss"]} | {k: v for k, v in line.items() if k.startswith("valid_")}
    return f"step {line['step']}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items())
