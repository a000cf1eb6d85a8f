import dataclasses
import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest

from experiments.data import token_store as stores
from experiments.data.cleaning import Clean, Limits
from experiments.data.packing import packed_batches, packed_rows
from experiments.data.subwords import Subwords, train_subwords
from experiments.data.token_store import (
    Side,
    Store,
    StoreError,
    fetch_store,
    open_store,
    plan_rows,
    stored_batches,
    write_store,
)
from experiments.errors import UserError

MOST = (16, 18)
CORPORA = {"train": {"source": "aa", "target": "bb"}, "test": {"pairs": "cc"}}
WORDS = ["Hund", "Katze", "Baum", "Haus", "sieht", "findet", "Straße", "öffnet"]


def pairs_of(count, seed=0):
    rng = random.Random(seed)
    return [
        tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2))
        for _ in range(count)
    ]


PAIRS = pairs_of(400)
PAIRS += PAIRS[:20]
ANY_RATIO = Limits(ratio=100)


def clean(pairs=PAIRS):
    return Clean(pairs, ANY_RATIO)


@pytest.fixture(scope="module")
def source():
    return train_subwords([s for s, _ in PAIRS], 300, "bpe")


@pytest.fixture(scope="module")
def target():
    return train_subwords([t for _, t in PAIRS], 310, "bpe")


@pytest.fixture(scope="module")
def expected(source, target):
    """The ids of the pairs that are kept."""
    found = [(source.encode(s), target.encode(t)) for s, t in dict.fromkeys(PAIRS)]
    return [(s, t) for s, t in found if len(s) <= MOST[0] and len(t) <= MOST[1]]


