"""A process of a small run, for the tests of its peers: `python peering.py RANK COUNT PORT PLAN`.

PLAN is Python that sees `peers`, unless it imports what it needs to make them itself; what it
prints is the test's to read.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.errors import UserError

STALL = 2


def stop_here() -> None:
    """Says so, and waits to be killed, or for ever."""
    print("here", flush=True)
    while True:
        time.sleep(60)


def main(rank: int, count: int, port: int, plan: str) -> None:
    """Carries out the plan; errors that a user can mend end it as they end the real command."""
    names = {
        "os": os, "signal": signal, "sys": sys, "time": time, "stop_here": stop_here, "rank": rank,
        "port": port, "count": count,
    }  # fmt: skip
    try:
        if "import" not in plan:
            from experiments.peers import Peers

            names["peers"] = Peers.connect("127.0.0.1", port, rank, count, 20, STALL)
        exec(plan, names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
