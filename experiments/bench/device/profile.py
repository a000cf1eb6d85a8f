"""The kernels of one run that take the longest, read from what JAX's profiler writes."""

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.bench.device.session import Row, Session

MOST_KEPT = 4 * 2**20
"""Bytes of a trace that is kept in the folder; a larger one is not."""
LONGEST = 10


def device_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """What ran on the device, of a trace in Chrome's format.

    On a GPU these are the events of its streams; other lines (modules, steps) repeat them. On a CPU
    they are the operations of XLA, recognised by their names.
    """
    events = trace["traceEvents"]
    names = {
        (e["pid"], e.get("tid") if e["name"] == "thread_name" else None): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e.get("name") in ("process_name", "thread_name")
    }
    complete = [e for e in events if e.get("ph") == "X"]
    streams = [
        e for e in complete
        if "/device:" in names.get((e["pid"], None), "")
        and names.get((e["pid"], e["tid"]), "").startswith("Stream")
    ]  # fmt: skip
    return streams or [e for e in complete if "hlo_op" in e.get("args", {})]


def longest(trace: dict[str, Any], program: str) -> list[dict[str, Any]]:
    """The kernels with the most seconds in all: name, what it computes in JAX's words where one of
    the program's fusions has that name, seconds, calls, and the share of the sum."""
    seconds, calls = Counter[str](), Counter[str]()
    named = re.findall(r'%?([\w.-]+) = .*op_name="([^"]*)"', program)
    computes = {name.replace(".", "_"): operation for name, operation in named}
    for event in device_events(trace):
        seconds[event["name"]] += event.get("dur", 0) / 1e6
        calls[event["name"]] += 1
    total = sum(seconds.values()) or 1.0
    return [
        {
            "kernel": name,
            "computes": computes.get(name.replace(".", "_")),
            "seconds": spent,
            "calls": calls[name],
            "share_of_kernels": spent / total,
        }
        for name, spent in seconds.most_common(LONGEST)
    ]


def longest_kernels(session: Session, name: str, run: Callable[[], Any], program: str) -> Row:
    """`kernels` of one run, whose trace and optimised `program` are kept in the session's folder
    where they are small: kernels are named after the program's fusions.

    A failure here is noted in the row, which is useful without the kernels.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(run())
            (file,) = Path(folder).rglob("*.trace.json.gz")
            kernels = longest(json.loads(gzip.decompress(file.read_bytes())), program)
            kept = {"trace.json.gz": file.read_bytes(), "hlo.gz": gzip.compress(program.encode())}
            for kind, written in kept.items():
                if len(written) <= MOST_KEPT:
                    (Path(session.folder) / f"profile-{name}.{kind}").write_bytes(written)
    except Exception as error:  # a profiler that is not allowed, say
        return {"note": f"no profile: {type(error).__name__}: {str(error)[:200]}"}
    return {"kernels": kernels} if kernels else {"note": "the profile names no kernel"}
