import dataclasses
import io
import json
import random
import re
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import subwords
from experiments.data.subwords import (
    SubwordError,
    Subwords,
    chosen_size,
    read_model,
    train_subwords,
)
from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.errors import UserError

WORDS = ["Hund", "Katze", "Bäume", "Straße", "Mädchen", "Vögel", "sieht", "findet", "öffnet"]
SYLLABLES = ["ber", "gen", "lich", "stü", "mor", "fal", "ka", "rei", "Sta", "Wol", "tig", "en"]


def sentences(count, seed=0):
    """Some words again and again, and between them rare ones."""
    rng = random.Random(seed)
    rare = ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(200)]
    return [
        " ".join(rng.choices(WORDS * 20 + rare, k=rng.randint(2, 7))) + "." for _ in range(count)
    ]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return train_subwords(sentences(300), 400, request.param)


@pytest.fixture(scope="module")
def one():
    return train_subwords(sentences(300), 400, "bpe")


def renumbered(vocabulary, pieces, bos, eos, unk):
    return Subwords(vocabulary.model, tuple(pieces), bos, eos, unk)


# ---- our own vocabularies


def test_the_special_ids_and_the_size(trained):
    assert trained.size == len(trained.pieces) == 400
    assert (PAD, trained.bos, trained.eos, trained.unk) == (0, BOS, EOS, 3)
    assert trained.pieces[:5] == ("<pad>", "<s>", "</s>", "<unk>", "<0x00>")


def test_pieces_are_learned_and_spell_the_text(trained):
    ids = trained.encode("Straße sieht")
    assert ids[-1] == EOS and EOS not in ids[:-1] and len(ids) < len("Straße sieht")
    assert "".join(trained.to_pieces(ids[:-1])) == "▁Straße▁sieht"
    assert trained.to_pieces([PAD, BOS, EOS]) == ["<pad>", "<s>", "</s>"]


def test_encode_all_is_encode_of_each(trained):
    texts = [*sentences(40, seed=1), "", "  ", "日本 😀"]
    assert trained.encode_all(iter(texts)) == [trained.encode(text) for text in texts]
    assert trained.encode("") == trained.encode("  ") == [EOS]
    assert trained.encode_all([]) == []


def test_nothing_is_unknown(trained):
    ids = trained.encode("日本語 😀 Ω")
    assert trained.unk not in ids
    assert trained.decode(ids) == "日本語 😀 Ω"


SURROGATES = ("Cs",)


