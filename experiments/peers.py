"""The processes of a run, as the main thread of each sees the others."""

import contextlib
import json
import queue
from collections.abc import Iterator
from typing import Any

from experiments.errors import exit_code, may_pass
from experiments.judge import GRACE, Judge
from experiments.watcher import EXIT_CODE, Follower, Watcher
from experiments.wire import Message, PeerError, gather, join


class Peers:
    """Meets the other processes, shows them that this one moves, and ends it with them.

    Where another process dies, is silent or stands still for too long, this process ends with
    exit code 75 and one line on standard error that names the other; where it ends with an error
    of its own, see `fail`. A process alone has nobody to wait for: every call returns at once.
    """

    def __init__(self, rank: int = 0, count: int = 1, watcher: Watcher | None = None) -> None:
        self.rank, self.count, self._watcher = rank, count, watcher
        self._watches = 0
        if watcher:
            watcher.start()

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        rank: int,
        count: int,
        connect_timeout: float = 300,
        stall_timeout: float = 600,
    ) -> "Peers":
        """Waits until all `count` processes have found process 0, which listens at `host`:`port`.

        Raises PeerError where that takes more than `connect_timeout` seconds.
        """
        if count == 1:
            return cls()
        if rank == 0:
            wires, members = gather(port, count, connect_timeout)
            return cls(rank, count, Judge(members, wires, stall_timeout))
        wire, members = join(host, port, rank, count, connect_timeout)
        return cls(rank, count, Follower(rank, members, wire, stall_timeout))

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which alone writes and speaks."""
        return self.rank == 0

    def meet(self, what: str, value: Any = None) -> None:
        """Waits, as long as they live, until all have come here, and compares what they bring.

        Args:
          what: the name of the value in an error, "config" for one.
          value: what JSON can say; a dict has its differing fields named.

        Raises PeerError in every process where one differs from process 0; there is nothing left
        then to `fail` or `close`.
        """
        if self._watcher:
            self._ask(what, value, compared=True)

    def from_first(self, value: Any = None) -> Any:
        """Process 0's `value`, which JSON can say, in every process; waits for all as `meet` does.

        Tuples arrive as lists, as JSON has them; in process 0 too.
        """
        if not self._watcher:
            return _as_json(value)
        return self._ask("a value of process 0", value if self.is_first else None, compared=False)

    def _ask(self, what: str, value: Any, compared: bool) -> Any:
        order = {"kind": "meet", "what": what, "value": _as_json(value), "compared": compared}
        if self._watcher.over.is_set():
            raise PeerError(f"there is nobody left to meet for {what}")
        self._watcher.order(order)
        reply = self._reply(what)
        if reply["error"]:
            raise PeerError(reply["error"])
        return reply["value"]

    def _reply(self, what: str) -> Message:
        while True:
            over = self._watcher.over.is_set()  # read first: the reply may come just before it
            with contextlib.suppress(queue.Empty):
                return self._watcher.replies.get(timeout=1)
            if over:
                raise PeerError(f"there is nobody left to meet for {what}")

    def tick(self, step: int) -> None:
        """Notes, for the watcher to see, that the main thread has come to `step`."""
        if self._watcher:
            self._watcher.ticks = step

    def begin_watch(self) -> None:
        """From now on a lack of ticks counts as a stall."""
        self._watches += 1
        if self._watcher:
            self._watcher.watch = self._watches

    def end_watch(self) -> None:
        """From now on this process may take as long as it likes between two ticks."""
        if self._watcher:
            self._watcher.watch = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """`begin_watch` and `end_watch` around a block."""
        self.begin_watch()
        try:
            yield
        finally:
            self.end_watch()

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """The reverse, inside a watched block: what takes its time, such as compiling."""
        self.end_watch()
        try:
            yield
        finally:
            self.begin_watch()

    def close(self) -> None:
        """Says goodbye, and waits until all have, `stall_timeout` seconds at most.

        Afterwards nobody takes this process for dead.
        """
        if not self._watcher or self._watcher.over.is_set():
            return
        self.end_watch()
        self._watcher.order({"kind": "bye"})
        if not self._watcher.over.wait(self._watcher.stall_timeout) and self.is_first:
            self._watcher.order({"kind": "leave"})
        self._watcher.join(5)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error of its own, and why.

        They end within seconds with its exit code, or with 75 where a device or the network has
        failed, and say so. Where another process has died, whose death may be what the error
        comes from, this one ends as the others do, with 75.
        """
        if not self._watcher or self._watcher.over.is_set():
            return
        stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
        why = "it was told to stop" if stopped else str(error) or type(error).__name__
        told = {
            "message": " ".join(why.split())[:1000],
            "code": EXIT_CODE if may_pass(error) else exit_code(error),
        }
        self._watcher.order({"kind": "fail"} | told)
        self._watcher.over.wait(GRACE + 3)
        self._watcher.join(2)


def _as_json(value: Any) -> Any:
    """The value as it is after a journey; TypeError where JSON cannot say it."""
    return json.loads(json.dumps(value))
