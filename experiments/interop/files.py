"""Reads untrusted model files: never outside their folder, and without unpickling."""

import contextlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

from experiments.checkpoints.run_folder import named
from experiments.errors import UserError, not_installed

Tensors = dict[str, np.ndarray]
SHOWN = 3  # names in a message
LARGEST_JSON = 1 << 28


class BridgeError(UserError):
    """A model cannot be imported or exported; the message says why."""


def leaves_folder(name: str) -> bool:
    """Whether a relative name leads out of its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not name or path.is_absolute() or ".." in path.parts


def named_few(names: list[str]) -> str:
    """The first few of `names`, and the number of others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class Folder:
    """The files of one model. Links and names that lead out of the folder are refused."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise BridgeError(f"{root}: not a folder")
        self.root = root
        home = root.resolve()
        # The hub's cache keeps a model's files beside its snapshots, which are folders of links.
        self._home = home.parent.parent if home.parent.name == "snapshots" else home

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def file(self, name: str) -> Path:
        """The path of a file; BridgeError where it is missing or lies outside."""
        path = self.root / name
        if leaves_folder(name) or not path.resolve().is_relative_to(self._home):
            raise BridgeError(f"{self.root}: {name!r} points outside the folder")
        if not path.is_file():
            raise BridgeError(f"{path}: missing")
        return path

    def bytes(self, name: str) -> bytes:
        path = self.file(name)
        with named(path):
            return path.read_bytes()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; BridgeError naming the file where it is not one."""
        path = self.file(name)
        try:
            with named(path):
                if path.stat().st_size > LARGEST_JSON:
                    raise ValueError(f"larger than {LARGEST_JSON} bytes")
                value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise BridgeError(f"{path}: {error}") from None
        return value

    def optional_json(self, name: str) -> dict[str, Any]:
        """The JSON object of a file, empty where there is no such file."""
        return self.json(name) if self.has(name) else {}

    def weights(self) -> Path:
        """The file of the weights: safetensors, whole or (its index) in shards, or torch's own."""
        names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        for name in names:
            if self.has(name):
                return self.file(name)
        raise BridgeError(f"{self.root}: no weights ({', '.join(names)})")

    def tensors(self) -> Tensors:
        """The weights by name."""
        path = self.weights()
        return self._shards(path.name) if path.suffix == ".json" else read_tensors(path)

    def _shards(self, index: str) -> Tensors:
        where = self.json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise BridgeError(f"{self.root / index}: no weight_map of names to files")
        tensors: Tensors = {}
        for name in sorted(set(where.values())):
            tensors |= read_tensors(self.file(name))
        if missing := sorted(where.keys() - tensors.keys()):
            raise BridgeError(f"{self.root / index}: {named_few(missing)}: in none of its files")
        return tensors


def read_tensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file, or of a file that torch saved.

    The latter needs torch, which reads it with weights_only=True, so that no code of it runs.
    """
    if path.suffix == ".safetensors":
        try:
            with named(path):
                arrays = load_file(path)
        except SafetensorError as error:
            raise BridgeError(f"{path}: not a safetensors file ({error})") from None
        return {name: np.asarray(array) for name, array in jax.device_get(arrays).items()}
    return _read_torch(path)


def _read_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise BridgeError(
            f"{path}: {not_installed('torch')}; a .safetensors file needs none"
        ) from None
    try:
        with named(path):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for an invalid file
        reason = str(error).strip().split("\n")[0]
        raise BridgeError(f"{path}: not a file of tensors alone ({reason})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(isinstance(t, torch.Tensor) for t in saved.values()):
        raise BridgeError(f"{path}: not a state dict (names with a tensor each)")
    return {str(n): (t.float() if t.is_floating_point() else t).numpy() for n, t in saved.items()}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """Opens the folder at `path`, or a zip archive there, extracted to a temporary folder.

    Raises BridgeError, before anything is written, for an archive with a link or with a member that
    would land outside.
    """
    if not zipfile.is_zipfile(path):
        yield Folder(path)
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            with named(path), zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    link = (member.external_attr >> 16) & 0o170000 == 0o120000
                    if link or leaves_folder(member.filename):
                        raise BridgeError(f"{path}: {member.filename!r} points outside the folder")
                archive.extractall(place)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise BridgeError(f"{path}: {error}") from None
        inside = list(Path(place).iterdir())
        lone = len(inside) == 1 and inside[0].is_dir()
        yield Folder(inside[0] if lone else Path(place))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `path` at the end.

    Raises BridgeError where `path` exists and is not an empty folder.
    """
    refuse_existing(path)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as place:
            filled = Path(place) / "filled"
            filled.mkdir()
            yield filled
            filled.replace(path)


def refuse_existing(path: Path) -> None:
    """Raises BridgeError where writing a folder at `path` would overwrite something."""
    with named(path):
        there = path.is_symlink() or path.exists()
        if there and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
            raise BridgeError(f"{path}: there already, and not an empty folder")
