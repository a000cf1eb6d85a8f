"""Loads a predictor from a run folder, and writes one as a run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.checkpoints.run_folder import RunFolder, RunFolderError, named, plain
from experiments.checkpoints.trained import newest_model, write_final
from experiments.data.subwords import Subwords
from experiments.data.tokenizer import Symbols, Tokenizer
from experiments.data.vocabulary import Vocabulary
from experiments.inference.batches import SENTENCES, WORDS
from experiments.inference.ensemble import ensemble
from experiments.inference.predictor import Predictor, Settings
from experiments.inference.search import Mean
from tfm.kernels.quantization import quantize


def is_translation(folder: RunFolder) -> bool:
    """Whether the folder holds a translation run."""
    return (folder.read("config.json") or {}).get("task") == "translate"


def load(run: str | Path, int8: bool = False, functions: str | None = None) -> Predictor:
    """Loads the newest model of a run folder, of pronunciation or translation.

    `int8` holds its matrices in 8 bits. `functions` is the FILE:NAME that it was trained with. A
    damaged checkpoint is named on standard error, and the one before it is used.

    Raises:
      RunFolderError: no such run, nothing saved, or a vocabulary that the model was not trained
        with.
      SubwordError: a vocabulary that is missing or damaged.
      CheckpointError: all that was saved is damaged.
    """
    folder = RunFolder(Path(run))
    if folder.read("config.json") is None:
        raise RunFolderError(f"{run}: not the folder of a run (no config.json)")
    identity, model, params = newest_model(folder, functions)
    if "vocabularies" in identity:
        source, target = _symbols(identity["vocabularies"])
        names = ("source_length", "target_length", "beam", "alpha")
        settings, batching = {name: identity[name] for name in names}, WORDS
    else:
        source, target = _subwords(folder, identity["vocabulary_sha256"])
        settings, batching = identity["settings"], SENTENCES
    params = quantize(params) if int8 else params
    return Predictor(model, params, source, target, Settings(**settings), batching=batching)


def load_translation(run: str | Path, functions: str | None = None) -> Predictor:
    """As `load`; RunFolderError where the run is not one of translation."""
    if not is_translation(RunFolder(Path(run))):
        raise RunFolderError(f"{run}: not the folder of a translation run")
    return load(run, functions=functions)


def load_together(
    runs: Sequence[Path],
    int8: bool = False,
    mean: Mean | None = None,
    functions: str | None = None,
) -> Predictor:
    """Loads one or several run folders as one predictor; raises as `load` and `ensemble`."""
    members = [(str(run), load(run, int8, functions)) for run in runs]
    return ensemble(members, mean or "log_linear") if len(members) > 1 else members[0][1]


def _symbols(vocabularies: dict[str, Any]) -> tuple[Tokenizer, Tokenizer]:
    letters, phones = (Vocabulary.from_json(vocabularies[name]) for name in ("letters", "phones"))
    return Symbols(letters), Symbols(phones, spaced=True)


def _subwords(folder: RunFolder, sha256: dict[str, str]) -> tuple[Tokenizer, Tokenizer]:
    place = folder.path / "vocabulary"
    sides = {side: Subwords.load(place, side) for side in ("source", "target")}
    for side, subwords in sides.items():
        if subwords.sha256 != sha256[side]:
            raise RunFolderError(
                f"{place / side}.json: not the vocabulary that the model was trained with"
            )
    return sides["source"], sides["target"]


def write(run: str | Path, translator: Predictor, about: dict[str, str]) -> None:
    """Writes a run folder for a translation model of other origin, which `about` describes.

    Raises:
      ValueError: an ensemble, or a model in 8 bits.
      RunFolderError: the folder holds a model, or cannot be written.
      CheckpointError: the checkpoint cannot be written.
    """
    leaves = jax.tree.leaves(translator.params)
    if translator.others or any(leaf.dtype == jnp.int8 for leaf in leaves):
        raise ValueError("only a single model, and not one in 8 bits, can be written")
    folder = RunFolder(Path(run))
    sides = {"source": translator.source, "target": translator.target}
    identity = {
        "task": "translate",
        "model": plain(translator.model.config),
        "settings": plain(translator.settings),
        "vocabulary_sha256": {side: subwords.sha256 for side, subwords in sides.items()},
        "about": about,
    }

    def check() -> None:
        for place in (folder.final, folder.checkpoints):
            if place.exists():
                raise RunFolderError(f"{place}: there is a model already")

    with folder.claim(identity, (), check):
        with named(folder.path / "vocabulary"):
            for side, subwords in sides.items():
                subwords.save(folder.path / "vocabulary", side)
        # Not step 0, which means a training without an update.
        write_final(folder, translator.params, 1, identity)