@given(st.text(st.characters(exclude_categories=SURROGATES, exclude_characters="▁"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_decode_inverts_encode_up_to_spaces(one, text):
    assert one.decode(one.encode(text)) == " ".join(filter(None, text.split(" ")))


def test_no_character_is_normalised(one):
    # NFKC, SentencePiece's default, makes "fi", "...", "2" and " " of these.
    for text in ("ﬁ … ²", "a\u00a0b", "e\u0301 é", "Ａ\ttab", "</s> <unk> <s>"):
        assert one.decode(one.encode(text)) == text


def test_decode_stops_at_the_first_end_and_leaves_out_what_is_no_text(one):
    ids = one.encode("Hund sieht")
    assert one.decode([BOS, *ids[:-1], PAD, PAD]) == "Hund sieht"
    assert one.decode([*ids, *one.encode("Katze"), 9999]) == "Hund sieht"
    assert one.decode([]) == one.decode([EOS]) == ""
    assert "⁇" in one.decode([one.unk])
    byte = one.pieces.index("<0xE6>")  # the first byte of three
    assert one.decode([byte]) == "\ufffd"


@pytest.mark.parametrize("i", [-1, 400])
def test_an_id_outside_is_named(one, i):
    for function in (one.decode, one.to_pieces):
        with pytest.raises(ValueError, match=rf"id {i} is outside .* size 400"):
            function([5, i])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_repeats_itself(kind):
    again = [train_subwords(iter(sentences(300)), 400, kind).sha256 for _ in range(2)]
    assert again[0] == again[1]
    assert train_subwords(sentences(300, seed=1), 400, kind).sha256 != again[0]


def test_the_two_kinds_differ():
    made = {kind: train_subwords(sentences(300), 400, kind) for kind in ("bpe", "unigram")}
    assert made["bpe"].sha256 != made["unigram"].sha256


def test_it_says_nothing(capfd):
    train_subwords([*sentences(300), "a" * 5000, "▅"], 400)
    assert capfd.readouterr() == ("", "")


def test_a_long_line_counts():
    vocabulary = train_subwords(["und " * 3000 + "Donaudampfschiff " * 50, "ab"], kind="bpe")
    assert "▁und" in vocabulary.pieces


def test_many_lines_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr(subwords, "MOST_LINES", 40)
    lines = sentences(300)
    made = [train_subwords(lines, None, "bpe", seed).sha256 for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert made[0] != train_subwords(lines[:40], None, "bpe").sha256  # not just the first
    drawn, characters = subwords._drawn(map(str, range(1000)), 0)
    assert len(set(drawn)) == 40 and characters == len("".join(map(str, range(1000))))
    assert max(map(int, drawn)) > 800
    monkeypatch.setattr(subwords, "MOST_CHARACTERS", 60)
    drawn, characters = subwords._drawn(map(str, range(1000)), 0)
    assert 18 < len(set(drawn)) < 25 and sum(map(len, drawn)) <= 60 and characters == 2890
    assert max(map(int, drawn)) > 800


# ---- the size


def test_the_chosen_size_grows_with_the_root_of_the_text():
    assert chosen_size(0) == chosen_size(6000) == 500
    assert chosen_size(6_000_000) == 4000
    assert chosen_size(24_000_000) == 8000
    assert chosen_size(10**12) == 32_000


def test_a_chosen_size_is_what_the_text_has_pieces_for():
    assert 280 < train_subwords(sentences(5), None, "bpe").size < 500
    assert 262 <= train_subwords(["a"]).size <= 263


def test_a_chosen_size_holds_all_characters():
    text = "".join(chr(0x4E00 + i) for i in range(600))
    vocabulary = train_subwords([text] * 3)
    assert set(text) <= set(vocabulary.pieces)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_given_size_is_kept_or_refused_with_the_one_that_is_possible(kind):
    with pytest.raises(SubwordError, match="900,000 is too large for this text: at most ") as error:
        train_subwords(sentences(300), 900_000, kind)
    largest = int(str(error.value).rpartition(" ")[2])
    assert train_subwords(sentences(300), largest, kind).size == largest
    for small in (1, 0, -5):
        with pytest.raises(SubwordError, match="is too small for this text: at least 2"):
            train_subwords(sentences(300), small, kind)


@pytest.mark.parametrize("lines", [[], [""], [" ", "\t"]])
def test_no_text_is_an_error(lines):
    with pytest.raises(SubwordError, match="no text to train"):
        train_subwords(lines)


def test_text_that_the_library_refuses_is_one_line():
    with pytest.raises(SubwordError) as error:
        train_subwords(["▅"])
    assert "\n" not in str(error.value) and isinstance(error.value, UserError)


# ---- imported vocabularies, which number their pieces otherwise


@pytest.fixture(scope="module")
def foreign(one):
    """Bos is padding, as in Marian; the last pieces of the model have no id, "Ω" has one."""
    kept = [p for p in reversed(one.pieces[4:]) if p not in ("▁Hund", "H")]
    return renumbered(one, ["<pad>", "</s>", "<unk>", "Ω", *kept], 0, 1, 2)


def test_another_order_of_the_same_pieces(one, foreign):
    text = "Katze öffnet Fenster."
    ids = foreign.encode(text)
    assert ids[-1] == 1 and ids != one.encode(text)
    assert foreign.to_pieces(ids[:-1]) == one.to_pieces(one.encode(text)[:-1])
    assert foreign.decode([0, *ids, 0, 7]) == text


def test_a_piece_without_an_id_is_unknown(one, foreign):
    assert one.to_pieces(one.encode("Hund")) == ["▁Hund", "</s>"]
    assert foreign.encode("Hund") == [2, 1]


def test_a_piece_that_only_the_ids_know():
    # The model has no bytes to spell with, so Ω is unknown to it.
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)), model_writer=writer, vocab_size=60, minloglevel=2
    )
    model = writer.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(60)]
    vocabulary = Subwords(model, ("<pad>", "</s>", "<unk>", "Ω", *pieces[3:]), 0, 1, 2)
    ids = vocabulary.encode("Hund Ω")
    assert ids[-2:] == [3, 1] and 2 not in ids
    assert vocabulary.decode(ids) == "Hund Ω"
    unknown = vocabulary.encode("Hund 中")
    assert unknown[-2:] == [2, 1] and "⁇" in vocabulary.decode(unknown)


def test_pieces_that_the_model_lacks_are_decoded_all_the_same(one):
    pieces = ("<pad>", "<begin>", "</s>", "<unk>", "▁Ω", "ψ", *one.pieces[4:])
    vocabulary = renumbered(one, pieces, 1, 2, 3)
    hund = pieces.index("▁Hund")
    assert vocabulary.decode([1, 4, 5, hund, 4, 0, 2]) == "Ωψ Hund Ω"


