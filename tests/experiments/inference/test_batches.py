import itertools
import random

import pytest

from experiments.inference.batches import SENTENCES, WORDS


def batches(lengths, most):
    return SENTENCES.batches(lengths, most, SENTENCES.rows_to_decode)


def test_widths_are_few_and_hold_the_length():
    assert [SENTENCES.width_of(length, 100) for length in (1, 16, 17, 33, 65, 100)] == [
        16, 16, 32, 64, 100, 100,
    ]  # fmt: skip
    assert SENTENCES.width_of(3, 5) == 5
    with pytest.raises(ValueError, match="101 tokens do not fit into 100"):
        SENTENCES.width_of(101, 100)


@pytest.mark.parametrize("batching", [SENTENCES, WORDS])
def test_rows_shrink_where_memory_asks_for_it(batching):
    rows = batching.rows_to_decode
    assert rows(16) == rows(batching.tokens // batching.rows) == batching.rows
    assert rows(batching.tokens // 8) == 8 < batching.rows
    assert rows(16, 2 * batching.logits) == rows(10**9) == batching.rows_to_score(10**9) == 1
    wide = 2 * batching.logits // batching.rows
    assert rows(16, wide) * wide == batching.logits


def test_words_have_one_width():
    assert {WORDS.width_of(length, 40) for length in range(1, 41)} == {40}
    lengths = [3, 9, 30] * 400
    made = WORDS.batches(lengths, 40, WORDS.rows_to_decode)
    shapes = [(len(batch.members), len(batch.filled), batch.width) for batch in made]
    assert shapes == [(512, 512, 40), (512, 512, 40), (176, 256, 40)]


@pytest.mark.parametrize("count", [0, 1, 3, 64, 65, 1000])
def test_every_sentence_is_in_one_batch_beside_its_like(count):
    rng = random.Random(count)
    lengths = [rng.choice([rng.randint(1, 20), rng.randint(1, 300)]) for _ in range(count)]
    made = list(batches(lengths, 300))
    assert sorted(itertools.chain(*(batch.members for batch in made))) == list(range(count))
    for batch in made:
        longest = max(lengths[i] for i in batch.members)
        assert batch.width == SENTENCES.width_of(longest, 300)
        assert len(batch.filled) <= SENTENCES.rows_to_decode(batch.width)
        copies = batch.filled[len(batch.members) :]
        assert batch.filled[: len(batch.members)] == batch.members
        assert set(copies) <= {batch.members[-1]}
    order = [lengths[i] for batch in made for i in batch.members]
    assert order == sorted(lengths)
    shapes = {(len(batch.filled), batch.width) for batch in made}
    assert len(shapes) <= len({batch.width for batch in made}) + 2


def test_only_what_is_left_over_is_filled_with_copies():
    made = list(batches([5] * 70, 300))
    assert [(len(b.members), len(b.filled)) for b in made] == [(64, 64), (6, 16)]
    assert [len(b.filled) for b in batches([5], 300)] == [1]
    assert [len(b.filled) for b in batches([300] * 15, 300)] == [13, 4]
