"""What a run has saved: whether it can go on, and the model that it has come to."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from experiments.checkpoints.checkpoint import Checkpoints
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, changes
from experiments.functions import check_recorded, make_model
from tfm.config import TransformerConfig, current_fields
from tfm.model import Transformer
from tfm.parallel.mesh import fit_vocabulary
from tfm.training import TrainState, param_shapes


def check_identity(path: Path, notes: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises RunFolderError where the checkpoint at `path` was trained as another run.

    The position of the batches is only a number: other data would be gone through all the same.
    """
    if differing := changes(notes["identity"], identity):
        raise RunFolderError(
            f"{path} belongs to another run ({'; '.join(differing)}): "
            "name another folder with --run"
        )


def check_newest(folder: RunFolder, steps: int, identity: dict[str, Any]) -> None:
    """Before anything is written: RunFolderError where the run cannot go on so, since its newest
    checkpoint is another run's, is beyond `steps`, or is gone."""
    step = None
    if folder.checkpoints.is_dir():
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            step, _ = checkpoints.newest()
            if step is not None:
                check_identity(folder.checkpoints / str(step), checkpoints.notes(step), identity)
            if step is not None and step > steps:
                raise RunFolderError(f"{folder.path} is at step {step}, beyond --steps {steps}")
    finished = (folder.read("results.json") or {}).get("steps", 0)
    before = max(finished, *folder.sittings(), 0)
    if step is None and before and finished != steps:
        raise RunFolderError(
            f"{folder.checkpoints}: its checkpoints are gone, though the run was at step {before}: "
            "put them back, or name another folder with --run"
        )


def newest_model(
    folder: RunFolder, functions: str | None = None
) -> tuple[dict[str, Any], Transformer, chex.ArrayTree]:
    """The identity, model and parameters that a run ended with, or of its newest checkpoint.

    functions: the FILE:NAME of those that it was trained with; of a folder none is ever run.

    A damaged checkpoint is named on standard error, and the one before it taken.

    Raises RunFolderError where nothing is saved; CheckpointError where all of it is damaged;
    FunctionsError where it was trained with other functions.
    """
    for place in (folder.final, folder.checkpoints):
        if not place.is_dir():
            continue
        with Checkpoints(place, read_only=True) as checkpoints:
            step, found = checkpoints.newest()
            for line in found:
                print(line, file=sys.stderr)
            if not step:  # 0: saved before anything was learned
                continue
            identity = checkpoints.notes(step)["identity"]
            check_recorded(folder.path, identity.get("functions_of"), functions)
            trained = TransformerConfig(**current_fields(identity["model"]))
            model = make_model(trained, functions)
            params = checkpoints.restore_params(step, param_shapes(trained, model.functions))
            # Rows that only a mesh needed are left out.
            config = dataclasses.replace(trained, vocab_multiple=1)
            model = Transformer(config, model.functions)
            return identity, model, fit_vocabulary(params, config)
    raise RunFolderError(f"{folder.checkpoints}: no checkpoint; was the run interrupted?")


def without_moments(params: chex.ArrayTree, step: int) -> TrainState:
    """Parameters as a checkpoint holds them, where there is nothing to go on training from."""
    return TrainState(jnp.int32(step), params, {}, jax.random.PRNGKey(0))


def write_final(
    folder: RunFolder, params: chex.ArrayTree, step: int, identity: dict[str, Any]
) -> None:
    """Writes the model that a run ends with; one that is there already goes.

    Raises CheckpointError where it cannot be written.
    """
    shutil.rmtree(folder.final, ignore_errors=True)
    with Checkpoints(folder.final) as checkpoints:
        state = jax.device_get(without_moments(params, step))
        checkpoints.save(step, state, {"identity": identity})
