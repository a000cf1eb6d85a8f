"""A roofline model: the time of a step on a chip, and the number of rows that fit its memory."""

import dataclasses
from typing import NamedTuple

from experiments.plan.chips import Chip
from experiments.plan.memory import (
    GPU,
    TPU,
    Habits,
    activation_bytes,
    loss_bytes,
    temporary_bytes,
)
from experiments.plan.traffic import collectives, products
from experiments.plan.work import Work, argument_bytes, parameter_bytes


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Which part of a chip's peaks a training reaches."""

    products: float = 0.5
    """Of the peak FLOP/s, in matrix products."""
    link: float = 0.7
    """Of the link's bytes/s."""
    memory: float = 0.9
    """Of the memory's bytes: the rest is the runtime's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be in (0, 1]")


class Times(NamedTuple):
    """Seconds of a step."""

    passes: float
    """max(FLOPs / (devices · reached FLOP/s), 2 · kept activations / memory bytes/s)"""
    optimizer: float
    """8 · bytes of the parameters / memory bytes/s: p, g, m, v read, p, m, v written, and g read
    once more for its norm"""
    exchange: float
    """bytes sent / (link · reached share)"""
    exposed: float
    """The communication that is not overlapped: all sums over tensor; of gradients and gathered
    parameters, what takes longer than the backward pass (⅔ of the passes)"""

    @property
    def step(self) -> float:
        return self.passes + self.optimizer + self.exposed


def habits_on(chip: Chip) -> Habits:
    return GPU if chip.platform == "cuda" else TPU


def times(work: Work, chip: Chip, assumed: Assumed) -> Times:
    """The expected times of a step on such chips, all connected by their links."""
    peak = chip.bfloat16 if work.model.compute_dtype == "bfloat16" else chip.float32
    computing = products(work).step / (work.devices * peak * assumed.products)
    kept = activation_bytes(work, habits_on(chip)) + loss_bytes(work)
    passes = max(computing, 2 * work.accumulation * kept / chip.bandwidth)
    rate = chip.link * assumed.link
    sent = collectives(work)
    beside = sum(c.sent(work) for c in sent if c.overlaps) / rate
    alone = sum(c.sent(work) for c in sent if not c.overlaps) / rate
    exposed = alone + max(0.0, beside - passes * 2 / 3)
    optimizer = 8 * parameter_bytes(work) / chip.bandwidth
    return Times(passes, optimizer, alone + beside, exposed)


def needed_bytes(work: Work, habits: Habits) -> int:
    """Peak bytes of one device: a step's arguments and temporaries."""
    return argument_bytes(work) + temporary_bytes(work, habits)


def most_rows(work: Work, chip: Chip, assumed: Assumed) -> int:
    """The largest batch, in rows, whose bytes fit the usable share of the memory.

    0: not even one row per device and micro-batch fits.
    """
    unit = work.accumulation * work.mesh.parts("batch")
    most = assumed.memory * chip.memory

    def fits(units: int) -> bool:
        larger = dataclasses.replace(work, rows=units * unit)
        return needed_bytes(larger, habits_on(chip)) <= most

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit
