"""The data of the workloads: seeded, and the same for every contender."""

from typing import Any

import numpy as np

from experiments.bench.workloads import Attention, Decoding, Stream, Training
from experiments.data.pronunciations import load_cmudict

BOS, EOS = 1, 2


def tokens(work: Training | Decoding) -> tuple[np.ndarray, np.ndarray]:
    """Source and target ids [rows, length], none of them padding (0), start or end symbol."""
    rng, c = np.random.default_rng(0), work.config
    lengths = (work.length,) * 2 if isinstance(work, Training) else (work.source, work.target)
    sizes = (c.source_vocab_size or c.vocab_size, c.vocab_size)
    source, target = (
        rng.integers(3, size, (work.rows, n)) for size, n in zip(sizes, lengths, strict=True)
    )
    return source, target


def examples(work: Stream) -> list[dict[str, Any]]:
    """Random ids, a source as long as a word of CMUdict with its end symbol, and a target as long
    as one of its pronunciations; in an order that the seed chose."""
    rng = np.random.default_rng(0)
    lengths = [
        (len(word) + 1, len(p) + 1) for word, all_of in load_cmudict().items() for p in all_of
    ]
    chosen = rng.permutation([n for n in lengths if n[0] <= work.source and n[1] <= work.target])
    return [
        {
            side: rng.integers(3, work.config.vocab_size, n, np.int32)
            for side, n in zip(("source", "target"), pair, strict=True)
        }
        for pair in chosen[: work.examples]
    ]


CHECKED = 64
"""Examples of a `Stream` whose loss all contenders must agree on."""


def attention_inputs(work: Attention, layout: str) -> list[np.ndarray]:
    """Query, key and value, [rows, heads, length, features] (BHLD) or heads third (BLHD)."""
    rng = np.random.default_rng(0)
    shape = (work.rows, work.heads, work.length, work.features)
    made = [rng.standard_normal(shape, np.float32) for _ in range(3)]
    return made if layout == "BHLD" else [np.ascontiguousarray(x.swapaxes(1, 2)) for x in made]
