"""The session of a part: sizes, ceilings, remaining time, and the file of its rows."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.bench.device.sizes import FULL, TINY, Sizes

Row = dict[str, Any]
"""One line of the table: `name`, numbers with their unit in the key, or a `fault`, or `skipped`."""


class Session:
    """A running part. A row that fails does not stop the next ones."""

    def __init__(
        self, emit: Callable[[Row], None], seconds: float, tiny: bool = False,
        ceilings: dict[str, float] | None = None, folder: str = ".",
    ) -> None:  # fmt: skip
        self.sizes: Sizes = TINY if tiny else FULL
        self.tiny, self.folder = tiny, folder
        self.ceilings = ceilings or {}
        """`flops_per_second` of bf16 products and `bytes_per_second` of memory, as measured."""
        self._emit, self._end = emit, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self._end - time.monotonic()

    def row(self, name: str, measure: Callable[[], Row], needs: float = 0.0) -> Row:
        """Runs `measure`, writes its row or the reason why there is none, and returns it.

        needs: the least seconds that it takes.
        """
        if self.left() < needs:
            result: Row = {"skipped": f"needs {needs:.0f} s, {max(0, self.left()):.0f} s were left"}
        else:
            try:
                result = measure()
            except Exception as error:  # whatever it is, the next row may be sound
                result = {"fault": one_line(error)}
        made = with_flags({"name": name} | result)
        self._emit(made)
        return made

    def skip(self, name: str, why: str) -> None:
        self._emit({"name": name, "skipped": why})

    def share_of_peak(self, flops_per_second: float) -> Row:
        """`flops_per_second` and its share of the measured peak, where that is known."""
        return _with_share("flops_per_second", flops_per_second, "share_of_peak", self.ceilings)

    def share_of_bandwidth(self, bytes_per_second: float) -> Row:
        return _with_share("bytes_per_second", bytes_per_second, "share_of_bandwidth",
                           self.ceilings)  # fmt: skip


def _with_share(key: str, rate: float, share: str, ceilings: dict[str, float]) -> Row:
    return {key: rate} | ({share: rate / ceilings[key]} if ceilings.get(key) else {})


def one_line(error: BaseException | str, most: int = 300) -> str:
    """The type of an error and the first non-empty line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (kind + lines[0])[:most]


def with_flags(row: Row) -> Row:
    """The row, with a `flag` where one of its numbers is impossible."""
    row = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    wrong = []
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if key.startswith("share_"):
            if not 0 < value <= 1:
                wrong.append(f"{key} {value:.3g} is not in (0, 1]")
        elif key != "score_difference" and not (math.isfinite(value) and value >= 0):
            wrong.append(f"{key} {value} is no number of this kind")
    if wrong:
        row = row | {"flag": "; ".join(filter(None, [row.get("flag"), *wrong]))}
    # JSON has no word for what is not finite.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether JAX or PyTorch ran out of device memory."""
    message = f"{type(error).__name__} {error}"
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()


def halving(rows: int, measure: Callable[[int], Row]) -> Row:
    """measure(rows), with half as many rows as often as the device runs out of memory."""
    for tried in _halves(rows):
        try:
            return measure(tried)
        except Exception as error:
            if not is_out_of_memory(error) or tried == 1:
                raise
    raise AssertionError("unreachable: one row is the last")


def _halves(rows: int) -> Iterator[int]:
    while rows >= 1:
        yield rows
        rows //= 2
