"""The thread of each process that hears of the others, and ends the process where one is lost.

A star: everybody speaks to process 0, whose watcher judges (judge.py). All sockets belong to this
thread, which waits for nothing; the main thread, which may hang in a collective, gives it orders.
"""

import collections
import contextlib
import os
import queue
import selectors
import socket
import threading
import time
from typing import NoReturn

from experiments.wire import Member, Message, Wire

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
GO_ON = "the same command goes on from the newest checkpoint"


class Watcher(threading.Thread):
    """Reads, sends, and looks about every second; what to make of it is up to the two kinds."""

    rank: int

    def __init__(self, members: list[Member], wires: dict[int, Wire], stall_timeout: float) -> None:
        super().__init__(name="watcher", daemon=True)
        self.members, self.wires, self.stall_timeout = members, wires, stall_timeout
        self.beat = min(1.0, stall_timeout / 4)  # seconds between two signs of life
        self.ticks = self.watch = 0  # set by the main thread
        self.replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.over = threading.Event()
        """Nobody watches any more: all have said goodbye, or have been told why they end."""
        self._orders: collections.deque[Message] = collections.deque()
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._heard = dict.fromkeys(wires, time.monotonic())
        self._failing = False
        self._next_beat = 0.0
        self._last_turn = time.monotonic()
        # The connection of a killed process must close though a child of its lives on.
        os.register_at_fork(after_in_child=self._close)

    def order(self, message: Message) -> None:
        """Called by the main thread: something to tell."""
        self._orders.append(message)
        # Refused where it has been woken more often than it could answer, or has ended.
        with contextlib.suppress(OSError):
            self._mouth.send(b"!")

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self._turn()
        except Exception as error:
            self._leave(f"the watcher of {self.members[self.rank]} has failed: {error!r}")
        self._drain()
        self._close()

    def _turn(self) -> None:
        """Reads all that there is before it judges anything."""
        self._wait(min(self._next_beat - time.monotonic(), self.beat))
        now = time.monotonic()
        if (stopped := now - self._last_turn) > 3 * self.beat:  # and heard nobody meanwhile
            self._heard = {rank: heard + stopped for rank, heard in self._heard.items()}
            self._pardon(stopped)
        self._last_turn = now
        while self._orders and not self.over.is_set():
            self._obey(self._orders.popleft())
        for rank, wire in list(self.wires.items()):
            for message in wire.receive():
                self._heard[rank] = now
                if not self.over.is_set():
                    self._hear(rank, message, now)
            if wire.closed and not self.over.is_set():
                del self.wires[rank]
                wire.socket.close()
                self._lost(rank)
        if now >= self._next_beat and not self.over.is_set():
            self._next_beat = now + self.beat
            self._beat(now)

    def _wait(self, seconds: float) -> None:
        """Until something can be read or sent, an order comes, or the time is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._ear, selectors.EVENT_READ)
            for wire in self.wires.values():
                sending = selectors.EVENT_WRITE if wire.pending else 0
                selector.register(wire, selectors.EVENT_READ | sending)
            selector.select(max(seconds, 0.0))
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)
        for wire in self.wires.values():
            wire.flush()

    def _drain(self, seconds: float = 1.0) -> None:
        """Lets the last messages arrive: sends what is left, and waits for the others to close."""
        deadline = time.monotonic() + seconds
        said = set()
        while self.wires and time.monotonic() < deadline:
            self._wait(0.05)
            for rank, wire in list(self.wires.items()):
                if not wire.pending and rank not in said:
                    said.add(rank)
                    with contextlib.suppress(OSError):
                        wire.socket.shutdown(socket.SHUT_WR)
                for _ in wire.receive():
                    pass
                if wire.closed:
                    del self.wires[rank]
                    wire.socket.close()

    def _close(self) -> None:
        for end in (*(wire.socket for wire in self.wires.values()), self._ear, self._mouth):
            end.close()

    def _leave(self, line: str, code: int = EXIT_CODE) -> NoReturn:
        """Ends the process from this thread, since the main thread may hang."""
        # Not sys.stderr, whose lock the main thread may hold; and where nobody reads, nor this.
        start = "\n" if os.isatty(2) else ""  # a progress bar may be there
        text = f"{start}error: {line}\n".encode()
        saying = threading.Thread(target=os.write, args=(2, text), daemon=True)
        saying.start()
        saying.join(2)
        os._exit(code)

    def _silence(self, rank: int, now: float) -> str:
        seconds = now - self._heard[rank]
        return f"{self.members[rank]} has not been heard of for {seconds:.0f} s; {GO_ON}"

    def _death(self, rank: int) -> str:
        member = self.members[rank]
        return f"{member} died: its connection closed without a goodbye; {GO_ON}"

    def _pardon(self, seconds: float) -> None:
        """Nobody stood still in the time that this process itself was stopped."""

    def _obey(self, order: Message) -> None:
        raise NotImplementedError

    def _hear(self, rank: int, message: Message, now: float) -> None:
        raise NotImplementedError

    def _lost(self, rank: int) -> None:
        raise NotImplementedError

    def _beat(self, now: float) -> None:
        raise NotImplementedError


class Follower(Watcher):
    """The watcher of all others: believes process 0, and looks whether that lives."""

    def __init__(self, rank: int, members: list[Member], wire: Wire, stall_timeout: float) -> None:
        super().__init__(members, {0: wire}, stall_timeout)
        self.rank = rank

    def _obey(self, order: Message) -> None:
        self._failing |= order["kind"] == "fail"
        self.wires[0].send(order)

    def _hear(self, rank: int, message: Message, now: float) -> None:
        if message["kind"] == "met":
            self.replies.put(message)
            if message["error"]:
                self.over.set()
        elif message["kind"] == "end":
            if message["error"] and not (self._failing and message["culprit"] == self.rank):
                self._leave(message["error"], message["code"])
            self.over.set()

    def _lost(self, rank: int) -> None:
        self._leave(self._death(0))

    def _beat(self, now: float) -> None:
        self.wires[0].send({"kind": "beat", "ticks": self.ticks, "watch": self.watch})
        # Process 0's own judgement is to come first, where it still judges.
        if now - self._heard[0] > self.stall_timeout + 3 * self.beat:
            self._leave(self._silence(0, now))
