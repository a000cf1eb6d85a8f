"""Kills the real command again and again, and looks at what is left.

`python -m tests.support.killing --kills 100` trains a tiny model in a folder, kills the process
(SIGKILL) once a kill, most of them while a checkpoint is half-written, starts the same command
again each time, and at last compares the final state with that of a run that nobody disturbed.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments import run as command
from experiments.checkpoints.checkpoint import Checkpoints

SAVE_EVERY = 10
STEPS_A_KILL = 150  # more than a process does before it is killed
TINY = [
    *("--model.d-model", "16", "--model.d-ff", "32", "--model.num-heads", "2"),
    *("--model.num-encoder-layers", "1", "--model.num-decoder-layers", "1"),
    *("--model.dropout-rate", "0.1", "--mesh.data", "1", "--rows", "8", "--source-length", "12"),
    *("--target-length", "12", "--beam", "1", "--log-every", "1", "--evaluate-every", "1000000"),
    *("--save-every", str(SAVE_EVERY)),
]


@dataclasses.dataclass(frozen=True)
class Kill:
    """What one kill found and cost."""

    reached: int  # the last step logged before it
    sound: int  # the newest verified checkpoint after it
    aimed: str  # temporary, manifest-less, or neither

    @property
    def lost(self) -> int:
        return self.reached - self.sound


def call(*arguments: object) -> int:
    """The exit code of the command line, run in this process."""
    try:
        command.main([str(a) for a in arguments])
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    return 0


def write_words(folder: Path) -> list[str]:
    """A language of 300 words; returns the flags that name its files."""
    rng = random.Random(0)
    words = {"".join(rng.choices("abcde", k=rng.randint(2, 6))) for _ in range(330)}
    parts = {"train": sorted(words)[30:], "valid": sorted(words)[:30]}
    flags = []
    for part, members in parts.items():
        file = folder / part
        file.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in members))
        flags += [f"--{part}-file", str(file)]
    return flags


def start(run: Path, steps: int, flags: list[str], **options: Any) -> subprocess.Popen:
    """The real command on a tiny model; `options` are Popen's."""
    command = [sys.executable, "-m", "experiments.run", "--run", str(run), "--steps", str(steps)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*command, *flags, *TINY], cwd=Path(__file__).parents[2], **options)


def half_written(checkpoints: Path) -> str:
    """Which unfinished thing lies in a folder of checkpoints right now."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if "orbax-checkpoint-tmp" in path.name:
            return "temporary"
        if path.name.isdecimal() and not (path / "manifest.json").exists():
            return "manifest-less"
    return "neither"


def sound_step(run: Path) -> int:
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.newest()[0] or 0


def last_logged(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


AIMS = ("temporary", "temporary", "manifest-less", "temporary", "neither")
"""What a kill shall find, in turn."""


def kill_once(run: Path, steps: int, flags: list[str], rng: random.Random, aim: str) -> Kill:
    """Starts the command, lets it make some checkpoints, and kills it."""
    before = sound_step(run)
    process = start(run, steps, flags)
    wanted = before + SAVE_EVERY * rng.randint(1, 6)
    deadline = time.monotonic() + 180
    checkpoints = run / "checkpoints"
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"ended by itself: {process.stderr.read().decode()}")
            journal = checkpoints / "journal.json"
            saved = json.loads(journal.read_bytes())["saved"] if journal.exists() else {}
            if max(map(int, saved), default=0) >= wanted:
                break
            time.sleep(0.002)
        else:
            raise RuntimeError("three minutes without a checkpoint")
        patience = time.monotonic() + (5 if aim != "neither" else rng.random() / 10)
        while time.monotonic() < patience and half_written(checkpoints) != aim:
            pass
    finally:
        process.kill()
        process.communicate()
    return Kill(last_logged(run), sound_step(run), half_written(checkpoints))


def finish(run: Path, steps: int, flags: list[str]) -> dict:
    process = start(run, steps, flags)
    error = process.communicate(timeout=1800)[1].decode()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {error}")
    return json.loads((run / "results.json").read_text())


def kill_and_compare(folder: Path, kills: int, seed: int = 0) -> tuple[list[Kill], dict, dict]:
    """(the kills, results of the killed run, results of an undisturbed one)."""
    flags, steps, rng = write_words(folder), STEPS_A_KILL * kills, random.Random(seed)
    found = []
    for number in range(1, kills + 1):
        aim = AIMS[(number - 1) % len(AIMS)]
        kill = kill_once(folder / "killed", steps, flags, rng, aim)
        found.append(kill)
        print(
            f"kill {number}: {kill.aimed}, reached {kill.reached}, sound {kill.sound}", flush=True
        )
    killed = finish(folder / "killed", steps, flags)
    return found, killed, finish(folder / "whole", steps, flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, killed, whole = kill_and_compare(Path(folder), arguments.kills, arguments.seed)
    hit = [kill.aimed for kill in kills]
    lost = [kill.lost for kill in kills]
    print(
        f"{len(kills)} kills: {hit.count('temporary')} in a temporary folder, "
        f"{hit.count('manifest-less')} before a manifest, {hit.count('neither')} between saves; "
        f"{max(lost)} steps lost at most, {sum(lost) / len(lost):.1f} on average, of saves every "
        f"{SAVE_EVERY}; resumed {len(killed['resumed_from'])} times; final state "
        + ("equal" if killed["state_sha256"] == whole["state_sha256"] else "DIFFERENT")
    )


if __name__ == "__main__":
    main()
