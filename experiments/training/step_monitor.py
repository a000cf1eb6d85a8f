"""Watches the steps: metrics of the updates, and which steps were skipped."""

import collections
import dataclasses
import math
import time
from typing import Any

import jax

Metrics = dict[str, float]


class Meter:
    """Losses, tokens and words since the last reading, and the seconds of the whole run."""

    def __init__(self, seconds_before: float) -> None:
        self._run_started = time.monotonic() - seconds_before
        self.restart()

    def restart(self) -> None:
        """Starts a new interval; the steps and seconds since the last reading are dropped."""
        self._started = time.monotonic()
        self._metrics: list[dict] = []

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those of earlier sittings included."""
        return time.monotonic() - self._run_started

    def add(self, metrics: dict) -> None:
        """Counts one step; does not wait for the device."""
        self._metrics.append(metrics)

    def read(self) -> tuple[Metrics, str]:
        """The means since the last reading, as metrics and as text; starts a new interval."""
        metrics = jax.device_get(self._metrics)  # waits for the device, before the clock
        elapsed = time.monotonic() - self._started
        tokens = sum(int(m["tokens"]) for m in metrics)
        loss = sum(float(m["loss"]) * int(m["tokens"]) for m in metrics) / tokens
        words_per_second = sum(int(m["sequences"]) for m in metrics) / elapsed
        self.restart()
        line = {
            "loss": loss,
            "tokens_per_second": tokens / elapsed,
            "words_per_second": words_per_second,
            "gradient_norm": float(metrics[-1]["gradient_norm"]),
            "seconds": self.seconds,
        }
        return line, f"loss {loss:.3f}  {words_per_second:,.0f} words/s"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A step that made no update: its number, its batch, and why."""

    step: int
    batch: int
    why: str
    consecutive_skips: int  # steps skipped since the last update, this one included

    def __str__(self) -> str:
        return f"step {self.step}, batch {self.batch}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """Its line of metrics.jsonl."""
        return {
            "step": self.step, "batch": self.batch, "why": self.why,
            "in_a_row": self.consecutive_skips,
        }  # fmt: skip


def _what_is_wrong(metrics: dict) -> str:
    names = ("loss", "gradient_norm", "largest_gradient")
    loss, norm, largest = (float(metrics[name]) for name in names)
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if math.isfinite(largest):
        return f"the gradient's norm overflows float32 (its largest element is {largest:.3g})"
    return f"the gradient's norm is {norm}"


class StepMonitor:
    """Counts and measures updates; reads each step's metrics once the device has computed them."""

    def __init__(self, step: int, notes: dict[str, Any]) -> None:
        self.step = step  # updates made
        self.batches_consumed = notes["batches"]  # batches drawn since the run began
        self.consecutive_skips = notes["in_a_row"]  # steps skipped since the last update
        self.meter = Meter(notes["seconds"])
        self._under_way: collections.deque[tuple[int, dict]] = collections.deque()

    def add(self, metrics: dict) -> None:
        """Adds the metrics of a dispatched step; does not wait for it."""
        self.batches_consumed += 1
        self._under_way.append((self.batches_consumed, metrics))

    @property
    def reached(self) -> int:
        """The step that the run is at if every pending step makes an update."""
        return self.step + len(self._under_way)

    def notes(self) -> dict[str, Any]:
        """The counters that a checkpoint keeps, to resume from."""
        return {
            "batches": self.batches_consumed,
            "in_a_row": self.consecutive_skips,
            "seconds": self.meter.seconds,
        }

    def collect(self, pending: int) -> list[Skipped]:
        """Waits for all but the newest `pending` steps; returns those that made no update."""
        skipped = []
        while len(self._under_way) > pending:
            number, metrics = self._under_way.popleft()
            if metrics["skipped"]:
                self.consecutive_skips += 1
                why = _what_is_wrong(metrics)
                skipped.append(Skipped(self.step + 1, number, why, self.consecutive_skips))
            else:
                self.step, self.consecutive_skips = self.step + 1, 0
                self.meter.add(metrics)
        return skipped