@pytest.fixture(scope="module")
def written(source, target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "store"
    return folder, write_store(folder, clean(), source, target, MOST, CORPORA)


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the store, to be damaged."""
    return shutil.copytree(written[0], tmp_path / "store")


def ids_of(store):
    return [(store.source[i].tolist(), store.target[i].tolist()) for i in range(len(store))]


def as_examples(store):
    return [{"source": s, "target": t} for s, t in ids_of(store)]


# ---- writing and opening


@pytest.mark.parametrize("chunk", [1, 7, 2**13])
def test_a_store_holds_the_ids_of_all_pairs_that_fit(
    source, target, expected, tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(stores, "_CHUNK", chunk)
    store = write_store(tmp_path / "a/store", clean(), source, target, MOST, CORPORA)
    assert ids_of(store) == expected and 50 < len(store) == len(expected) < 350
    assert store.tokens == tuple(sum(len(pair[i]) for pair in expected) for i in range(2))
    assert store.source.lengths(np.array([3, 0])).tolist() == [
        len(expected[3][0]),
        len(expected[0][0]),
    ]
    assert store.facts["longest"] == [max(len(pair[i]) for pair in expected) for i in range(2)]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["store"]


def test_the_counts(written, expected):
    store = written[1]
    cleaned = store.facts["cleaned"]
    assert cleaned["pairs"] == 420 and cleaned["kept"] == len(expected)
    assert cleaned["too_many_tokens"] == len(set(PAIRS)) - len(expected) > 0
    assert cleaned["duplicates"] == 420 - len(set(PAIRS))
    assert cleaned["tokens"] == list(MOST)


def test_large_vocabularies_take_four_bytes_an_id(source, tmp_path):
    more = tuple(f"more {i}" for i in range(70_000))
    large = Subwords(source.model, (*more, *source.pieces[::-1]), 1, 70_290, 2)
    store = write_store(tmp_path / "store", clean(PAIRS[:50]), source, large, (99, 99), {})
    assert (store.source.ids.dtype, store.target.ids.dtype) == (np.uint16, np.int32)
    assert store.target[0].tolist() == large.encode(PAIRS[0][1])
    assert store.target.ids.max() > 2**16


def test_the_same_text_makes_the_same_bytes(written, source, target, tmp_path):
    again = write_store(tmp_path / "store", clean(), source, target, MOST, CORPORA)
    assert again.sha256 == written[1].sha256 == open_store(written[0]).sha256
    other = write_store(tmp_path / "store", clean(PAIRS[1:]), source, target, MOST, CORPORA)
    assert other.sha256 != again.sha256


def test_no_pair_left_is_an_error_and_leaves_nothing(source, target, tmp_path):
    with pytest.raises(UserError, match=r"no pair is left .* over 1\+1 tokens"):
        write_store(tmp_path / "store", clean(), source, target, (1, 1), CORPORA)
    with pytest.raises(UserError, match=r"no pair is left .* empty"):
        write_store(tmp_path / "store", clean([("", "")]), source, target, MOST, CORPORA)
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_store_that_was_there(written, source, target, folder):
    def broken():
        yield from PAIRS
        raise UserError("file:9: invalid UTF-8")

    with pytest.raises(UserError, match="file:9"):
        write_store(folder, clean(broken()), source, target, MOST, CORPORA)
    assert open_store(folder).sha256 == written[1].sha256
    assert [p.name for p in folder.parent.iterdir()] == ["store"]


def test_what_a_process_cut_off_left_is_no_hindrance(source, target, tmp_path):
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial/source.ids").write_bytes(b"x")
    write_store(tmp_path / "store", clean(), source, target, MOST, CORPORA)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_what_the_system_refuses_is_named(source, target, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/store.partial: Not a directory"):
        write_store(tmp_path / "file/store", clean(), source, target, MOST, CORPORA)


# ---- damage


def spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit": (lambda f: spoil(f / "source.ids"), "source.ids: changed"),
    "cut": (lambda f: (f / "target.offsets").write_bytes(b""), "target.offsets: 0 bytes"),
    "missing": (lambda f: (f / "target.ids").unlink(), "target.ids: missing"),
    "manifest": (lambda f: (f / "manifest.json").write_bytes(b"{"), "manifest.json: not a"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
    "more": (lambda f: (f / "x").write_bytes(b""), "x: not in the manifest"),
    "other facts": (
        lambda f: (f / "manifest.json").write_text('{"files": {}, "facts": {}}'),
        "source.ids: not in the manifest",
    ),
}


@pytest.mark.parametrize("damage, why", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_mended(damage, why, written, source, target, folder):
    damage(folder)
    with pytest.raises(StoreError) as error:
        open_store(folder)
    assert str(error.value).startswith(f"{folder}: {why}") and "\n" not in str(error.value)
    store, note = fetch_store(folder, clean(), source, target, MOST, CORPORA)
    assert note == str(error.value) and store.sha256 == written[1].sha256


def test_a_manifest_of_something_else_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"files": {}, "facts": {}}')
    with pytest.raises(StoreError, match="not a store of token ids"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="absent: manifest.json: missing"):
        open_store(tmp_path / "absent")


def test_fetch_opens_what_fits(written, source, target, folder):
    class Unread(Clean):
        def __iter__(self):
            raise AssertionError("the corpus was read again")

    store, note = fetch_store(folder, Unread(PAIRS, ANY_RATIO), source, target, MOST, CORPORA)
    assert note == "" and store.sha256 == written[1].sha256


def test_fetch_writes_where_none_is(written, source, target, tmp_path):
    store, note = fetch_store(tmp_path / "s", clean(), source, target, MOST, CORPORA)
    assert note == f"{tmp_path / 's'}: not there yet" and store.sha256 == written[1].sha256


@pytest.mark.parametrize("what", ["corpora", "limits", "tokens", "vocabulary_sha256"])
def test_a_foreign_store_is_named_and_replaced(what, source, target, folder):
    arguments = {
        "clean": clean(), "source": source, "target": target, "tokens": MOST,
        "corpora": CORPORA,
    }  # fmt: skip
    arguments |= {
        "corpora": {"corpora": CORPORA | {"valid": {}}},
        "limits": {"clean": Clean(PAIRS, Limits(ratio=2.5))},
        "tokens": {"tokens": (16, 17)},
        "vocabulary_sha256": {"source": dataclasses.replace(source, bos=0)},
    }[what]
    store, note = fetch_store(folder, **arguments)
    assert note == f"{folder}: made from other {what.replace('_', ' ')}"
    assert fetch_store(folder, **arguments)[1] == "" and len(store)


# ---- plan and batches


def test_batches_are_those_of_the_same_pairs_in_memory(written):
    store = written[1]
    made = {"rows": 4, "source_length": 40, "target_length": 36, "seed": 3}
    in_memory = packed_batches(as_examples(store), **made)
    plan = plan_rows(store, source_length=40, target_length=36, seed=3)
    from_disk = stored_batches(store, plan, rows=4)
    for _ in range(2 * len(plan) // 4 + 3):
        one, other = next(in_memory), next(from_disk)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype == np.int32
            np.testing.assert_array_equal(one[name], other[name])


def test_the_plan_counts_rows_and_holds_each_pair_once(written):
    store = written[1]
    plan = plan_rows(store, source_length=40, target_length=36, seed=0)
    assert sorted(plan.members.tolist()) == list(range(len(store)))
    assert sum(len(plan[row]) for row in range(len(plan))) == len(store)
    shuffled = [as_examples(store)[i] for i in np.random.default_rng(0).permutation(len(store))]
    assert len(plan) == len(packed_rows(shuffled, 40, 36)["source"])
    other = plan_rows(store, source_length=40, target_length=36, seed=1)
    assert other.members.tolist() != plan.members.tolist()


def test_state_resumes_exactly(written):
    def make():
        plan = plan_rows(written[1], source_length=40, target_length=36, seed=0)
        return stored_batches(written[1], plan, rows=4)

    iterator, states, batches = make(), [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for start in (0, 1, 17, 33):
        resumed = make()
        resumed.set_state(states[start])
        for expected in batches[start:]:
            found = next(resumed)
            assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_row_shorter_than_a_sentence_is_refused(written, side):
    lengths = {"source_length": 40, "target_length": 40, f"{side}_length": 9}
    longest = written[1].facts["longest"][side == "target"]
    with pytest.raises(ValueError, match=f"{side}_length=9 is less than .* {side} .* {longest}$"):
        plan_rows(written[1], **lengths, seed=0)


def large_store(pairs):
    """A store of random lengths, as of a corpus, without a disk."""
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(5, 60, pairs))])
        sides.append(Side(np.zeros(offsets[-1], np.uint16), offsets))
    return Store(*sides, {"longest": [60, 60]}, "")


def test_the_plan_takes_few_bytes_a_pair():
    store = large_store(100_000)
    tracemalloc.start()
    plan = plan_rows(store, source_length=128, target_length=128, seed=0)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) > 20_000
    assert now < 8 * 100_000 and peak < 24 * 100_000 + 2**24
