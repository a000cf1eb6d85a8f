"""Times compiled programs on a device, and reads their memory from the compiler."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

WARM_UP = 2
LONG, FEW = 5.0, 3
"""A run of more seconds than LONG is timed FEW times only."""
LEAST = 0.01
"""Seconds of one look at the clock: shorter runs are queued several at a time."""


def compile_timed(function: Callable[..., Any], *arguments: Any, **jit: Any) -> tuple[Any, float]:
    """Compiles `function` for the arguments; returns the program and the seconds."""
    begin = time.perf_counter()
    program = jax.jit(function, **jit).lower(*arguments).compile()
    return program, time.perf_counter() - begin


def _seconds(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    """Seconds of one of `calls` runs that are queued together."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = run()
    wait(result)
    return (time.perf_counter() - begin) / calls


def median_seconds(
    run: Callable[[], Any], least_runs: int, wait: Callable[[Any], Any] = jax.block_until_ready
) -> dict[str, float]:
    """`seconds` of a run, the median over `runs` after warm-up, and the `spread` of the middle
    half of them, over the median.

    Runs are queued one behind the other where they are short, and `wait` waits for the last.
    """
    for _ in range(WARM_UP):
        once = _seconds(run, wait, 1)
    calls = max(1, min(100, int(LEAST / max(once, 1e-6))))
    runs = least_runs if once < LONG else min(FEW, least_runs)
    times = sorted(_seconds(run, wait, calls) for _ in range(runs))
    middle = statistics.median(times)
    spread = (times[(3 * runs) // 4] - times[runs // 4]) / middle
    return {"seconds": middle, "runs": runs * calls, "spread": spread}


def program_bytes(program: Any) -> int | None:
    """Bytes of a program, by its compiler: arguments, results of their own, and temporary ones."""
    used = program.memory_analysis()
    if used is None:
        return None
    own = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + own + used.temp_size_in_bytes
