"""Checkpoints on disk, with Orbax: the one room of `tfm` with a door to the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import orbax.checkpoint as ocp


class Checkpoints:
    """The numbered checkpoints of one folder; the newest `keep` stay.

    A checkpoint is a tree of arrays and a `notes` mapping of JSON values (the data iterator's
    position, say), written together: Orbax renames a finished step into place, so a step cut short
    is never taken for a whole one. Saves run in the background; `close` waits for them, and raises
    what went wrong. Use as a context manager.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: chex.ArrayTree, notes: Mapping[str, Any]) -> None:
        """Begins to save; the arrays are copied before it returns, so they may be donated."""
        if step != self.latest():
            items = {"tree": ocp.args.StandardSave(tree), "notes": ocp.args.JsonSave(dict(notes))}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: chex.ArrayTree) -> tuple[chex.ArrayTree, dict[str, Any]]:
        """(tree, notes) of `step`; `like` gives the structure, shapes and dtypes."""
        items = {"tree": ocp.args.StandardRestore(like), "notes": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["tree"], restored["notes"]

    def restore_params(self, step: int) -> chex.ArrayTree:
        """The `params` of the tree of `step`, as saved: nested dicts of arrays."""
        items = {"tree": ocp.args.StandardRestore()}
        return self._manager.restore(step, args=ocp.args.Composite(**items))["tree"]["params"]

    def close(self) -> None:
        """Waits for saves under way. Leaving the process without it would lose them silently."""
        self._manager.wait_until_finished()
        self._manager.close()
