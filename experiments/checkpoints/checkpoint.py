"""Checkpoints on disk, with Orbax and a manifest (`experiments.checkpoints.manifest`)."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.checkpoints import manifest
from experiments.checkpoints.manifest import DamagedError
from tfm.training import TrainState

JOURNAL = "journal.json"


class CheckpointError(ValueError):
    """Why a checkpoint cannot be written or read, in one line that names the path."""


def state_sha256(state: TrainState, position: Any) -> str:
    """SHA-256 (hex) of all arrays (name, type, shape, bytes) and of the data iterator's position
    (JSON). Equal hashes mean that training would continue identically."""
    digest = hashlib.sha256(json.dumps(position, sort_keys=True).encode())
    for name, leaf in _named(_items(state)).items():
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        )
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _items(state: TrainState) -> dict[str, Any]:
    """Parameters and the rest as separate items: readers of parameters skip the moments."""
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {"params": state.params, "rest": rest}


def _named(items: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _types(items: dict[str, Any]) -> dict[str, str]:
    return {n: f"{x.dtype}[{','.join(map(str, x.shape))}]" for n, x in _named(items).items()}


def _random_bits() -> dict[str, Any]:
    """The settings of JAX, besides the key, that decide its random bits."""
    return {
        "prng_impl": str(jax.config.jax_default_prng_impl),
        "threefry_partitionable": bool(jax.config.jax_threefry_partitionable),
    }


def _placed(like: chex.ArrayTree) -> chex.ArrayTree:
    """The shardings to restore to: those of `like`, else this process's first device. Without them
    Orbax looks for the devices that saved the checkpoint."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def as_restored(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or first
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(as_restored, like)


def _reason(error: BaseException) -> str:
    """A short reason for an error of the file system; Orbax's messages have many lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else f"{type(error).__name__}: {error}".split("\n")[0]


def _remove(path: Path) -> None:
    """Deletes a folder and its content; of a link, the link alone."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


