"""The import and export commands: other libraries' models to run folders, and back."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.checkpoints.manifest import sha256
from experiments.checkpoints.run_folder import RunFolder
from experiments.data.subwords import Subwords
from experiments.data.subwords import read_model as read_sentencepiece
from experiments.errors import not_installed
from experiments.inference.predictor import Predictor, Settings
from experiments.inference.saved import load_translation, write
from experiments.interop.ctranslate2 import export_ctranslate2
from experiments.interop.files import (
    BridgeError,
    Folder,
    new_folder,
    opened,
    refuse_existing,
)
from experiments.interop.links import tree
from experiments.interop.marian import export_marian, import_marian
from experiments.interop.pieces import own_ids, pieces_of, read_ids
from experiments.interop.torch_transformer import TorchOptions
from experiments.interop.torch_transformer import read_model as read_torch
from tfm.model import Transformer

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.spm", "*.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """The vocabulary files of a torch model, as a state dict has none."""

    source_spm: Path | None = None
    """SentencePiece file of the source."""
    target_spm: Path | None = None
    """SentencePiece file of the target. None: the source's."""
    source_pieces: Path | None = None
    """JSON object of the source's pieces and their ids. None: the ids are the SentencePiece
    file's own."""
    target_pieces: Path | None = None
    """JSON object of the target's pieces and their ids."""
    length: int = 512
    """Most tokens of a sentence, on both sides; fewer where the file has fewer positions."""


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Takes over a trained model of another library, for `predict` and `translate --from`."""

    path: str
    """marian: a folder (or zip archive) with config.json, weights, SentencePiece files and
    vocab.json, or a name on the Hugging Face hub. torch: a state dict, .pt or .safetensors."""
    run: Path
    """Folder of the run to make; it must be new or empty."""
    format: Literal["marian", "torch"] = "marian"
    """What the model is."""
    torch: TorchOptions = TorchOptions()
    """What a state dict does not say of its model."""
    vocabulary: Vocabularies = Vocabularies()
    """The vocabularies of a torch model."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a trained translation model as another library wants it."""

    run: Path
    """Folder of a finished (or stopped) run of translate, or of an import."""
    path: Path
    """The folder to make; it must be new or empty."""
    format: Literal["marian", "ctranslate2"] = "marian"
    """marian: for Hugging Face's transformers. ctranslate2: for CTranslate2."""
    int8: bool = False
    """Of ctranslate2: hold matrices in 8 bits."""


def run_import(config: ImportConfig) -> None:
    """Writes the run folder, and prints a summary.

    Raises BridgeError, SubwordError or RunFolderError before anything is written.
    """
    refuse_existing(config.run)
    if config.format == "torch":
        path = Path(config.path)
        translator = _import_torch(path, config.torch, config.vocabulary)
        about = {"sha256": sha256(path)}
    else:
        with _folder(config.path) as folder:
            translator = import_marian(folder)
            about = {"sha256": sha256(folder.weights())}
    about |= {"imported_from": config.path, "format": config.format}
    write(config.run, translator, about)
    c = translator.model.config
    print(
        f"{config.run}: {c.parameter_count():,} parameters, {c.num_encoder_layers} + "
        f"{c.num_decoder_layers} layers, d_model {c.d_model}, vocabularies of "
        f"{translator.source.size:,} and {translator.target.size:,} pieces"
    )


def run_export(config: ExportConfig) -> None:
    """Writes the folder; on a BridgeError it leaves nothing behind."""
    if config.int8 and config.format != "ctranslate2":
        raise BridgeError("--int8 goes with --format ctranslate2 alone")
    refuse_existing(config.path)
    if (RunFolder(config.run).read("config.json") or {}).get("functions_of"):
        raise BridgeError(
            f"{config.run}: its model is made of functions of a user's, which {config.format} has "
            "no place for"
        )
    translator = load_translation(config.run)
    with new_folder(config.path) as folder:
        if config.format == "marian":
            export_marian(folder, translator)
        else:
            export_ctranslate2(folder, translator, config.int8)
    print(f"{config.path}: written from {config.run}")
    settings = translator.settings
    if settings.penalty == "paper" and settings.alpha:
        print(
            f"beam search there divides by n^α, not by the paper's ((5 + n)/6)^α: with "
            f"α = {settings.alpha} it may rank hypotheses of different lengths differently"
        )


@contextmanager
def _folder(path: str) -> Iterator[Folder]:
    """Opens the folder or archive at `path`, else downloads the model of that name from the hub."""
    if Path(path).exists() or not HUB_NAME.fullmatch(path):
        with opened(Path(path)) as folder:
            yield folder
        return
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BridgeError(
            f"{path}: no such folder, and the hub cannot be asked: "
            f"{not_installed('huggingface_hub')}"
        ) from None
    with tempfile.TemporaryDirectory() as place:
        try:
            snapshot_download(path, local_dir=place, allow_patterns=list(HUB_FILES))
        except Exception as error:  # errors of the network, the hub and the disk have many types
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise BridgeError(
                f"{path}: no such folder, and the hub did not give it ({reason})"
            ) from None
        yield Folder(Path(place))


def _import_torch(path: Path, options: TorchOptions, given: Vocabularies) -> Predictor:
    if given.source_spm is None:
        raise BridgeError(
            "a state dict has no vocabulary: name its SentencePiece file with "
            "--vocabulary.source-spm"
        )
    if not path.is_file():
        raise BridgeError(f"{path}: no such file")
    model = read_torch(path, options)
    o = options
    source_pieces = given.source_pieces
    target_spm = given.target_spm or given.source_spm
    target_pieces = given.target_pieces or (source_pieces if given.target_spm is None else None)
    target = _subwords(target_spm, target_pieces, model.target_order, o.bos, o.eos, o.unk)
    eos, unk = (
        ours if own is None else own for ours, own in ((o.eos, o.source_eos), (o.unk, o.source_unk))
    )
    pad = int(model.source_order[0])
    source = _subwords(given.source_spm, source_pieces, model.source_order, pad, eos, unk)
    length = min(given.length, model.positions or given.length)
    settings = Settings(source_length=length, target_length=length)
    return Predictor(
        Transformer(model.config), tree(model.arrays), source=source, target=target,
        settings=settings,
    )  # fmt: skip


def _subwords(
    spm: Path, pieces: Path | None, order: np.ndarray, bos: int, eos: int, unk: int
) -> Subwords:
    """A vocabulary by their ids `bos`, `eos`, `unk`; `order` is our id -> theirs."""
    model = read_sentencepiece(spm)
    ids = own_ids(model) if pieces is None else read_ids(Folder(pieces.parent), pieces.name)
    special = (order.tolist().index(i) for i in (bos, eos, unk))
    return Subwords(model, pieces_of(pieces or spm, ids, order), *special)
