"""Packed batches: several short examples to a row, so that little padding is wasted.

Grain shuffles, repeats, batches and keeps the position. The packing is planned once, in plain
Python: Grain's packer takes ten times as long (7 s against 0.7 s of a core for the 117,884
examples of CMUdict), and repeats it in every epoch, on the cores that the training needs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from experiments.data.vocabulary import PAD

OPEN_ROWS = 32  # rows tried before a new one is started; more rows hardly reduce the padding


def fit_rows(lengths: Iterable[tuple[int, int]], capacity: tuple[int, int]) -> Iterator[int]:
    """Puts each example, in order, into the first open row where both its lengths fit.

    Yields the row number of each example. At most `OPEN_ROWS` rows are open: the oldest is closed
    first.

    Raises:
      ValueError: an example longer than a row; it is never cut.
    """
    rows = 0
    open_rows: list[tuple[int, list[int]]] = []  # number and room left, oldest first
    for example, (source, target) in enumerate(lengths):
        if source > capacity[0] or target > capacity[1]:
            raise ValueError(
                f"example {example} has lengths {(source, target)}, more than a row's {capacity}"
            )
        for row, room in open_rows:  # noqa: B007 (row is used after the loop)
            if room[0] >= source and room[1] >= target:
                break
        else:
            row, room = rows, list(capacity)
            rows += 1
            open_rows.append((row, room))
            del open_rows[:-OPEN_ROWS]
        room[0] -= source
        room[1] -= target
        yield row


def first_fit(lengths: Iterable[tuple[int, int]], capacity: tuple[int, int]) -> list[list[int]]:
    """The examples of each row that `fit_rows` fills. Raises ValueError as it does."""
    rows: list[list[int]] = []
    for example, row in enumerate(fit_rows(lengths, capacity)):
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
    return rows


def pack(
    sequences: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int
) -> list[np.ndarray]:
    """The rows of one side as int32 [N, length]: ids, segment ids and positions.

    Segments number from 1 in a row and positions from 0 in a segment; the rest is padding, 0.
    """
    ids, segments, positions = (np.full((len(rows), length), PAD, np.int32) for _ in range(3))
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, start=1):
            end = start + len(sequences[member])
            ids[row, start:end] = sequences[member]
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            start = end
    return [ids, segments, positions]


def packed_rows(
    examples: Sequence[dict[str, Any]], source_length: int, target_length: int
) -> dict[str, np.ndarray]:
    """All examples, in order, as rows: int32 [N, S] `source`, `source_segment_ids`,
    `source_positions`, and int32 [N, T] the same for `target`.

    Raises:
      ValueError: an example longer than a row.
    """
    lengths = [(len(e["source"]), len(e["target"])) for e in examples]
    plan = first_fit(lengths, (source_length, target_length))
    arrays = {}
    for side, length in (("source", source_length), ("target", target_length)):
        names = (side, f"{side}_segment_ids", f"{side}_positions")
        packed = pack([e[side] for e in examples], plan, length)
        arrays |= dict(zip(names, packed, strict=True))
    return arrays


def endless_batches(
    count: int,
    load: Callable[[np.ndarray], dict[str, np.ndarray]],
    *,
    rows: int,
    seed: int,
    own: slice = slice(None),
) -> grain.DatasetIterator:
    """Calls `load` on `rows` of the numbers below `count` at a time, in a new order each epoch.

    `own`: the part of each batch that this process loads, where several share it.
    """
    numbers = grain.MapDataset.range(count).seed(seed).shuffle().repeat(None).batch(rows)
    stream = numbers.map(lambda chosen: load(chosen[own]))
    # No reader threads: rows in memory, or mapped, are read faster than a thread is scheduled.
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def packed_batches(
    examples: Sequence[dict[str, Any]],
    *,
    rows: int,
    source_length: int,
    target_length: int,
    seed: int,
    own: slice = slice(None),
) -> grain.DatasetIterator:
    """Endless batches of `rows` packed rows, in a new order each epoch; of each batch the rows
    `own`.

    The seed fixes which examples share a row. Examples of a row do not attend to each other, so
    this affects only which examples are in a batch. `get_state` and `set_state` resume exactly.

    Raises:
      ValueError: an example longer than a row.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    arrays = packed_rows([examples[i] for i in order], source_length, target_length)
    return endless_batches(
        len(arrays["source"]),
        lambda chosen: {name: array[chosen] for name, array in arrays.items()},
        rows=rows,
        seed=seed,
        own=own,
    )
