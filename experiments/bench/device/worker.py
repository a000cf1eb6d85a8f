"""One module of a part, in a process of its own; its rows are appended to a file as they come."""

import argparse
import importlib
import json
from pathlib import Path

from experiments.bench.device.session import Row, Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("rows", type=Path, help="file to append to")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--ceilings", type=json.loads, default={})
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    with given.rows.open("a", encoding="utf-8") as file:

        def emit(row: Row) -> None:
            file.write(json.dumps({"module": given.module} | row) + "\n")
            file.flush()

        session = Session(emit, given.seconds, given.tiny, given.ceilings, str(given.rows.parent))
        importlib.import_module(f"experiments.bench.device.{given.module}").run(session)


if __name__ == "__main__":
    main()
