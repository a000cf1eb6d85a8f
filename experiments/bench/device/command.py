"""`bench --device`: runs the parts, one process after another, and shows their results.

This process never starts JAX's backend, so that the running part has the accelerator alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.bench.device.config import CEILINGS, DeviceConfig, DeviceError, Part
from experiments.bench.device.session import Row, one_line
from experiments.bench.device.table import show
from experiments.checkpoints.run_folder import RunFolder, named, plain, write_json, write_text

LEAST = 10.0
"""Seconds below which no process is started: JAX alone takes some."""

Results = dict[str, Any]
"""device.json: `tiny`, `begun`, `machine`, `ceilings`, `parts` with their `rows` and `fault`."""


def environment_of(module: str, tiny: bool) -> dict[str, str]:
    """A worker's environment: the CPU as a second platform, and nearly all device memory.

    With PyTorch JAX is limited to the CPU, since it would reserve the accelerator's memory.
    """
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    platforms = environment.get("JAX_PLATFORMS", "")
    if tiny or module.startswith("torch_"):
        environment["JAX_PLATFORMS"] = "cpu"
    elif platforms and "cpu" not in platforms.split(","):
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"
    if tiny:  # it is to run, not to be fast, and most of its time is the compiler's
        quick = "--xla_backend_optimization_level=0"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {quick}".strip()
    return environment


@contextlib.contextmanager
def _worker(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen]:
    """Runs a process with its output in `log`; at the end its whole group is killed."""
    with log.open("ab") as file:
        worker = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def last_words(log: Path, start: int) -> str:
    """The last line of an error in `log` from byte `start` on."""
    printed = log.read_bytes()[start:].decode(errors="replace").splitlines()
    lines = [line.strip() for line in printed if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return one_line((errors or lines or ["no message"])[-1])


def worker_command(
    module: str, rows: Path, seconds: float, ceilings: dict[str, float], tiny: bool
) -> list[str]:
    command = [sys.executable, "-m", "experiments.bench.device.worker", module, str(rows)]
    command += ["--seconds", f"{seconds:.1f}", "--ceilings", json.dumps(ceilings)]
    return command + (["--tiny"] if tiny else [])


OnRow = Callable[[Row], None]
"""Called with each new row."""


def run_module(
    module: str, folder: Path, seconds: float, ceilings: dict[str, float], tiny: bool, on_row: OnRow
) -> str | None:
    """Runs one module of a part for at most `seconds`; returns why it failed, or None."""
    rows, log = folder / "rows.jsonl", folder / "log.txt"
    command = worker_command(module, rows, seconds, ceilings, tiny)
    with named(log):
        seen, begun = rows.stat().st_size, log.stat().st_size
        end = time.monotonic() + seconds
        with _worker(command, log, environment_of(module, tiny)) as worker:
            while (code := worker.poll()) is None and time.monotonic() < end:
                time.sleep(0.1)
                seen = _tell_new(rows, seen, on_row)
            _tell_new(rows, seen, on_row)
        if code is None:
            return f"stopped at its limit of {seconds:.0f} s"
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return f"{how}: {last_words(log, begun)}"
    return None


def _tell_new(rows: Path, seen: int, on_row: OnRow) -> int:
    """Passes on the complete lines from byte `seen` on; returns the position after them."""
    with rows.open("rb") as file:
        file.seek(seen)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.split(b"\n")[:-1]:
        on_row(json.loads(line))
    return seen + len(whole)


RunModule = Callable[[str, Path, float, dict[str, float], bool, OnRow], str | None]


def run_part(
    name: str, part: Part, seconds: float, config: DeviceConfig, results: Results,
    run_one: RunModule, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """A part's `seconds`, `rows` and `fault`; its modules share `seconds`."""
    begin, rows, faults = time.monotonic(), [], []

    def on_row(row: Row) -> None:
        rows.append(row)
        end = row.get("fault") or row.get("skipped") or row.get("flag") or "done"
        line = f"  {time.monotonic() - begin:5.0f} s  {row['name']}: {end}"
        console.print(line, soft_wrap=True)

    ceilings = {key: value for key, value in results["ceilings"].items() if value}
    for number, module in enumerate(part.modules):
        left = seconds - (time.monotonic() - begin)
        # The first of two gets half, since PyTorch compiles as long as XLA.
        own = left if number == len(part.modules) - 1 else left / 2
        fault = run_one(module, config.run, own, ceilings, config.tiny, on_row)
        if fault:
            faults.append(fault if module == name else f"{module}: {fault}")
            console.print(f"  {faults[-1]}", soft_wrap=True)
    made = {"seconds": time.monotonic() - begin, "rows": rows}
    return made | {"fault": "; ".join(faults) or None}


