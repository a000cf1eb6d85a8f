"""The results as tables, one for each part, with the failures below."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.reporting.tables import table

Format = Callable[[Any], str]


def _billions(value: float) -> str:
    return f"{value / 1e9:.3g}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


COLUMNS: dict[str, tuple[str, Format]] = {
    "rows": ("rows", str),
    "seconds": ("ms", lambda s: f"{1000 * s:.4g}"),
    "spread": ("spread", lambda s: f"{s:.0%}"),
    "runs": ("runs", str),
    "compile_seconds": ("compile, s", lambda s: f"{s:.1f}"),
    "source_tokens_per_second": ("source tok/s", lambda n: f"{n:,.0f}"),
    "target_tokens_per_second": ("target tok/s", lambda n: f"{n:,.0f}"),
    "flops_per_second": ("TFLOP/s", lambda f: f"{f / 1e12:.3g}"),
    "share_of_peak": ("of peak", _percent),
    "bytes_per_second": ("GB/s", _billions),
    "share_of_bandwidth": ("of bandwidth", _percent),
    "peak_bytes": ("peak GB", _billions),
    "program_bytes": ("program GB", _billions),
    "sound_seconds": ("sound way, ms", lambda s: f"{1000 * s:.4g}"),
    "scatter_seconds": ("scatter, ms", lambda s: f"{1000 * s:.4g}"),
    "ratio": ("ratio", lambda r: f"{r:.3g}"),
    "error": ("error", lambda e: f"{e:.1e}"),
    "bound": ("bound", lambda b: f"{b:.0e}"),
    "different": ("different", str),
    "score_difference": ("their scores", lambda d: f"{d:+.2g}"),
    "minutes": ("minutes", lambda m: f"{m:.2f}"),
    "word_error_rate": ("WER", _percent),
    "sound": ("sound versions", str),
    "cudnn": ("cuDNN", lambda fused: "yes" if fused else "no"),
    "passed": ("", lambda passed: "passed" if passed else "FAILED"),
}
"""key of a row -> heading, and how it is written. What is not here is in the file alone."""


def part_tables(
    console: Console, name: str, rows: list[dict[str, Any]], tiny: bool
) -> Iterator[Table]:
    """The rows of one part with all their columns, split into tables that fit the console."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    unlimited = console.options.update(max_width=10_000)
    title = f"{name} (tiny, CPU: no measurement)" if tiny else name
    while keys:
        count = len(keys)
        made = _part_table(title, rows, keys)
        while count > 1 and console.measure(made, options=unlimited).maximum > console.width:
            count -= 1
            made = _part_table(title, rows, keys[:count])
        yield made
        keys = keys[count:]


def _part_table(title: str, rows: list[dict[str, Any]], keys: list[str]) -> Table:
    made = table(title, [""], [COLUMNS[key][0] for key in keys])
    for row in rows:
        cells = ["" if row.get(k) is None else COLUMNS[k][1](row[k]) for k in keys]
        style = "bold red" if row.get("passed") is False else None
        made.add_row(row["name"] + (" (!)" if row.get("flag") else ""), *cells, style=style)
    return made


def kernel_table(row: dict[str, Any]) -> Table:
    """The longest kernels of one profile."""
    made = table(f"longest kernels of one step, {row['name']}", [], ["ms", "calls", "of kernels"])
    made.add_column("kernel", overflow="fold")  # a name has hundreds of letters and no space
    for kernel in row["kernels"]:
        share = f"{kernel['share_of_kernels']:.1%}"
        numbers = f"{1000 * kernel['seconds']:.3g}", str(kernel["calls"]), share
        made.add_row(*numbers, Text(kernel["kernel"]))
    return made


def remarks(results: dict[str, Any]) -> list[str]:
    """One line for each row that is missing, wrong or doubtful."""
    lines = []
    for name, part in results["parts"].items():
        if part["fault"]:
            lines.append(f"fault: {name}: {part['fault']}")
        for row in part["rows"]:
            for kind in ("fault", "skipped", "flag", "note"):
                if row.get(kind):
                    shown = "(!)" if kind == "flag" else kind
                    lines.append(f"{shown}: {name}: {row['name']}: {row[kind]}")
            if row.get("passed") is False:
                lines.append(f"FAILED: {name}: {row['name']}")
    return lines


def heading(machine: dict[str, Any]) -> str:
    """The card, its driver and the versions, in a line."""
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    return f"{machine.get('card')}{driver}; {versions}"


def show(console: Console, results: dict[str, Any]) -> None:
    """Prints all tables, the most important last."""
    measured = {
        name: [row for row in part["rows"] if row.keys() & COLUMNS.keys()]
        for name, part in results["parts"].items()
    }
    for rows in measured.values():
        for row in rows:
            if row.get("kernels"):
                console.print(kernel_table(row))
    for name, rows in measured.items():
        if rows:
            console.print(*part_tables(console, name, rows, results["tiny"]))
    if results["tiny"]:
        console.print(Text("TINY, on the CPU: it ran; its times and shares mean nothing."))
    console.print(Text(heading(results["machine"])))
    for line in remarks(results):
        console.print(Text(line, style="bold red" if line.startswith("FAILED") else ""))
