"""Manifests: the size and SHA-256 of every file in a folder, to detect damage."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"


class DamagedError(ValueError):
    """A file differs from its manifest; the message says which and how."""


def sha256(path: Path) -> str:
    """The SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait_for_disk(path: Path) -> None:
    """Waits until a file or folder is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file atomically: writes a temporary file, waits for the disk, renames."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # left by an interrupted process; a link is not followed
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> str:
    """Writes `manifest.json` with size and SHA-256 of every file in `folder`, and `facts`.

    Returns the SHA-256 of the manifest itself, for the caller to keep.
    """
    present = _files(folder)
    for path in {*present.values(), *(path.parent for path in present.values())}:
        # Otherwise the manifest could reach the disk before the files, and a power cut keep it.
        _wait_for_disk(path)
    files = {name: [path.stat().st_size, sha256(path)] for name, path in present.items()}
    content = (json.dumps({"files": files, "facts": dict(facts)}, indent=1) + "\n").encode()
    write_durably(folder / NAME, content)
    return hashlib.sha256(content).hexdigest()


def verify_manifest(folder: Path, expected: str | None = None) -> dict[str, Any]:
    """Compares every file with `folder`'s manifest, and returns the manifest's facts.

    Only files found in the folder are opened, never a name from the manifest.

    Args:
      expected: the manifest's SHA-256, where it is known.

    Raises:
      DamagedError: naming what is missing, changed, cut, added, or a link.
      OSError: the system refuses to read something that is there.
    """
    manifest, present = folder / NAME, _files(folder)
    if present.pop(NAME, None) is None:
        raise DamagedError(f"{NAME}: missing")
    if expected is not None and sha256(manifest) != expected:
        raise DamagedError(f"{NAME}: not the one that was written (its SHA-256 differs)")
    try:
        content = json.loads(manifest.read_bytes())
        listed = {
            name: (int(size), str(digest)) for name, (size, digest) in content["files"].items()
        }
        facts = dict(content["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{NAME}: not a manifest") from None
    wrong = [f"{name}: missing" for name in listed.keys() - present.keys()]
    wrong += [f"{name}: not in the manifest" for name in present.keys() - listed.keys()]
    for name in listed.keys() & present.keys():
        size, digest = listed[name]
        if (actual := present[name].stat().st_size) != size:
            wrong.append(f"{name}: {actual} bytes, where {size} were written")
        elif sha256(present[name]) != digest:
            wrong.append(f"{name}: changed (its SHA-256 differs)")
    if wrong:
        first, *others = sorted(wrong)
        raise DamagedError(first + (f" (and {len(others)} more)" if others else ""))
    return facts


def _refuse(error: OSError) -> None:
    """Raises errors of listing a folder, as its files would seem missing; not if it is gone."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its relative name; DamagedError for links and devices."""
    if folder.is_symlink():
        raise DamagedError(f"{folder.name}: a link, which is not followed")
    files = {}
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        for name in (*folders, *names):
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise DamagedError(f"{relative}: not a plain file or folder; it is not followed")
            if path.is_file():
                files[relative] = path
    return files
