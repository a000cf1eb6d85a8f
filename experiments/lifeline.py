"""A process of its own that holds on to JAX's coordinator for a worker.

JAX ends a process by a C++ abort the moment that its connection to the coordinator closes, before
anybody could say who died. So a worker speaks to the coordinator through this process, which
passes all bytes on, and which keeps the worker's end open and silent where the other end closes.
It stands on the standard library alone, and is a process, since a thread of Python's might wait
for the very lock that JAX holds while it waits for the coordinator.

`python lifeline.py HOST PORT` prints the port that it listens at on 127.0.0.1, and ends with its
standard input.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time


def reach(address: tuple[str, int]) -> socket.socket:
    """A connection to the coordinator; tries for ever, for the worker knows when to give up."""
    while True:
        try:
            connection = socket.create_connection(address, timeout=10)
            connection.settimeout(None)
            return connection
        except OSError:
            time.sleep(0.2)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Passes on all bytes until one of the two closes."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def hold(worker: socket.socket, address: tuple[str, int]) -> None:
    """Serves one connection of the worker's; only the worker may end it."""
    coordinator = reach(address)
    threading.Thread(target=pump, args=(coordinator, worker), daemon=True).start()
    pump(worker, coordinator)
    coordinator.close()


def serve(listener: socket.socket, address: tuple[str, int]) -> None:
    """Holds every connection that the worker opens."""
    kept = []  # a socket that nobody refers to is closed
    while True:
        worker, _ = listener.accept()
        kept.append(worker)
        threading.Thread(target=hold, args=(worker, address), daemon=True).start()


def main(host: str, port: str) -> None:
    """Serves until standard input ends, which it does with the worker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the worker, who may want to save
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener, (host, int(port))), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    while os.read(0, 1):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
