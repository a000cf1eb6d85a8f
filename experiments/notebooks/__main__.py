"""Executes the notebooks, and writes the executed copies (.ipynb) beside the scripts.

With TFM_NOTEBOOK_SIZE=tiny it only checks that they run, in a minute, and writes nothing.
"""

import argparse
import sys
import time

from experiments.errors import EXTRAS, UserError, not_installed
from experiments.progress import ProgressBar


def main() -> None:
    """Executes all notebooks, or those named; exit code 1 names the cell that failed."""
    try:
        from experiments.notebooks.execute import NAMES, TINY, execute, parse, save, size
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"error: {not_installed(error.name)}", file=sys.stderr)
        sys.exit(2)
    parser = argparse.ArgumentParser(prog="python -m experiments.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names
    if unknown := set(names) - set(NAMES):
        parser.error(f"no notebook named {', '.join(sorted(unknown))}")
    cells = sum(cell.cell_type == "code" for name in names for cell in parse(name).cells)
    with ProgressBar("executing cells", cells) as bar:
        for name in names:
            started = time.monotonic()
            bar.update(name)
            try:
                notebook = execute(name, bar.advance)
            except UserError as error:
                bar.say(f"error: {error}")
                sys.exit(1)
            result = "it runs" if size() == TINY else f"written to {save(name, notebook).name}"
            print(f"{name}: {time.monotonic() - started:.0f} s, {result}", flush=True)


if __name__ == "__main__":
    main()
