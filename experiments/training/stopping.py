"""SIGINT and SIGTERM: the first finishes the step, saves and exits; a second exits at once."""

import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Exit after all processes have agreed to stop and have saved."""


class StopSignal:
    """Remembers the first signal, so that a loop can finish its step and save.

    Leaving the context after a signal raises SystemExit with 128 + its number.

    Python runs signal handlers between two bytecodes of the main thread, which can be minutes while
    XLA compiles. The interpreter writes a signal's number to a file descriptor when it arrives, and
    a thread reads it: it prints a line at the first signal and exits at the second.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.say: Callable[[str], None] = functools.partial(print, file=sys.stderr)
        self._seen = 0

    def __enter__(self) -> "StopSignal":
        self._ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth
        self._wakeup_before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._remember)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._mouth.close()
        self._listener.join()
        self._ear.close()
        if self.received and kind is None:
            sys.exit(128 + self.received)

    def _remember(self, number: int, _frame: object = None) -> None:
        self.received = self.received or number

    def _listen(self) -> None:
        while numbers := self._ear.recv(64):
            for number in filter(SIGNALS.__contains__, numbers):
                self._seen += 1
                if self._seen > 1:
                    os._exit(128 + number)  # the newest finished checkpoint stays
                self._remember(number)
                name = signal.Signals(number).name
                self.say(f"{name}: finishing the step and saving; again to leave at once")
