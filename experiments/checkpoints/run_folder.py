"""The folder of a run: its resolved config, its metrics, its results."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import filelock
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from experiments.checkpoints.differences import differences
from experiments.checkpoints.manifest import write_durably
from experiments.errors import UserError
from tfm.config import TransformerConfig, current_fields


class RunFolderError(UserError):
    """The run folder cannot be used for this run."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns an OSError (disk full, read-only …) into a RunFolderError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror or error}") from None


def plain(value: Any) -> Any:
    """A config as JSON values: dataclasses become objects, tuples lists, and paths strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(member) for member in value]
    return str(value) if isinstance(value, Path) else value


def changes(
    old: dict[str, Any], new: dict[str, Any], may_differ: Collection[str] = ()
) -> list[str]:
    """`differences` of two runs' configs; an older one may lack newer fields of the model."""
    if isinstance(old.get("model"), dict):
        old = old | {"model": current_fields(old["model"])}
    return differences(old, new, may_differ, {"model": plain(TransformerConfig())})


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: writes a temporary file, then renames it.

    Raises RunFolderError naming the path where it cannot be written; the old file then stays.
    """
    with named(path):
        write_durably(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically, as `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class RunFolder:
    """`config.json`, `metrics.jsonl`, `results.json`, TensorBoard events, `checkpoints/`, the
    `best/` of them, and the `final/` model where that is not the newest of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.final = path / "final"
        self.report = path / "report.html"

    @property
    def has_begun(self) -> bool:
        """Whether the folder holds a training that has started, or a model."""
        begun = ("resumed_from.json", "results.json", "checkpoints", "final")
        return any((self.path / name).exists() for name in begun)

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in `name`, or None where there is no such file.

        Raises RunFolderError naming a file that is not JSON.
        """
        file = self.path / name
        if file.is_symlink():
            raise RunFolderError(f"{file}: a link, which is not followed")
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
            return value
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(f"{file}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"{file}: {error}") from None

    def _check(self, config: dict[str, Any], may_differ: Collection[str]) -> None:
        old = self.read("config.json")
        if old is not None and (differing := changes(old, config, may_differ)):
            raise RunFolderError(
                f"{self.path} holds a run with another config ({'; '.join(differing)}): "
                "name another folder with --run"
            )

    @contextlib.contextmanager
    def claim(
        self,
        config: dict[str, Any],
        may_differ: Collection[str],
        check: Callable[[], None] = lambda: None,
        rewrite: bool = True,
    ) -> Iterator[None]:
        """Makes the folder, locks it for this process, and writes config.json.

        Raises RunFolderError, and writes nothing, where the folder cannot be written, another
        process has locked it, or its config differs; old and new values are named. Fields in
        `may_differ` do not change what is learned, so they may change when a run is resumed.
        Without `rewrite` config.json is written only if the folder has none and no run has begun.
        """
        with named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                # The system releases the lock when the process ends, even if it is killed.
                held = filelock.FileLock(self.path / ".lock").acquire(timeout=0)
            except filelock.Timeout:
                raise RunFolderError(f"{self.path}: another process is working in it") from None
        with held:
            self._check(config, may_differ)
            check()
            if rewrite or (self.read("config.json") is None and not self.has_begun):
                write_json(self.path / "config.json", config)
            yield

    def set_aside(self, steps: int) -> None:
        """Renames the outputs of a finished run of `steps` (`results-7500.json`) to extend it.

        results.json is renamed first, so that an interruption leaves an unfinished run.
        """
        for name in ("results.json", "report.html", "translations.tsv", "learning_curve.svg"):
            file = self.path / name
            if file.exists():
                file.replace(file.with_stem(f"{file.stem}-{steps}"))

    def sittings(self) -> list[int]:
        """The steps at which training was resumed so far.

        Raises RunFolderError where resumed_from.json does not hold them.
        """
        noted = self.read("resumed_from.json")
        steps = [] if noted is None else noted.get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
            raise RunFolderError(f"{self.path / 'resumed_from.json'}: no list of steps")
        return steps

    def note_sitting(self, step: int) -> list[int]:
        """Records that training resumes at `step`; returns all such steps so far.

        Step 0 is a fresh start, which clears the list.
        """
        resumed = [*self.sittings(), step] if step else []
        write_json(self.path / "resumed_from.json", {"steps": resumed})
        return resumed

    def check_shared(self, seconds: float = 60) -> None:
        """Raises RunFolderError where this process does not see the files of process 0.

        A network file system may take some seconds to show them.
        """
        file = self.path / "resumed_from.json"
        deadline = time.monotonic() + seconds
        while not file.exists():
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"{file}: not here, though process 0 has written it: --run must name a folder "
                    "that all processes see"
                )
            time.sleep(0.5)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are measurements, not skipped steps."""
        return [line for line in self.lines() if "skipped" not in line]

    def lines(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl so far; an incomplete last line is dropped."""
        file = self.path / "metrics.jsonl"
        if file.is_symlink():
            raise RunFolderError(f"{file}: a link, which is not followed")
        with named(file):
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        read = []
        for number, line in enumerate(lines, start=1):
            try:
                read.append(dict(json.loads(line)))
                place = "batch" if "skipped" in read[-1] else "step"
                if not isinstance(read[-1].get(place), int):
                    raise ValueError(f"no {place}")
            except (ValueError, TypeError, RecursionError) as error:
                raise RunFolderError(f"{file}, line {number}: not a line of it ({error})") from None
        return read


class MetricsLog:
    """Appends to metrics.jsonl and to the TensorBoard events, from `first_step` on.

    Existing lines at or after `first_step` are dropped: they are of steps after the last save,
    which will be repeated. So are lines of skipped steps whose batch comes after the first
    `batches`.
    """

    def __init__(self, folder: RunFolder, first_step: int, batches: int = 0) -> None:
        kept = [
            m for m in folder.lines()
            if (m["batch"] <= batches if "skipped" in m else m["step"] < first_step)
        ]  # fmt: skip
        path, self._directory = folder.path / "metrics.jsonl", folder.path / "tensorboard"
        if self._directory.is_symlink():
            raise RunFolderError(f"{self._directory}: a link, which is not followed")
        write_text(path, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        with named(path):
            self._file = path.open("a", encoding="utf-8")
        with named(self._directory):
            self._directory.mkdir(exist_ok=True)
            # Not SummaryWriter: a full disk ends its thread, and later writes block for ever.
            self._events = EventsWriter(str(self._directory / "events"))
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=first_step, session_log=restart)  # hides the repeated steps

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        # A failed write was reported already; closing would only try again.
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                file.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """One line; every number but the step also becomes a TensorBoard scalar.

        A number that is not finite becomes null, as JSON cannot express it.
        Raises RunFolderError where it cannot be written.
        """
        metrics = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append(metrics)
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._add_event(step=metrics["step"], summary=scalar(name, value))
        with named(self._directory):
            self._events.flush()

    def write_skipped(self, skipped: dict[str, Any]) -> None:
        """The line of a step that made no update: `step`, `batch`, `why`."""
        self._append(skipped | {"skipped": True})

    def _append(self, line: dict[str, Any]) -> None:
        with named(Path(self._file.name)):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _add_event(self, **content: Any) -> None:
        with named(self._directory):
            self._events.write_event(event_pb2.Event(wall_time=time.time(), **content))