@dataclasses.dataclass
class _SearchResult:
    """The journal and the faulty steps that a search for the newest sound step has read."""

    journal: dict[int, str]
    journal_is_broken: bool
    lines: list[str]
    unfinished: list[int] = dataclasses.field(default_factory=list)
    damaged: list[int] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The numbered checkpoints of one folder; the newest `keep` stay.

    A checkpoint is a training state and a `notes` mapping of JSON values (the data iterator's
    position, say). Saves run in the background, in this order: Orbax writes under a temporary name
    and renames; a manifest with the SHA-256 of every file is written; the step and its manifest's
    hash go into the journal; older steps are removed. So a step without a manifest was never
    finished, and a journalled step whose files do not match its manifest is damaged. Use as a
    context manager: leaving it waits for the pending save, and raises its error.

    `read_only` makes no folder and removes nothing, so that a run can be read while it trains.

    `distributed`: all processes of `jax.distributed` call `save`, `notes` and `restore` in the same
    order. Each writes the shards of its devices, and process 0 the manifest and the journal;
    `newest` and `set_aside` are for process 0. Otherwise this process works alone.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        *,
        read_only: bool = False,
        distributed: bool = False,
    ) -> None:
        self.folder, self._keep, self._read_only = Path(folder).absolute(), keep, read_only
        self._together = distributed
        self._facts: dict[int, dict[str, Any]] = {}  # of the steps verified or saved
        self._under_way: Future | None = None
        self._background: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Checkpoints":
        if not self._read_only:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.folder}: {_reason(error)}") from None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=self._processes()
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def _processes(self) -> ocp.options.MultiprocessingOptions:
        """The processes that Orbax synchronises."""
        own = jax.process_index()
        if self._together or jax.process_count() == 1:
            return ocp.options.MultiprocessingOptions()
        return ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
        )

    @property
    def _writes(self) -> bool:
        """Whether this process writes the manifest and the journal."""
        return not self._together or jax.process_index() == 0

    @property
    def steps(self) -> list[int]:
        """The steps that the journal holds, oldest first."""
        return sorted(self._journal()[0])

    @property
    def last_saved(self) -> int | None:
        """The newest step that was verified or saved; None where there is none."""
        return max(self._facts, default=None)

    def newest(self) -> tuple[int | None, list[str]]:
        """The newest sound step (every file as written), and one line for each faulty step.

        The step is None where nothing was ever saved. Unless read-only, temporary folders of
        interrupted saves are removed, and faulty steps are renamed to `STEP.unfinished` and
        `STEP.damaged`.

        Raises:
          CheckpointError: every step is damaged, or the disk cannot be read; nothing is changed
            then. Several unfinished steps without a sound one count as damage, since an
            interrupted process leaves one at most.
        """
        self._refuse_link()
        step, result = self._search()
        while self._read_only and result.lines and self._journal()[0] != result.journal:
            step, result = self._search()  # a trainer removed a step meanwhile
        if step is None and (
            result.damaged or result.journal_is_broken or len(result.unfinished) > 1
        ):
            raise CheckpointError(
                f"no sound checkpoint is left in {self.folder}: {'; '.join(result.lines)}. "
                "Put back a copy, or begin another run folder"
            )
        if not self._read_only:
            try:
                self._tidy(step, result)
            except OSError as error:
                raise CheckpointError(f"{self.folder}: {_reason(error)}") from None
        return step, result.lines

    def _search(self) -> tuple[int | None, _SearchResult]:
        journal, lines = self._journal()
        result = _SearchResult(journal, bool(lines), lines)
        for step in sorted(self._on_disk() | journal.keys(), reverse=True):
            path = self._path(step)
            # Checked before the files: a trainer may write the manifest while they are read.
            begun = (path / manifest.NAME).exists() or path.is_symlink()
            try:
                self._facts[step] = manifest.verify_manifest(path, journal.get(step))
                return step, result
            except (DamagedError, FileNotFoundError) as error:
                if begun or result.journal_is_broken or step in journal:
                    result.damaged.append(step)
                    lines.append(f"{path}: damaged, left out: {error}")
                else:
                    result.unfinished.append(step)
                    if not self._read_only:  # read-only, another process may be saving it
                        lines.append(f"{path}: its save was never finished, left out")
            except OSError as error:  # unreadable now is not damaged
                raise CheckpointError(f"{path}: {_reason(error)}") from None
        return None, result

    def _tidy(self, step: int | None, result: _SearchResult) -> None:
        self._set_aside(result.unfinished, "unfinished")
        self._set_aside(result.damaged, "damaged")
        sound = {s: digest for s, digest in result.journal.items() if s not in result.damaged}
        if step is not None and step not in sound:  # interrupted before the journal was written
            sound[step] = manifest.sha256(self._path(step) / manifest.NAME)
        if sound != result.journal or result.journal_is_broken:
            self._write_journal(sound)
        self._remove_leftovers()

    def set_aside(self, after: int, why: str) -> None:
        """Renames the steps after step `after` to `STEP.why`, since they will be repeated.

        Raises CheckpointError where the folder is a link, or cannot be changed.
        """
        self._refuse_link()
        journal, _ = self._journal()
        try:
            self._write_journal({step: digest for step, digest in journal.items() if step <= after})
            self._set_aside([step for step in self._on_disk() if step > after], why)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {_reason(error)}") from None
        self._facts = {step: facts for step, facts in self._facts.items() if step <= after}

    def save(self, step: int, state: TrainState, notes: Mapping[str, Any]) -> None:
        """Starts a save; the arrays are copied before it returns, so they may be donated.

        A step that is already saved stays as it is.

        Raises:
          CheckpointError: the save cannot start, or the one before it failed.
        """
        self.wait()
        if step in self._facts:
            return
        if step < (self.last_saved or 0):
            raise CheckpointError(f"{self._path(step)}: not saved: {self.last_saved} is there")
        items = _items(state)
        facts = {"step": step, "types": _types(items)} | _random_bits()
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["notes"] = ocp.args.JsonSave(dict(notes))
        try:
            self._orbax.save(self._path(step), args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            raise self._not_saved(step, error) from error
        self._under_way = self._background.submit(self._finish, step, facts)

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if self._writes:
                self._enter(step, facts)
        except Exception as error:
            raise self._not_saved(step, error) from error
        self._facts[step] = facts

    def _enter(self, step: int, facts: dict[str, Any]) -> None:
        """Writes the manifest, adds the step to the journal, and removes older steps."""
        digest = manifest.write_manifest(self._path(step), facts)
        journal, unreadable = self._journal()
        kept = sorted({*journal, step})[-self._keep :]
        self._write_journal({s: digest if s == step else journal[s] for s in kept})
        for old in set() if unreadable else self._on_disk() - set(kept):
            shutil.rmtree(self._path(old), ignore_errors=True)

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        self._remove_leftovers()
        return CheckpointError(f"{self._path(step)}: not saved: {_reason(error)}")

    def wait(self) -> None:
        """Waits for the pending save; raises CheckpointError where it failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def notes(self, step: int) -> dict[str, Any]:
        """The notes saved with `step`; CheckpointError where the step is damaged."""
        self._check(step, {})
        return self._read(step, notes=ocp.args.JsonRestore())["notes"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`; `like` gives the structure, shapes and dtypes.

        Raises:
          CheckpointError: the step is damaged, or was saved with other arrays or another PRNG.
        """
        items = _items(like)
        self._check(step, _types(items) | _random_bits())
        args = {n: ocp.args.StandardRestore(_placed(tree)) for n, tree in items.items()}
        restored = self._read(step, **args)
        return TrainState(params=restored["params"], **restored["rest"])

    def restore_params(self, step: int, like: chex.ArrayTree) -> chex.ArrayTree:
        """The parameters of `step` alone; `like` gives structure, shapes and dtypes.

        Raises:
          CheckpointError: the step is damaged, or was saved with other parameters.
        """
        self._check(step, _types({"params": like}))
        return self._read(step, params=ocp.args.StandardRestore(_placed(like)))["params"]

    def _read(self, step: int, **args: Any) -> Mapping[str, Any]:
        try:
            return self._orbax.restore(self._path(step), args=ocp.args.Composite(**args))
        except Exception as error:  # a trainer may have removed it since it was verified
            raise CheckpointError(f"{self._path(step)}: {_reason(error)}") from error

    def _check(self, step: int, now: dict[str, Any]) -> None:
        """Refuses other arrays and another PRNG, since Orbax would cast and truncate silently."""
        path = self._path(step)
        if step not in self._facts:
            try:
                self._facts[step] = manifest.verify_manifest(path, self._journal()[0].get(step))
            except (DamagedError, OSError) as error:
                raise CheckpointError(f"{path}: damaged: {error}") from None
        facts = self._facts[step]
        before = facts["types"] | {name: facts[name] for name in _random_bits()}
        parts = tuple({name.partition("/")[0] for name in now})
        names = [n for n in before if n.startswith(parts)] + [n for n in now if n not in before]
        differing = [
            f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CheckpointError(
                f"{path} was saved with another model or optimizer "
                f"({'; '.join(differing[:3])}{more})"
            )

    def _refuse_link(self) -> None:
        if self.folder.is_symlink():
            raise CheckpointError(f"{self.folder}: a link, which is not followed")

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _on_disk(self) -> set[int]:
        if not self.folder.is_dir():
            return set()
        return {int(p.name) for p in self.folder.iterdir() if re.fullmatch("[1-9][0-9]*|0", p.name)}

    def _journal(self) -> tuple[dict[int, str], list[str]]:
        """{step: SHA-256 of its manifest}, and a line where the journal cannot be read."""
        file = self.folder / JOURNAL
        if file.is_symlink():
            return {}, [f"{file}: a link, which is not followed"]
        try:
            saved = json.loads(file.read_bytes())["saved"]
            return {int(step): str(digest) for step, digest in saved.items()}, []
        except FileNotFoundError:
            return {}, []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return {}, [f"{file}: damaged, left out: {_reason(error)}"]

    def _write_journal(self, saved: dict[int, str]) -> None:
        content = json.dumps({"saved": saved}, indent=1) + "\n"
        manifest.write_durably(self.folder / JOURNAL, content.encode())

    def _set_aside(self, steps: list[int], why: str) -> None:
        paths = [path for path in map(self._path, steps) if os.path.lexists(path)]
        for older in self.folder.glob(f"*.{why}") if paths else ():  # only the latest are kept
            _remove(older)
        for path in paths:
            path.rename(path.with_name(f"{path.name}.{why}"))

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                _remove(path)
