"""The parts that are measured on an accelerator, and their shares of the time."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UserError


class DeviceError(UserError):
    """Nothing can be measured as asked; the message says why."""


class Part(NamedTuple):
    """A part, as modules of this package that run one after another."""

    modules: tuple[str, ...]
    """Each runs in a process of its own: PyTorch's only when JAX has left the accelerator."""
    share: float
    """Of the time: seconds of the default budget."""
    least: float = 0.0
    """Seconds that it may take whatever its share is."""


CEILINGS = Part(("ceilings",), 25, least=90)
"""Measured always, and first: the other parts are set beside it. The first process also reads the
accelerator's libraries from a cold disk."""

PARTS = {
    "agreement": Part(("agreement",), 100),
    "canaries": Part(("canaries",), 20),
    "steps": Part(("steps", "torch_steps"), 195),
    "attention": Part(("attention", "torch_attention"), 40),
    "decoding": Part(("decoding",), 40),
    "trainings": Part(("trainings",), 0),
}
"""By name, the most valuable first. `trainings` has what the others leave."""


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Measure this library on the accelerator at hand, within a budget of minutes.

    First the ceilings of the card: a large matrix product, a large copy. Then, part by part:
    agreement (accelerator against CPU), canaries (faults upstream), steps (training steps of BASE
    and BIG, PyTorch's beside them), attention, decoding, and where time is left trainings (whole
    runs of `pronounce`). A part that fails or takes too long is told in one line, and the others
    run. Exit code 1: results do not agree.
    """

    run: Path = Path("runs/device")
    """Folder of device.json, rows.jsonl, log.txt and the profiles; what an earlier call left there
    is overwritten."""
    minutes: float = 7.0
    """For everything; a part takes its share of what is left."""
    parts: str = ",".join(PARTS)
    """Measure these alone, with commas between."""
    tiny: bool = False
    """The same at a tiny size on the CPU: whether it runs at all. Its times mean nothing."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise DeviceError(f"minutes={self.minutes} must be positive and finite")

    def chosen(self) -> dict[str, Part]:
        """The parts to run, in their order; DeviceError lists the known ones where one is not."""
        wanted = [name.strip() for name in self.parts.split(",") if name.strip()]
        for name in wanted:
            if name not in PARTS:
                raise DeviceError(f"no part {name!r}; there are {', '.join(PARTS)}")
        if not wanted:
            raise DeviceError(f"no part is named; there are {', '.join(PARTS)}")
        return {name: part for name, part in PARTS.items() if name in wanted}
