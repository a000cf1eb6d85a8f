"""What a run has saved: whether it can be resumed, and its newest model."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, changes
from experiments.functions import check_recorded, make_model
from tfm.config import TransformerConfig, current_fields
from tfm.model import Transformer
from tfm.parallel.mesh import fit_vocabulary
from tfm.training import TrainState, param_shapes


def check_identity(path: Path, notes: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises RunFolderError where the checkpoint at `path` was trained as another run.

    Without this check the position of the batches would silently be applied to other data.
    """
    if differing := changes(notes["identity"], identity):
        raise RunFolderError(
            f"{path} belongs to another run ({'; '.join(differing)}): "
            "name another folder with --run"
        )


def check_newest(folder: RunFolder, steps: int, identity: dict[str, Any]) -> None:
    """Called before anything is written: raises RunFolderError where the newest checkpoint belongs
    to another run, is beyond `steps`, or is gone."""
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
    """The identity, model and parameters of a run's final model, or of its newest checkpoint.

    functions: the FILE:NAME that the run was trained with; the copy in the folder is never run.

    A damaged checkpoint is named on standard error, and the one before it is used. Where a training
    removes a checkpoint while it is read, the newer one is taken.

    Raises RunFolderError where nothing is saved; CheckpointError where all of it is damaged;
    FunctionsError where it was trained with other functions.
    """
    for place in (folder.final, folder.checkpoints):
        if not place.is_dir():
            continue
        with Checkpoints(place, read_only=True) as checkpoints:
            step, faults = checkpoints.newest()
            for line in faults:
                print(line, file=sys.stderr)
            while step:  # 0: saved before the first update
                try:
                    return _model_at(step, checkpoints, folder, functions)
                except CheckpointError:
                    newer, _ = checkpoints.newest()
                    if newer == step:
                        raise
                    step = newer
    raise RunFolderError(f"{folder.checkpoints}: no checkpoint; was the run interrupted?")


def _model_at(
    step: int, checkpoints: Checkpoints, folder: RunFolder, functions: str | None
) -> tuple[dict[str, Any], Transformer, chex.ArrayTree]:
    """What `newest_model` returns, of one step."""
    identity = checkpoints.notes(step)["identity"]
    check_recorded(folder.path, identity.get("functions_of"), functions)
    trained = TransformerConfig(**current_fields(identity["model"]))
    model = make_model(trained, functions)
    params = checkpoints.restore_params(step, param_shapes(trained, model.functions))
    # Without the rows that padded the vocabulary for a mesh.
    config = dataclasses.replace(trained, vocab_multiple=1)
    return identity, Transformer(config, model.functions), fit_vocabulary(params, config)


def without_moments(params: chex.ArrayTree, step: int) -> TrainState:
    """A state of parameters alone, for a checkpoint that no training resumes from."""
    return TrainState(jnp.int32(step), params, {}, jax.random.PRNGKey(0))


def write_final(
    folder: RunFolder, params: chex.ArrayTree, step: int, identity: dict[str, Any]
) -> None:
    """Writes the final model of a run, in the place of an earlier one.

    Raises CheckpointError where it cannot be written.
    """
    shutil.rmtree(folder.final, ignore_errors=True)
    with Checkpoints(folder.final) as checkpoints:
        state = jax.device_get(without_moments(params, step))
        checkpoints.save(step, state, {"identity": identity})
