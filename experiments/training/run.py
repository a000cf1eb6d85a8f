"""One run, resolved: its flags, what it is known by, and where it is trained."""

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
    """A run: resolved once, then handed on as it is."""

    config: TrainingConfig
    identity: dict[str, Any]
    """What its checkpoints are known by, as `make_identity` returns it."""
    layout: Layout
    """The devices that share it."""
    processes: Processes
    """Those that train it together."""
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What config.json says beside the flags: of the data and of files, by their SHA-256."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run)

    @property
    def record(self) -> dict[str, Any]:
        """What config.json says."""
        return plain(self.config) | self.inputs

    @property
    def model(self) -> Transformer:
        return make_model(self.config.model, self.config.functions)


def make_identity(
    config: TrainingConfig, inputs: dict[str, Any], may_differ: Collection[str], **data: Any
) -> dict[str, Any]:
    """The config and inputs but for the fields that may differ, and the data, as JSON reads them.

    A checkpoint of another identity is refused.
    """
    record = plain(config) | inputs
    kept = {name: value for name, value in record.items() if name not in may_differ}
    return json.loads(json.dumps(kept | data))