def ceilings_of(rows: list[Row]) -> dict[str, float]:
    """The FLOP/s and bytes/s in the rows."""
    keys = ("flops_per_second", "bytes_per_second")
    return {key: row[key] for row in rows for key in keys if row.get(key)}


def limit(part: Part, others: list[Part], left: float) -> float:
    """Seconds for a part: its share of the remaining time, among the remaining parts."""
    later = sum(other.share for other in others)
    share = left * part.share / (part.share + later) if later else left
    return min(left, max(share, part.least))


def measure(config: DeviceConfig, run_one: RunModule, console: Console) -> Results:
    """Ceilings, then the chosen parts; device.json is written after each."""
    end = time.monotonic() + 60 * config.minutes
    results: Results = {"tiny": config.tiny, "begun": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    results |= {"machine": {}, "ceilings": {}, "parts": {}}
    waiting = {"ceilings": CEILINGS} | config.chosen()
    while waiting:
        name, left = next(iter(waiting)), end - time.monotonic()
        part = waiting.pop(name)
        # A tiny run only tests the code, so it has no limits per part.
        seconds = left if config.tiny else limit(part, list(waiting.values()), left)
        if seconds < LEAST:
            results["parts"][name] = {"seconds": 0.0, "rows": [], "fault": "no time was left"}
            console.print(f"{name}: no time is left")
        else:
            console.print(f"{name}: at most {seconds:.0f} s; {left:.0f} s are left in all")
            outcome = run_part(name, part, seconds, config, results, run_one, console)
            results["parts"][name] = outcome
        if name == "ceilings":
            _take_ceilings(results, config.tiny)
        write_json(config.run / "device.json", results)
    return results


def _take_ceilings(results: Results, tiny: bool) -> None:
    """Moves machine and ceilings out of the parts; DeviceError where there is no accelerator."""
    part = results["parts"]["ceilings"]
    machines = [row for row in part["rows"] if row["name"] == "machine"]
    results["machine"] = {k: v for row in machines for k, v in row.items() if k != "name"}
    part["rows"] = [row for row in part["rows"] if row["name"] != "machine"]
    platform = results["machine"].get("platform")
    if platform == "cpu" and not tiny:
        raise DeviceError(
            "JAX finds no accelerator here; --tiny runs the same at a tiny size on the CPU"
        )
    if platform is None:
        why = part["fault"] or results["machine"].get("fault")
        raise DeviceError(f"JAX could not be asked for its devices: {why}")
    results["ceilings"] = ceilings_of(part["rows"])


def verdict(results: Results) -> int:
    """Exit code: 1 where results do not agree, or where nothing at all was measured."""
    parts = [part for name, part in results["parts"].items() if name != "ceilings"]
    rows = [row for part in parts for row in part["rows"]]
    failed = any(row.get("passed") is False for row in rows)
    measured = any(not row.get("fault") and not row.get("skipped") for row in rows)
    return 1 if failed or not measured else 0


def run(config: DeviceConfig, run_one: RunModule = run_module) -> None:
    """The whole measurement; the table comes last."""
    config.chosen()  # an unknown part is refused before anything is made
    folder = RunFolder(config.run)
    known = plain(config)
    with folder.claim(known, set(known)):
        for name in ("rows.jsonl", "log.txt"):
            write_text(config.run / name, "")
        results = measure(config, run_one, Console(stderr=True, highlight=False))
    show(Console(highlight=False), results)
    print(config.run / "device.json")
    if code := verdict(results):
        sys.exit(code)
