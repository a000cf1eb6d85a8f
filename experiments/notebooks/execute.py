"""Executes the notebooks: scripts in the percent format in, executed copies (.ipynb) out."""

import os
from collections.abc import Callable
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode, write

from experiments.errors import UserError

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NAMES = ("anatomy", "reading", "patching", "derivatives", "research_day")
SECONDS_A_CELL = 1800
TINY = "tiny"
_BACKEND = "module://matplotlib_inline.backend_inline"  # pictures into the notebook, come what may


class NotebookError(UserError):
    """Which cell of which notebook failed, and why."""


def parse(name: str) -> NotebookNode:
    """The script as a notebook without outputs; the same script always gives the same notebook."""
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"{name}-{number}", NotebookNode()
    return notebook


def size() -> str:
    """normal, or tiny: a minute for all, to see whether they run."""
    return os.environ.get("TFM_NOTEBOOK_SIZE", "normal")


def _environment() -> dict[str, str]:
    """What a kernel runs in; tiny work is mostly compilation, so XLA then optimises little."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if size() == TINY else {}
    return os.environ | {"MPLBACKEND": _BACKEND} | quick


def execute(name: str, done: Callable[[], None] = lambda: None) -> NotebookNode:
    """Runs every cell in a fresh kernel, in the environment and with the packages of this process.

    `done` is called after each. Raises NotebookError naming the first cell that failed.
    """
    notebook = parse(name)
    client = NotebookClient(
        notebook, timeout=SECONDS_A_CELL, kernel_name="python3", record_timing=False,
        coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}},
        extra_arguments=["--log-level=ERROR"], on_cell_complete=lambda **cell: done(),
    )  # fmt: skip
    try:
        client.execute(env=_environment())
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(_explain(name, notebook, error)) from None
    notebook.metadata.language_info = NotebookNode(name="python")  # the kernel's names its version
    return notebook


def _explain(name: str, notebook: NotebookNode, error: Exception) -> str:
    """`name.py, cell 7 (`first line`): what went wrong`, with the traceback of a failed cell."""
    failed = [
        (number, cell)
        for number, cell in enumerate(notebook.cells, start=1)
        if cell.cell_type == "code" and any(o.output_type == "error" for o in cell.outputs)
    ]
    if not failed:  # the kernel died, or a cell took too long
        return f"{name}.py: {error}"
    number, cell = failed[0]
    return f"{name}.py, cell {number} (`{cell.source.strip().splitlines()[0]}`):\n{error}"


def save(name: str, notebook: NotebookNode) -> Path:
    """Writes the executed copy beside the script; its path."""
    path = FOLDER / f"{name}.ipynb"
    write(notebook, path)
    return path
