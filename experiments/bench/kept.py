"""A file of finished measurements, so that an interrupted run continues with the missing ones."""

import hashlib
import json
from pathlib import Path
from typing import Any

from experiments.checkpoints.run_folder import named


def code_of() -> str:
    """SHA-256 of the timed code, since timings of other code do not count."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*here.glob("*.py"), *(here.parent.parent / "tfm").rglob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Kept:
    """JSON lines of all measurements in a folder, by key and by code."""

    def __init__(self, file: Path) -> None:
        self._file, self._code = file, code_of()

    def of(self, key: dict[str, Any]) -> list[dict[str, Any]]:
        """The measurements of this code under `key`."""
        now = key | {"code": self._code}
        with named(self._file):
            lines = self._file.read_bytes().split(b"\n")[:-1] if self._file.exists() else []
        records = [json.loads(line) for line in lines]
        return [line for line in records if now.items() <= line.items()]

    def add(self, key: dict[str, Any], measured: dict[str, Any]) -> None:
        with named(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(key | {"code": self._code} | measured) + "\n")
