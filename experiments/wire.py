"""Lines of JSON between the processes of a run, and how they find each other."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.errors import UserError

Message = dict[str, Any]
VERSION = "tfm peers 2"


class PeerError(UserError):
    """Why the processes of a run cannot work together."""


class Member(NamedTuple):
    """A process of the run, as the others name it."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host}, pid {self.pid})"


def myself(rank: int) -> Member:
    """This process."""
    return Member(rank, socket.gethostname(), os.getpid())


class Wire:
    """One end of a connection: whole messages in and out, and no call that waits."""

    def __init__(self, connection: socket.socket, read: bytes = b"") -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.closed = connection, False
        self._in, self._out = read, bytearray()

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether something has yet to be sent."""
        return bool(self._out) and not self.closed

    def send(self, message: Message) -> None:
        """Sends what the system takes at once; `flush` sends the rest."""
        self._out += as_line(message)
        self.flush()

    def flush(self) -> None:
        try:
            while self.pending:
                del self._out[: self.socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # what the other has sent may still be read

    def receive(self) -> Iterator[Message]:
        """The whole messages that have arrived; `closed` is true where they were the last."""
        try:
            while data := self.socket.recv(1 << 16):
                self._in += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._in = self._in.split(b"\n")
        yield from map(json.loads, lines)


def as_line(message: Message) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


def read_line(connection: socket.socket, deadline: float) -> tuple[Message, bytes]:
    """(the first message, the bytes after it); ValueError where it is none of ours.

    Raises ConnectionError where the other leaves before, and TimeoutError at `deadline`.
    """
    data = b""
    while b"\n" not in data:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (more := connection.recv(4096)):
            raise ConnectionError("it closed the connection")
        data += more
        if len(data) > 1 << 20:
            raise ValueError("no line")
    line, rest = data.split(b"\n", 1)
    message = json.loads(line)
    if not isinstance(message, dict) or message.get("version") != VERSION:
        raise ValueError("another program")
    return message, rest


def _has_left(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _refusal(hello: Message, count: int, present: dict[int, tuple[Any, Member]]) -> str | None:
    """Why a process may not join, if so."""
    rank = hello["rank"]
    if hello["count"] != count:
        return f"it was told of {hello['count']} processes, and process 0 of {count}"
    if not 0 < rank < count:
        return f"there is no such number among {count} processes"
    if rank in present and not _has_left(present[rank][0].socket):
        return f"{present[rank][1]} has that number"
    return None


def gather(port: int, count: int, timeout: float) -> tuple[dict[int, Wire], list[Member]]:
    """Waits, as process 0, for all the others; (a wire to each, all members by number).

    Raises PeerError where the port is taken, or where some do not come within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise PeerError(f"process 0 cannot listen at port {port}: {error.strerror}") from None
    present: dict[int, tuple[Wire, Member]] = {}
    with listener:
        while len(present) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(r) for r in range(1, count) if r not in present]
                raise PeerError(
                    f"process 0 has waited {timeout:g} s at port {port} for {count - 1} others, "
                    f"and {len(present)} came; missing: {', '.join(missing)}. Check that each was "
                    "started with the same coordinator and number of processes"
                ) from None
            _admit(connection, count, present)
    members = [myself(0), *(present[rank][1] for rank in range(1, count))]
    welcome = {"version": VERSION, "members": members}
    for wire, _ in present.values():
        wire.send(welcome)
    return {rank: wire for rank, (wire, _) in present.items()}, members


def _admit(connection: socket.socket, count: int, present: dict[int, tuple[Wire, Member]]) -> None:
    """Takes in a process that says who it is; strangers are left alone."""
    try:
        hello, rest = read_line(connection, time.monotonic() + 2)
        member = Member(int(hello["rank"]), str(hello["host"]), int(hello["pid"]))
        why = _refusal(hello, count, present)
        if why is None:
            present[member.rank] = (Wire(connection, rest), member)
            return
        connection.sendall(as_line({"version": VERSION, "refused": why}))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    connection.close()


def join(host: str, port: int, rank: int, count: int, timeout: float) -> tuple[Wire, list[Member]]:
    """Finds process 0, and waits until all have come; (the wire to it, all members by number).

    Raises PeerError where that takes more than `timeout` seconds, and where process 0 refuses.
    """
    deadline = time.monotonic() + timeout
    hello = {"version": VERSION, "count": count, **myself(rank)._asdict()}
    met, why = False, "no time"
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 5))
            connection.sendall(as_line(hello))
            met = True
            welcome, rest = read_line(connection, deadline)
            break
        except ValueError:
            connection.close()
            raise PeerError(
                f"{host}:{port} answers, but not as process 0 of a run of this version: check "
                "that no other program has that port"
            ) from None
        except OSError as error:
            met = met and not isinstance(error, ConnectionRefusedError)
            why = error.strerror or str(error)
            if connection:
                connection.close()
            time.sleep(min(0.3, max(deadline - time.monotonic(), 0)))
    else:
        raise PeerError(_in_vain(met, f"{host}:{port}", timeout, why))
    if "refused" in welcome:
        connection.close()
        raise PeerError(f"process {rank} may not join at {host}:{port}: {welcome['refused']}")
    return Wire(connection, rest), [Member(*member) for member in welcome["members"]]


def _in_vain(met: bool, address: str, timeout: float, why: str) -> str:
    if met:
        return (
            f"process 0 answers at {address}, but not all processes came within {timeout:g} s: "
            "check that each was started with the same coordinator and number of processes"
        )
    return (
        f"no process 0 could be reached at {address} within {timeout:g} s ({why}): check that it "
        f"was started there, and that the port is open to {socket.gethostname()}"
    )
