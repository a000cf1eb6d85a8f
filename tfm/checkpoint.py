"""Checkpoints on disk, with Orbax: the one room of `tfm` with a door to the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import orbax.checkpoint as ocp

from tfm.training import TrainState


def _items(state: TrainState) -> dict[str, Any]:
    """The parameters apart, so that they can be read without the moments, twice their size."""
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {"params": state.params, "rest": rest}


def _on_first_device(like: chex.ArrayTree) -> chex.ArrayTree:
    """Where to restore to: without it Orbax looks for the devices that the saver had."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


class Checkpoints:
    """The numbered checkpoints of one folder; the newest `keep` stay.

    A checkpoint is a training state and a `notes` mapping of JSON values (the data iterator's
    position, say), written together: Orbax renames a finished step into place, so a step cut short
    is never taken for a whole one. Saves run in the background; `close` waits for them, and raises
    what went wrong. Use as a context manager.

    `read_only` makes no folder and removes nothing, so that a run can be looked at while it trains.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, read_only: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, notes: Mapping[str, Any]) -> None:
        """Begins to save; the arrays are copied before it returns, so they may be donated."""
        if step != self.latest():
            items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
            items["notes"] = ocp.args.JsonSave(dict(notes))
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, notes) of `step`; `like` gives the structure, shapes and dtypes."""
        items = {
            name: ocp.args.StandardRestore(_on_first_device(tree))
            for name, tree in _items(like).items()
        }
        items["notes"] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(params=restored["params"], **restored["rest"]), restored["notes"]

    def restore_params(self, step: int, like: chex.ArrayTree) -> chex.ArrayTree:
        """The parameters of `step` alone; `like` gives structure, shapes and dtypes."""
        items = {"params": ocp.args.StandardRestore(_on_first_device(like))}
        return self._manager.restore(step, args=ocp.args.Composite(**items))["params"]

    def close(self) -> None:
        """Waits for saves under way. Leaving the process without it would lose them silently."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()
