"""The folder of a run: its resolved config, its metrics, its results."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from experiments.errors import UserError
from tfm.checkpoint import Checkpoints


class RunFolderError(UserError):
    """Why a run folder cannot serve this run."""


def plain(value: Any) -> Any:
    """A config as JSON values: dataclasses become objects, paths and other leaves strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def write_text(path: Path, text: str) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new, never a half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON that a person can read, written as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class RunFolder:
    """`config.json`, `metrics.jsonl`, `results.json`, TensorBoard events and `checkpoints/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in `name`, or None where there is no such file.

        Raises RunFolderError naming a file that is not JSON.
        """
        file = self.path / name
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
            return value
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(f"{file}: {error.strerror}") from None
        except ValueError as error:
            raise RunFolderError(f"{file}: {error}") from None

    def check(self, config: dict[str, Any], may_differ: set[str]) -> None:
        """Raises RunFolderError where the folder holds another config, old and new values named.

        Fields in `may_differ` do not change what is learned, and may change between resumptions.
        """
        old = self.read("config.json")
        if old is not None:
            before, now = _flat(old), _flat(config)
            differing = [
                f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
                for name in sorted(before.keys() | now.keys())
                if name not in may_differ and before.get(name) != now.get(name)
            ]
            if differing:
                raise RunFolderError(
                    f"{self.path} holds a run with another config ({'; '.join(differing)}): "
                    "name another folder with --run"
                )

    def claim(self, config: dict[str, Any]) -> None:
        """Makes the folder and writes config.json; RunFolderError where it cannot."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", config)
        except OSError as error:
            raise RunFolderError(f"{self.path}: {error.strerror}") from None

    def set_aside(self, steps: int) -> None:
        """Renames what a finished run of `steps` left (`results-7500.json`): it is to be extended.

        The results first, so that a folder cut short in between counts as unfinished.
        """
        for name in ("results.json", "report.html", "learning_curve.svg"):
            file = self.path / name
            if file.exists():
                file.replace(file.with_stem(f"{file.stem}-{steps}"))

    def steps_done(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        if not self.checkpoints.is_dir():
            return 0
        with Checkpoints(self.checkpoints, read_only=True) as checkpoints:
            return checkpoints.latest() or 0

    def metrics(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl so far; a last line cut short is dropped."""
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunFolderError(f"{file}: a line that is not JSON ({error})") from None


class MetricsLog:
    """Appends to metrics.jsonl and the TensorBoard events, from `first_step` on.

    Lines at or after `first_step`, logged by a run that was cut off before it could save, are
    dropped: the steps are about to be done again.
    """

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        kept = [m for m in folder.metrics() if m["step"] < first_step]
        file = folder.path / "metrics.jsonl"
        write_text(file, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._file = file.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._events.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """One line; every number but the step also becomes a TensorBoard scalar.

        A number that is not finite becomes null, since JSON has no other word for it.
        """
        metrics = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, metrics["step"])
