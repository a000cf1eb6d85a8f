"""Whole runs of `pronounce` from start to report, the default preset first.

This process does not touch the accelerator.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from experiments.bench.device.session import Row, Session, one_line

RUNS = {"default": ((), 45.0), "full": (("--preset", "full"), 120.0)}
"""By name: flags, and seconds below which it is not begun."""

_TINY = ("--steps", "2", "--rows", "4", "--source-length", "8", "--target-length", "8", "--beam",
         "1", "--model.d-model", "8", "--model.d-ff", "8", "--model.num-heads", "2",
         "--model.num-encoder-layers", "1", "--model.num-decoder-layers", "1", "--warmup-steps",
         "1")  # fmt: skip


def _tiny_files(folder: Path) -> list[str]:
    """A lexicon of a few invented words, and the flags that name its parts."""
    words = ["".join(letters) for letters in itertools.product("abc", repeat=3)]
    flags = []
    for part, members in (("train", words[:19]), ("valid", words[19:23]), ("test", words[23:])):
        file = folder / f"{part}.dict"
        file.write_text("".join(f"{w}\t{' '.join(w.upper())}\n" for w in members))
        flags += [f"--{part}-file", str(file)]
    return flags


def train(session: Session, name: str, flags: tuple[str, ...]) -> Row:
    """Minutes and the test's word error rate of one run, in a folder beside the results."""
    folder = Path(session.folder)
    run = folder / f"pronounce-{name}"
    command = [sys.executable, "-m", "experiments.run", "pronounce", "--run", str(run), *flags]
    if session.tiny:
        command += [*_TINY, *_tiny_files(folder)]
    if run.is_dir():  # left by an earlier call: a finished run would not train again
        shutil.rmtree(run)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            timeout=max(1.0, session.left() - 3),
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        return {"fault": f"not finished after {expired.timeout:.0f} s", "command": command[2:]}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"fault": one_line(f"exit code {done.returncode}: {lines[-1]}")}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    minutes = (time.monotonic() - begin) / 60
    return {"minutes": minutes, "word_error_rate": results["test_wer"]}


def run(session: Session) -> None:
    for name, (flags, needed) in RUNS.items():
        if session.tiny and name != "default":
            continue
        work = partial(train, session, name, flags)
        session.row(f"pronounce, {name}", work, needs=0 if session.tiny else needed)
