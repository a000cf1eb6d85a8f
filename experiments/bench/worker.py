"""One contender at one workload in a process of its own: `… ID NAME WEIGHTS [--check FILE]`.

Prints one line of JSON: seconds of the first run (compilation in it), seconds of each later one,
and peak memory of the process.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.contenders import OURS, Contender, build
from experiments.bench.workloads import WORKLOADS, Stream, Workload

WARM_UP, LEAST_RUNS, LEAST_SECONDS = 2, 3, 2.0
STREAM_SECONDS = 12.0  # batches of a stream differ, so more of them are timed


def _seconds(run: Callable[[], object]) -> tuple[float, object]:
    """The seconds of a run, and its result."""
    begin = time.perf_counter()
    done = run()
    return time.perf_counter() - begin, done


def measure(work: Workload, contender: Contender) -> dict[str, Any]:
    """Times enough runs, after a warm-up."""
    result: dict[str, Any] = {"first_seconds": _seconds(contender.run)[0]}
    for _ in range(WARM_UP - 1):
        contender.run()
    times: list[float] = []
    tokens = 0
    least = STREAM_SECONDS if isinstance(work, Stream) else LEAST_SECONDS
    while len(times) < LEAST_RUNS or sum(times) < least:
        seconds, done = _seconds(contender.run)
        times.append(seconds)
        tokens += done if isinstance(work, Stream) else 0
    result["seconds"] = 1000 * sum(times) / tokens if tokens else statistics.median(times)
    result["all_seconds"] = times
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("id", choices=WORKLOADS)
    parser.add_argument("name")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--check", type=Path, help="write what must agree here; time nothing")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.id]
    if arguments.check and arguments.name == OURS:
        from experiments.bench.ours import make_weights

        make_weights(work, arguments.weights)
    contender = build(arguments.name, work, arguments.weights)
    if arguments.check:
        np.save(arguments.check, contender.check())
    else:
        print(json.dumps(measure(work, contender)))


if __name__ == "__main__":
    main()
