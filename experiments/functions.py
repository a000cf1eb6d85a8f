"""--functions FILE:NAME: a user's functions and modules that replace the model's."""

import contextlib
import functools
import hashlib
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.checkpoints.differences import differences
from experiments.checkpoints.manifest import write_durably
from experiments.checkpoints.run_folder import RunFolder
from experiments.errors import UserError
from tfm.config import TransformerConfig
from tfm.functions import Functions
from tfm.model import Transformer
from tfm.training import param_shapes

COPY = "functions.py"
"""Name of the copy of the file in a run folder."""


class FunctionsError(UserError):
    """A file's functions cannot replace the model's; the message says why."""


class Loaded(NamedTuple):
    """The functions of a file, and its identity."""

    functions: Functions
    name: str
    source: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()


@functools.cache  # so that a run keeps its objects if the file changes
def load_functions(given: str) -> Loaded:
    """The `tfm.Functions` that FILE:NAME names. The file is run as a module of its own.

    Raises FunctionsError: no such file or name, another kind of object, or an error in the file,
      with its line.
    """
    file, colon, name = given.rpartition(":")
    if not colon or not name.isidentifier():
        raise FunctionsError(f"--functions {given}: write FILE:NAME, as my.py:MINE")
    path = Path(file)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise FunctionsError(f"{path}: {error.strerror or error}") from None
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    with _told_by_line(path), _without_files_beside():
        exec(compile(source, str(path), "exec"), vars(module))
    there = [n for n, value in vars(module).items() if isinstance(value, Functions)]
    if name not in there:
        has = ", ".join(there) or "none"
        value = getattr(module, name, None)
        kind = "" if value is None else f", and {name} is {value!r:.60}"
        raise FunctionsError(f"{path}: no tfm.Functions is named {name}; there is {has}{kind}")
    return Loaded(getattr(module, name), name, source)


@contextlib.contextmanager
def _without_files_beside() -> Iterator[None]:
    """Removes the working folder from sys.path, since the SHA-256 of modules there is not kept."""
    before, here = sys.path, os.path.realpath(".")
    sys.path = [place for place in before if os.path.realpath(place) != here]
    try:
        yield
    finally:
        sys.path = before


@contextlib.contextmanager
def _told_by_line(path: Path) -> Iterator[None]:
    """Turns an error in the user's file into one line that names it and the line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        at = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = path if at is None else f"{path}, line {at}"
        message = str(error).split("\n")[0]
        if isinstance(error, ModuleNotFoundError):
            message += f" is installed; what is yours must stand in {path.name} itself"
        raise FunctionsError(f"{where}: {type(error).__name__}: {message}") from None


def make_model(config: TransformerConfig, functions: str | None) -> Transformer:
    """The model of a config, with the functions of FILE:NAME.

    Raises FunctionsError as `load_functions`, or where they do not fit the model, with the layer.
    """
    if functions is None:
        return Transformer(config)
    loaded = load_functions(functions)
    with _told_by_line(Path(functions.rpartition(":")[0])):
        param_shapes(config, loaded.functions)
    return Transformer(config, loaded.functions)


def identity_of(functions: str | None) -> dict[str, Any]:
    """The entry of FILE:NAME in config.json: its name, and the SHA-256 of the file."""
    if functions is None:
        return {}
    loaded = load_functions(functions)
    return {"functions_of": {"name": loaded.name, "sha256": loaded.sha256}}


def check_recorded(place: Path, recorded: dict[str, Any] | None, functions: str | None) -> None:
    """Raises FunctionsError where a saved model was trained with other functions than FILE:NAME."""
    given = identity_of(functions).get("functions_of")
    kept = place / COPY
    if recorded is not None and given is None:
        copy = f" (a copy is {kept})" if kept.exists() else ""
        raise FunctionsError(
            f"{place}: its model is made of {recorded['name']} of a file with the SHA-256 "
            f"{recorded['sha256']}{copy}: give it with --functions FILE:{recorded['name']} (in "
            f"Python, load(…, functions='FILE:{recorded['name']}'))"
        )
    if differing := differences(recorded or {}, given or {}):
        changed = recorded is not None and recorded["sha256"] != given["sha256"]
        back = f": the file is another now; that of then is {kept}" if changed else ""
        raise FunctionsError(
            f"{place}: its model was not trained with --functions {functions} "
            f"({'; '.join(differing)}){back if kept.exists() else ''}"
        )


def check_folder(folder: RunFolder, functions: str | None) -> None:
    """Raises FunctionsError where a run was begun in the folder with other functions."""
    if (config := folder.read("config.json")) is not None:
        check_recorded(folder.path, config.get("functions_of"), functions)


def keep_copy(place: Path, functions: str | None) -> None:
    """Copies the file of FILE:NAME into a run folder, for readers; it is never run from there."""
    if functions is not None:
        write_durably(place / COPY, load_functions(functions).source)
