"""The plan command: flags, and the printed plan."""

import dataclasses
import math
from typing import Any, Literal

import jax
from rich.console import Console

from experiments.errors import UserError
from experiments.plan import tables
from experiments.plan.chips import CHIPS
from experiments.plan.compiled import by_kind, compile_quickly, emitted
from experiments.plan.speed import Assumed
from experiments.plan.work import Work
from experiments.training.placement import divisible
from experiments.translate.config import configured
from tfm.config import TransformerConfig
from tfm.parallel.mesh import MeshConfig

ChipName = Literal["all", "A100-40GB", "A100-80GB", "H100", "H200", "L4", "TPU-v4", "TPU-v5e",
                   "TPU-v5p", "TPU-v6e"]  # fmt: skip
SMALL = 20_000_000
"""Most parameters of a model that is compiled by default."""
FEW = 16
"""Most devices for which it is compiled by default."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Say what a training would need and how fast it should be, without the devices.

    Each number has its formula; nothing is trained, and no device is looked for.
    """

    preset: Literal["small", "base", "big"] = "base"
    """What --model.* starts from, as in translate."""
    model: TransformerConfig = TransformerConfig()
    """The Transformer."""
    mesh: MeshConfig = MeshConfig(data=1)
    """The devices, as a training would be told of them."""
    rows: int = 192
    """Packed rows of a batch, on all devices; 192 of 128 positions are near the paper's 25k."""
    source_length: int = 128
    """Source positions of a row."""
    target_length: int = 128
    """Target positions of a row."""
    accumulation: int = 1
    """Micro-batches that a batch's rows are cut into."""
    steps: int = 100_000
    """Updates, whose time and cost are told."""
    chip: ChipName = "all"
    """For which chips."""
    price: float | None = None
    """Of a chip for an hour, in any currency. None: no cost is told."""
    assumed: Assumed = Assumed()
    """Which part of a chip's peaks is reached."""
    compile: bool = False
    """Compile the step for the CPU, and compare; small models on few devices are in any case."""

    def __post_init__(self) -> None:
        for name in ("rows", "source_length", "target_length", "accumulation", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"price={self.price} must be at least 0 and finite")

    @property
    def compiles(self) -> bool:
        """Whether the step is compiled."""
        devices = math.prod(self.mesh.sizes.values())
        return self.compile or self.model.parameter_count() <= SMALL and devices <= FEW


def defaults(preset: str) -> dict[str, Any]:
    """The defaults of a preset, which flags override."""
    chosen = configured(preset, "paper")
    return {name: chosen[name] for name in ("preset", "model", "steps")}


def work_of(config: PlanConfig) -> Work:
    """The step to plan, with its vocabulary padded for the mesh.

    Raises UserError where the mesh does not divide the model or the batch.
    """
    mesh = dataclasses.replace(config.mesh, data=config.mesh.data or 1)
    try:
        model = divisible(config.model.for_platform("gpu"), mesh)  # every chip is a GPU or a TPU
        return Work(model, mesh, config.rows, config.source_length, config.target_length,
                    config.accumulation)  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def compiled_on_cpu(work: Work) -> tables.OnCPU:
    """Compiles the step for simulated devices of this CPU.

    Raises UserError where JAX was already started with fewer devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", work.devices)
    except RuntimeError:  # JAX was already started, perhaps with enough devices
        pass
    try:
        program = compile_quickly(work)
    except ValueError as error:
        raise UserError(str(error)) from None
    used = program.memory_analysis()
    # With accumulation the collectives are in a loop, and would be counted once only.
    collectives = by_kind(emitted(program.as_text(), work)) if work.accumulation == 1 else None
    return tables.OnCPU(used.argument_size_in_bytes, used.temp_size_in_bytes, collectives)


def run(config: PlanConfig) -> None:
    """Prints the plan."""
    work = work_of(config)
    console = Console(width=tables.WIDTH, highlight=False)
    chips = list(CHIPS.values()) if config.chip == "all" else [CHIPS[config.chip]]
    on_cpu = compiled_on_cpu(work) if config.compiles else None
    for part in (
        tables.about(work, config.preset),
        tables.memory(work, on_cpu),
        tables.computing(work),
        tables.exchange(work, on_cpu),
        tables.chips(work, chips, config.assumed, config.steps, config.price),
        tables.assumptions(chips, config.assumed),
    ):
        console.print(part)
        console.print()
