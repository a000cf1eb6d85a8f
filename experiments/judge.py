"""Process 0's watcher: finds out which process a run is lost by, and tells everybody."""

import dataclasses
import time

from experiments.differences import differences
from experiments.watcher import EXIT_CODE, GO_ON, Watcher
from experiments.wire import Member, Message, Wire

GRACE = 1.5  # seconds in which a death may show itself that explains another process's error


@dataclasses.dataclass
class Pace:
    """What one process's main thread has last been seen to do."""

    ticks: int = 0
    watch: int = 0
    """The number of its watched section, from 1; 0 outside of one."""
    since: float = 0.0
    """When one of the two has changed last, in seconds of the monotonic clock."""

    def note(self, ticks: int, watch: int, now: float) -> None:
        if (self.ticks, self.watch) != (ticks, watch):
            self.ticks, self.watch, self.since = ticks, watch, now


class Judge(Watcher):
    """The watcher of process 0: finds the culprit, and tells everybody."""

    rank = 0

    def __init__(self, members: list[Member], wires: dict[int, Wire], stall_timeout: float) -> None:
        super().__init__(members, wires, stall_timeout)
        now = time.monotonic()
        self._pace = {member.rank: Pace(since=now) for member in members}
        self._present: dict[int, Message] = {}  # who waits for the others, and what it has brought
        self._gone: set[int] = set()  # who has said goodbye
        self._failures: dict[int, Message] = {}  # what each that ends by itself says, in order
        self._verdict_at = float("inf")

    def _obey(self, order: Message) -> None:
        self._failing |= order["kind"] == "fail"
        self._hear(0, order, time.monotonic())

    def _hear(self, rank: int, message: Message, now: float) -> None:
        kind = message["kind"]
        if kind == "beat":
            self._note(rank, message["ticks"], message["watch"], now)
        elif kind == "meet":
            self._present[rank] = message
            self._release_if_due(now)
        elif kind == "fail":
            self._failures[rank] = message
            self._verdict_at = min(self._verdict_at, now + GRACE)
        elif kind in ("bye", "leave"):
            self._gone.add(rank)
            self._release_if_due(now)
            if kind == "leave" or len(self._gone) == len(self.members):
                self._tell({"kind": "end", "error": None, "culprit": None})
                self.over.set()

    def _note(self, rank: int, ticks: int, watch: int, now: float) -> None:
        returns = watch and not self._pace[rank].watch
        self._pace[rank].note(ticks, watch, now)
        if returns:  # the others may have stood because they waited for it
            self._restart(now)

    def _restart(self, now: float) -> None:
        """Whoever stands still has done so from now on."""
        for pace in self._pace.values():
            pace.since = now

    def _release_if_due(self, now: float) -> None:
        """Lets them go on where all have come to a meeting; compares what they bring."""
        never = self._present and self._gone  # one that has left will not come
        if not never and len(self._present) < len(self.members):
            return
        error = self._departed() if never else self._differing()
        value = None if error else self._present[0]["value"]
        reply = {"kind": "met", "error": error, "value": value}
        self._present.clear()
        self._restart(now)
        self._tell(reply)
        self.replies.put(reply)
        if error:
            self.over.set()

    def _departed(self) -> str:
        what = next(iter(self._present.values()))["what"]
        left = ", ".join(str(self.members[rank]) for rank in sorted(self._gone))
        return f"{left} had nothing left to do when others waited to meet for {what}"

    def _differing(self) -> str | None:
        """Which process has brought something else than process 0, and what."""
        told = []
        for member in self.members[1:]:
            ours, theirs = self._present[0], self._present[member.rank]
            if difference := difference_between(ours, theirs):
                told.append(f"{member} differs from process 0 in {difference}")
        others = f"; so do {len(told) - 1} more" if len(told) > 1 else ""
        return told[0] + others if told else None

    def _tell(self, message: Message) -> None:
        for wire in self.wires.values():
            wire.send(message)

    def _condemn(self, line: str, culprit: int | None = None, code: int = EXIT_CODE) -> None:
        """Tells everybody why the run ends, and ends this process unless it does so by itself."""
        self._tell({"kind": "end", "error": line, "culprit": culprit, "code": code})
        self._verdict_at = float("inf")
        if not (self._failing and culprit == 0):
            self._drain()
            self._leave(line, code)
        self.over.set()

    def _lost(self, rank: int) -> None:
        if rank not in self._gone and rank not in self._failures:
            self._condemn(self._death(rank), rank)

    def _pardon(self, seconds: float) -> None:
        for pace in self._pace.values():
            pace.since += seconds

    def _wait(self, seconds: float) -> None:
        super()._wait(min(seconds, self._verdict_at - time.monotonic()))

    def _turn(self) -> None:
        super()._turn()
        if time.monotonic() >= self._verdict_at and not self.over.is_set():
            rank, message = next(iter(self._failures.items()))
            line = f"{self.members[rank]} ended: {message['message']}"
            self._condemn(line, rank, message["code"])

    def _beat(self, now: float) -> None:
        self._note(0, self.ticks, self.watch, now)
        self._tell({"kind": "beat"})
        quiet = self._gone | self._failures.keys()
        for rank in self.wires.keys() - quiet:
            if now - self._heard[rank] > self.stall_timeout:
                self._condemn(self._silence(rank, now), rank)
        if line := self._stalled(now):
            self._condemn(line)

    def _stalled(self, now: float) -> str | None:
        """Who stands still in a watched section, if that has lasted too long.

        Where all wait for one, all stand: the fewest ticks betray it. As long as anybody works
        outside of a watched section the others may have to wait for that.
        """
        active = [r for r in self._pace if r not in self._gone and r not in self._present]
        if not active or not all(self._pace[rank].watch for rank in active):
            return None
        stood = {rank: now - self._pace[rank].since for rank in active}
        # The others may have stopped a beat or two later than the first.
        if max(stood.values()) < self.stall_timeout + 2 * self.beat:
            return None
        standing = [rank for rank in active if stood[rank] >= self.stall_timeout]
        step = min(self._pace[rank].ticks for rank in standing)
        last = [rank for rank in standing if self._pace[rank].ticks == step]
        where = f"stood at step {step} for {max(stood[rank] for rank in last):.0f} s; {GO_ON}"
        if len(last) == len(self.members):
            return f"all {len(last)} processes have {where}"
        names = ", ".join(str(self.members[rank]) for rank in last)
        return f"{names} {'has' if len(last) == 1 else 'have'} {where}"


def difference_between(ours: Message, theirs: Message, most: int = 8) -> str | None:
    """What a process has brought to a meeting that is not what process 0 has; None where equal."""
    if ours["what"] != theirs["what"]:
        return f"what it does: it is at {theirs['what']!r}, process 0 at {ours['what']!r}"
    if not ours["compared"] or ours["value"] == theirs["value"]:
        return None
    what, pair = ours["what"], (ours["value"], theirs["value"])
    fields = differences(*pair) if all(isinstance(value, dict) for value in pair) else []
    # An empty object and none are one to `differences`.
    fields = fields or [f"{pair[0]!r} -> {pair[1]!r}"]
    more = f"; and {len(fields) - most} more" if len(fields) > most else ""
    return f"{what} (process 0 -> it): {'; '.join(fields[:most])}{more}"