@pytest.mark.parametrize("wrong", [{"bos": 400}, {"eos": -1}, {"unk": 400}, {"eos": 0}])
def test_special_ids_are_checked(one, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(one, **wrong)


def test_sha256_sees_the_model_the_order_and_the_special_ids(one):
    swapped = [*one.pieces[:-2], one.pieces[-1], one.pieces[-2]]
    others = [
        renumbered(one, swapped, 1, 2, 3),
        renumbered(one, one.pieces, 0, 2, 3),
        Subwords(one.model + b"x", one.pieces, 1, 2, 3),
    ]
    assert len({one.sha256, *(o.sha256 for o in others)}) == 4
    assert len(one.sha256) == 64
    assert renumbered(one, one.pieces, 1, 2, 3).sha256 == one.sha256


# ---- files


def test_save_and_load(one, foreign, tmp_path):
    for name, vocabulary in (("source", one), ("target", foreign)):
        vocabulary.save(tmp_path / "vocabulary", name)
        loaded = Subwords.load(tmp_path / "vocabulary", name)
        assert loaded.sha256 == vocabulary.sha256
        assert loaded.pieces == vocabulary.pieces
        assert loaded.encode("Vögel hört 日") == vocabulary.encode("Vögel hört 日")
    assert sorted(p.name for p in (tmp_path / "vocabulary").iterdir()) == [
        "source.json", "source.spm", "target.json", "target.spm",
    ]  # fmt: skip
    assert (tmp_path / "vocabulary/source.spm").read_bytes() == one.model


def test_read_model(one, tmp_path):
    path = tmp_path / "source.spm"
    path.write_bytes(one.model)
    assert read_model(path) == one.model
    for content in (b"", b"x", b"hello world", one.model[: len(one.model) // 2], bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(SubwordError, match="source.spm: not a SentencePiece model"):
            read_model(path)
    path.unlink()
    with pytest.raises(SubwordError, match="source.spm: No such file"):
        read_model(path)


def test_a_model_that_ends_or_hangs_the_process_is_named(one, tmp_path, monkeypatch):
    path = tmp_path / "source.spm"
    path.write_bytes(one.model)
    monkeypatch.setattr(subwords, "_TRIAL", "import os; os.abort()")
    with pytest.raises(SubwordError, match=r"source.spm: .*ends by signal 6"):
        read_model(path)
    run = subprocess.run
    monkeypatch.setattr(subwords, "_TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: run(*args, **{**options, "timeout": 0.2})
    )
    with pytest.raises(SubwordError, match=r"source.spm: .*does not come to an end"):
        read_model(path)


def test_no_damaged_model_ends_the_process(one, tmp_path):
    """Whatever `read_model` lets through can be used; what it refuses, it names."""
    code = (
        "import sys; from pathlib import Path\n"
        "from experiments.data.subwords import read_model, SubwordError, Subwords\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: model = read_model(path)\n"
        "    except SubwordError as error: assert str(path) in str(error)\n"
        "    else: Subwords(model, ('p', 's', 'e', 'u'), 1, 2, 3).encode('Straße 日')\n"
    )
    rng = random.Random(0)
    paths = []
    for i in range(12):
        damaged = bytearray(one.model)
        for _ in range(20):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{i}.spm")
        paths[-1].write_bytes(damaged)
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def changed(**fields):
    """A function of v.json's content that changes fields; None leaves one out."""

    def of_content(content):
        about = json.loads(content) | fields
        return json.dumps({k: v for k, v in about.items() if v is not None}).encode()

    return of_content


DAMAGED = [  # file, its content after the damage (None: no file), words
    ("v.json", None, "No such file or directory$"),
    ("v.spm", None, "No such file or directory$"),
    *(("v.spm", lambda c, n=n: c[:n], "changed since it was written") for n in (0, 1, 1000, -1)),
    *(
        ("v.json", lambda c, content=content: content, "not a vocabulary")
        for content in (b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000)
    ),
    *(
        ("v.json", changed(**fields), f"not a vocabulary.*{why}")
        for fields, why in [
            ({"pieces": None}, "it has no 'pieces'"),
            ({"spm_sha256": None}, "it has no 'spm_sha256'"),
            ({"pieces": ["a", 3]}, "a list of strings"),
            ({"pieces": "abcdefg"}, "a list of strings"),
            ({"pieces": ["a", "b", "c", "d", "a"]}, "stands twice"),
            ({"bos": "1"}, "whole numbers"),
            ({"eos": True}, "whole numbers"),
            ({"unk": 400}, "unk=400 is no id"),
            ({"more": 1}, "more"),
            ({"unk": None}, "unk"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "words"), DAMAGED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_damaged_vocabulary_is_named(one, tmp_path, name, damage, words):
    one.save(tmp_path, "v")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage:
        (tmp_path / name).write_bytes(damage(content))
    with pytest.raises(SubwordError) as error:
        Subwords.load(tmp_path, "v")
    message = str(error.value)
    assert re.match(f"{tmp_path / name}: {words}", message) and "\n" not in message
