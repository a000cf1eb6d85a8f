"""The training loop: step, log, evaluate, save, stop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex

from experiments.checkpoints.checkpoint import state_sha256
from experiments.errors import UserError
from experiments.training.checkpointer import Batches
from experiments.training.recorder import Recorder, begin_sitting
from experiments.training.run import Run
from experiments.training.step_monitor import Metrics, Skipped, StepMonitor
from experiments.training.stopping import StopSignal
from tfm.training import Batch, TrainState


class DivergedError(UserError):
    """Too many consecutive steps had no finite loss and gradient."""


class Learner(NamedTuple):
    """What the loop trains."""

    state: TrainState
    """The initial state."""
    step: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    """As `tfm.skip_nonfinite` returns it."""
    evaluate: Callable[[chex.ArrayTree], Metrics]
    """params -> metrics, `valid_loss` among them."""


class Outcome(NamedTuple):
    """A finished training."""

    state: TrainState
    facts: dict[str, Any]
    """`steps`; `stopped_early`, whether patience ended it; `batches` drawn; `train_seconds` of all
    sittings; `state_sha256` of parameters, moments and the batches' position; `resumed_from`, the
    step that each sitting but the first began at."""


def train(run: Run, learner: Learner, batches: Batches, stop: StopSignal) -> Outcome:
    """Trains from the newest sound checkpoint to the last step, or until the patience is used up.

    Raises:
      RunFolderError: the checkpoint belongs to another run.
      CheckpointError: all that was saved is damaged, or a save failed.
      DivergedError: too many steps in a row without a finite loss and gradient.
      Stopped: `stop` of a process received a signal, and all have saved after the same step.
    """
    config, processes, agree = run.config, run.processes, run.layout.agreement()
    with begin_sitting(run, learner.state, batches, stop) as (state, monitor, recorder):
        stalled = recorder.stalls()
        while monitor.step < config.steps and not stalled:
            state, metrics = learner.step(state, next(batches))
            monitor.add(metrics)
            step = monitor.reached
            signal = agree(stop.received)  # read once a step, for one decision
            recorder.display.reached(step)
            due = config.due(step)
            # Otherwise one step stays pending, so that the device need not wait for the host.
            check_skips(monitor.collect(0 if due or signal else 1), recorder, config.most_skipped)
            if monitor.step != step:
                due = set()  # a step was skipped: the due step is not reached yet
            if due or signal:
                processes.unwatch()  # evaluating and saving may take long
            if signal:
                recorder.save(state)  # first: evaluating may take longer than there is time
            if "log" in due:
                line = recorder.figures()
                if "evaluate" in due:
                    recorder.display.now("evaluating")
                    line |= learner.evaluate(state.params)
                    recorder.evaluated(state, line)
                recorder.log(line)
            stalled = "evaluate" in due and recorder.stalls()
            if stalled or "save" in due:
                recorder.save(state)
            if signal:
                recorder.leave(signal)
            processes.watch()  # after the first step, which compiles
        processes.unwatch()
        if stalled:
            recorder.display.say(
                f"stopped early at step {monitor.step}; evaluations without a lower validation "
                f"loss: {config.patience}"
            )
    return Outcome(state, facts_of(run, state, monitor, batches))


def facts_of(run: Run, state: TrainState, monitor: StepMonitor, batches: Batches) -> dict[str, Any]:
    """What an `Outcome` says of the training."""
    return {
        "steps": monitor.step,
        "stopped_early": monitor.step < run.config.steps,
        "batches": monitor.batches_consumed,
        "train_seconds": monitor.meter.seconds,
        "state_sha256": state_sha256(run.layout.on_host(state), batches.get_state()),
        "resumed_from": run.folder.sittings(),
    }


def check_skips(skips: list[Skipped], recorder: Recorder, most: int) -> None:
    """Reports the steps that made no update; DivergedError at `most` in a row."""
    for skipped in skips:
        recorder.skipped(skipped)
        if skipped.consecutive_skips == most:
            saved = recorder.wait()
            kept = f"the checkpoint of step {saved} is kept" if saved else "nothing was saved yet"
            raise DivergedError(
                f"{most} steps in a row made no update, at last {skipped}; {kept}. Begin "
                "another run folder with a lower --learning-rate or more --warmup-steps"
            )
