"""The training loop: step, evaluate, log, checkpoint, stop. The only place with a clock."""

import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.errors import UserError
from experiments.run_folder import MetricsLog, RunFolder, RunFolderError
from tfm.checkpoint import Checkpoints
from tfm.training import TrainState

Metrics = dict[str, float]


class DivergedError(UserError):
    """The training has left the numbers."""


class Batches(Iterator, Protocol):
    """An endless iterator of batches whose position can be saved (Grain's)."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps a run does, and after how many it logs, evaluates and saves."""

    steps: int
    log_every: int
    evaluate_every: int
    save_every: int

    def due(self, step: int, every: int) -> bool:
        """Whether `step` (counted from 1) ends a period; the last always does."""
        return step == self.steps or step % every == 0


class StopSignal:
    """Remembers SIGINT and SIGTERM, so that the loop can finish its step and save."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)  # asked twice: at once; the newest finished checkpoint stays
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Display:
    """A progress bar on a terminal, a line now and then elsewhere; all on standard error."""

    SECONDS_BETWEEN_LINES = 30

    def __init__(self, steps: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"), TextColumn("time left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console, disable=not self._console.is_terminal, speed_estimate_period=120,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=steps, completed=done, status="compiling …")
        self._steps, self._first, self._started, self._printed = steps, done, time.monotonic(), 0.0

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Moves the bar; costs microseconds, so it may be called at every step."""
        self._progress.update(self._task, completed=step)

    def update(self, step: int, status: str) -> None:
        """Shows how the training goes; `status` is one line of figures."""
        self._progress.update(self._task, status=status)
        now = time.monotonic()
        if not self._progress.disable:
            return
        if now - self._printed > self.SECONDS_BETWEEN_LINES or step == self._steps:
            left = (now - self._started) / max(step - self._first, 1) * (self._steps - step)
            print(f"step {step}/{self._steps}  {status}  time left {left:.0f} s", file=sys.stderr)
            self._printed = now

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Meter:
    """Losses, tokens and words since the last reading, and the seconds of the whole run."""

    def __init__(self, seconds_before: float) -> None:
        self._run_started = time.monotonic() - seconds_before
        self.restart()

    def restart(self) -> None:
        """Begins a new reading: what passed since the last one is not counted."""
        self._started = time.monotonic()
        self._metrics: list[dict] = []
        self._words = 0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those of earlier sittings included."""
        return time.monotonic() - self._run_started

    def add(self, batch: dict, metrics: dict) -> None:
        """Counts one step; does not wait for the device."""
        self._metrics.append(metrics)
        # Segments number from 1 in each row, so the largest number is the count.
        self._words += int(batch["target_segment_ids"].max(axis=1).sum())

    def read(self) -> tuple[Metrics, str]:
        """The means since the last reading, as metrics and as a line of figures; starts anew."""
        metrics = jax.device_get(self._metrics)  # waits for the device, so the clock is honest
        elapsed = time.monotonic() - self._started
        tokens = sum(int(m["tokens"]) for m in metrics)
        loss = sum(float(m["loss"]) * int(m["tokens"]) for m in metrics) / tokens
        words_per_second = self._words / elapsed
        self.restart()
        line = {
            "loss": loss,
            "tokens_per_second": tokens / elapsed,
            "words_per_second": words_per_second,
            "gradient_norm": float(metrics[-1]["gradient_norm"]),
            "seconds": self.seconds,
        }
        return line, f"loss {loss:.3f}  {words_per_second:,.0f} words/s"


def _notes(batches: Batches, meter: Meter, fingerprint: str) -> dict[str, Any]:
    return {"data": batches.get_state(), "seconds": meter.seconds, "fingerprint": fingerprint}


def _resume(
    checkpoints: Checkpoints, state: TrainState, batches: Batches, fingerprint: str
) -> tuple[TrainState, float]:
    """The newest checkpoint's state and seconds, with `batches` set to its position."""
    step = checkpoints.latest()
    if step is None:
        return state, 0.0
    state, notes = checkpoints.restore(step, state)
    if notes["fingerprint"] != fingerprint:
        # The iterator's state is only a position: on other data it would resume without complaint.
        raise RunFolderError("the training data differs from what the checkpoint was trained on")
    batches.set_state(notes["data"])
    return state, notes["seconds"]


def _check_finite(step: int, metrics: dict, saved: int | None) -> None:
    """Raises DivergedError where a step's loss or gradient is no number.

    Asked before a step is logged or saved: a broken state must not push out a sound one.
    """
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(value := float(metrics[name])):
            kept = f"the checkpoint of step {saved} is kept" if saved else "nothing was saved yet"
            raise DivergedError(
                f"step {step}: {name} is {value}; {kept}. Begin another run folder with a lower "
                "--learning-rate or more --warmup-steps"
            )


def train(
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    state: TrainState,
    batches: Batches,
    folder: RunFolder,
    schedule: Schedule,
    *,
    learning_rate: Callable[[int], float],
    evaluate: Callable[[Any], Metrics],
    fingerprint: str,
) -> tuple[TrainState, float]:
    """Trains to `schedule.steps`, from the newest checkpoint where there is one.

    SIGINT or SIGTERM finishes the step, saves and leaves with 130 or 143.

    Returns:
      the final state, and the seconds spent, those of earlier sittings included.

    Raises:
      RunFolderError: the checkpoint belongs to other data.
      DivergedError: a loss or gradient that is not finite.
    """
    with StopSignal() as stop, Checkpoints(folder.checkpoints) as checkpoints:
        state, seconds = _resume(checkpoints, state, batches, fingerprint)
        done, meter = int(state.step), Meter(seconds)
        with MetricsLog(folder, done + 1) as log, Display(schedule.steps, done) as display:
            if done:
                display.say(f"resuming {folder.path} at step {done}")
            for step in range(done + 1, schedule.steps + 1):
                batch = next(batches)
                state, metrics = train_step(state, batch)
                meter.add(batch, metrics)
                display.advance(step)
                evaluating = schedule.due(step, schedule.evaluate_every)
                if evaluating or step == 1 or schedule.due(step, schedule.log_every):
                    _check_finite(step, metrics, checkpoints.latest())
                    line, status = meter.read()
                    line |= {"step": step, "learning_rate": float(learning_rate(step - 1))}
                    display.update(step, status)
                    if evaluating:
                        line |= evaluate(state.params)
                        display.say(validation_line(line))
                        meter.restart()  # evaluating is not training's speed
                    log.write(line)
                stopping = stop.received  # read once: a signal between save and exit can wait
                if stopping or schedule.due(step, schedule.save_every):
                    _check_finite(step, metrics, checkpoints.latest())
                    checkpoints.save(step, state, _notes(batches, meter, fingerprint))
                if stopping:
                    checkpoints.close()
                    display.say(f"stopped and saved at step {step}; the same command goes on")
                    break
    if stop.received:
        sys.exit(128 + stop.received)
    return state, meter.seconds


def validation_line(line: Metrics) -> str:
    """`step 500  loss 0.912  valid_loss 0.321  …`"""
    figures = {"loss": line["loss"]} | {k: v for k, v in line.items() if k.startswith("valid_")}
    return f"step {line['step']}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items())
