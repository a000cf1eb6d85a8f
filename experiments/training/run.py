"""One resolved run: its flags, its identity, and its devices and processes."""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from experiments.checkpoints.run_folder import RunFolder, plain
from experiments.distributed.processes import Processes
from experiments.functions import make_model
from experiments.training.config import TrainingConfig
from experiments.training.placement import Layout
from tfm.model import Transformer


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: resolved once, then passed on unchanged."""

    config: TrainingConfig
    identity: dict[str, Any]
    """What a checkpoint must match to be resumed: see `make_identity`."""
    layout: Layout
    """The placement on devices."""
    processes: Processes
    """The processes that train it."""
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of config.json beside the flags: the SHA-256 of the data and of files."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run)

    @property
    def record(self) -> dict[str, Any]:
        """The content of config.json."""
        return plain(self.config) | self.inputs

    @property
    def model(self) -> Transformer:
        return make_model(self.config.model, self.config.functions)


def make_identity(
    config: TrainingConfig, inputs: dict[str, Any], may_differ: Collection[str], **data: Any
) -> dict[str, Any]:
    """The config without the fields that may differ, the inputs and the data, as JSON values.

    A checkpoint with another identity is refused.
    """
    record = plain(config) | inputs
    kept = {name: value for name, value in record.items() if name not in may_differ}
    return json.loads(json.dumps(kept | data))
