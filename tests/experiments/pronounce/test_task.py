"""The task without training: its config, its data, its scores."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import nn

from experiments.checkpoints.run_folder import plain
from experiments.data import pronunciations
from experiments.data.pronunciations import DataError
from experiments.data.vocabulary import BOS
from experiments.inference.predictor import Predictor, Settings
from experiments.pronounce import task as pronounce
from experiments.pronounce.task import (
    MAY_DIFFER,
    PRESETS,
    PronounceConfig,
    Score,
    load_lexicons,
    make_evaluate,
    resolve,
    results_of,
    score,
)
from experiments.training.fitting import make_valid_loss
from experiments.training.placement import Layout
from tfm.config import TransformerConfig
from tfm.model import Transformer
from tfm.parallel.mesh import MeshConfig
from tfm.training import init_params


def write(path, *words):
    path.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in words))
    return path


COUNTS = ("steps", "save_every", "log_every", "evaluate_every", "rows", "source_length",
          "target_length", "accumulation", "beam", "warmup_steps")  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        PronounceConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"rows": 10, "accumulation": 4}, "accumulation=4 does not divide rows=10"),
        ({"clip": 0.0}, "clip=0.0 must be positive"),
        ({"clip": float("nan")}, "clip=nan must be positive"),
        ({"test_file": Path("a")}, "train_file"),
        ({"valid_file": Path("a")}, "train_file"),
    ],
)
def test_an_impossible_config_is_named(fields, why):
    with pytest.raises(ValueError, match=why):
        PronounceConfig(**fields)


def test_presets_name_themselves_and_differ_in_their_folders():
    assert {name: config.preset for name, config in PRESETS.items()} == {p: p for p in PRESETS}
    assert PRESETS["default"].run == Path("runs/pronounce")
    assert PRESETS["full"].run == Path("runs/pronounce-full")
    assert PRESETS["default"] == PronounceConfig()


def test_the_config_is_json_and_the_fields_that_may_differ_exist():
    config = PRESETS["full"]
    assert json.loads(json.dumps(plain(config))) == plain(config)
    nested = {
        f"{name}.{field.name}"
        for name in ("mesh", "cluster")
        for field in dataclasses.fields(getattr(config, name))
    }
    assert {f.name for f in dataclasses.fields(config)} | nested >= MAY_DIFFER
    assert plain(config)["model"]["d_model"] == config.model.d_model


# ---- data


def test_the_default_data_is_cmudict_and_fits_both_presets():
    lexicons = load_lexicons(PRESETS["default"])
    assert [len(part) for part in (lexicons.train, lexicons.valid, lexicons.test)] == [
        110_197, 2_442, 12_246,
    ]  # fmt: skip
    for preset in PRESETS.values():
        assert not any("left out" in note for note in load_lexicons(preset).notes)
        # No vocabulary of the presets is a lie.
        assert resolve(preset, lexicons) == preset


def test_files_take_the_place_of_the_parts(tmp_path):
    config = PronounceConfig(
        train_file=write(tmp_path / "a", "ab", "CAB"),
        valid_file=write(tmp_path / "v", "ba"),
        test_file=write(tmp_path / "t", "bad"),
    )
    lexicons = load_lexicons(config)
    assert list(lexicons.train) == ["ab", "cab"]
    assert (list(lexicons.valid), list(lexicons.test)) == (["ba"], ["bad"])
    # A letter and a sound of the test words alone are in the vocabularies.
    assert lexicons.letters.symbols == tuple("abcd") and lexicons.phones.symbols == tuple("ABCD")
    model = resolve(config, lexicons).model
    assert (model.vocab_size, model.source_vocab_size) == (7, 7)


def test_without_a_validation_file_whole_families_are_carved_off(tmp_path):
    words = [a + b + c for a in "abcdefgh" for b in "aeiou" for c in "bcdfg"]
    words += [word + "'s" for word in words]
    lexicons = load_lexicons(PronounceConfig(train_file=write(tmp_path / "a", *words)))
    assert lexicons.valid and len(lexicons.train) + len(lexicons.valid) == len(words)
    families = [
        {pronunciations.family(w) for w in part} for part in (lexicons.train, lexicons.valid)
    ]
    assert not families[0] & families[1]
    assert lexicons.test == lexicons.valid  # no test file: what there is to test on


def test_a_vocabulary_size_that_the_data_contradicts_is_named(tmp_path):
    files = {"train_file": write(tmp_path / "a", "ab"), "valid_file": write(tmp_path / "v", "ba")}
    model = PRESETS["default"].model
    for name, size in (("vocab_size", 99), ("source_vocab_size", 98)):
        config = PronounceConfig(**files, model=dataclasses.replace(model, **{name: size}))
        with pytest.raises(DataError, match=rf"{name}={size}.* has 5 symbols"):
            resolve(config, load_lexicons(config))


@pytest.mark.parametrize("part", ["train_file", "valid_file", "test_file"])
def test_a_word_that_no_row_can_hold_is_left_out_counted_and_named(tmp_path, part):
    words = dict.fromkeys(("train_file", "valid_file", "test_file"), ("ab", "ba"))
    words[part] = ("ab", "ba", "abababab", "ababab")
    files = {name: write(tmp_path / name, *words[name]) for name in words}
    config = PronounceConfig(**files, source_length=6, target_length=10)
    lexicons = load_lexicons(config)
    name = {"train_file": "training", "valid_file": "validation", "test_file": "test"}[part]
    assert list(lexicons.parts()[name]) == ["ab", "ba"]
    assert lexicons.notes[0] == (
        f"2 of 4 {name} pronunciations left out, as that of 'abababab': "
        "--source-length 9 --target-length 10 takes them"
    )
    whole = load_lexicons(dataclasses.replace(config, source_length=9, target_length=9))
    assert list(whole.parts()[name]) == list(words[part]) and len(whole.notes) == 1
    with pytest.raises(DataError, match="(2 of 2|4 of 4) training pronunciations are too long"):
        load_lexicons(dataclasses.replace(config, source_length=2))


def test_what_was_read_is_told_before_it_is_learned(tmp_path):
    lines = ["ab A B", "ab(2) A", "cb C B # a comment", "dd D D"]
    (tmp_path / "words").write_text("\n".join(lines))
    config = PronounceConfig(train_file=tmp_path / "words", valid_file=tmp_path / "words")
    lexicons = load_lexicons(config)
    once = f"{tmp_path / 'words'}: left out 1 numbers of variants, 1 comments"
    assert lexicons.notes[:2] == (once, once)
    assert "is the file for training and validation" in lexicons.notes[2]
    assert lexicons.notes[3] == "4 letters, 4 sounds; the rarest: C 1, D 2, B 2, A 2"
    assert lexicons.train["ab"] == [("A", "B"), ("A",)] and "ab(2)" not in lexicons.train


# ---- schedules and scores


@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_the_cosine_schedule_rises_to_its_peak_and_ends_near_zero(steps):
    rate = PronounceConfig(steps=steps, learning_rate=0.5, warmup_steps=100).make_learning_rate()
    rates = np.array([float(rate(i)) for i in range(steps + 1)])
    assert np.isfinite(rates).all() and (rates >= 0).all()
    assert rates.max() == pytest.approx(0.5) and rates.argmax() == min(100, steps // 2)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_the_papers_schedule_has_its_peak_at_the_end_of_the_warm_up():
    config = PronounceConfig(schedule="paper", learning_rate=0.02, warmup_steps=50)
    rate = config.make_learning_rate()
    rates = [float(rate(i)) for i in range(200)]
    assert np.argmax(rates) == 49  # counted from 0
    assert max(rates) == pytest.approx(0.02)
    assert rates[199] == pytest.approx(0.02 * (50 / 200) ** 0.5)  # the inverse square root


def test_evaluation_is_the_plain_loss_of_each_word_and_the_greedy_error(tmp_path, monkeypatch):
    words = [a + b for a in "abc" for b in ("a", "bc", "ccab", "bcabc")]
    config = PronounceConfig(
        train_file=write(tmp_path / "t", *words), valid_file=write(tmp_path / "v", *words[::2]),
        rows=4, source_length=8, target_length=8, smoothing=0.3, beam=3,
        model=TransformerConfig(
            vocab_size=42, source_vocab_size=30, d_model=8, d_ff=8, num_heads=2,
            num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.5,
        ),
    )  # fmt: skip
    lexicons = load_lexicons(config)
    config = resolve(config, lexicons)
    model = Transformer(config.model)
    params = init_params(model, jax.random.PRNGKey(1))
    beams = []
    monkeypatch.setattr(
        pronounce, "score", lambda _, lexicon, beam: beams.append(beam) or Score(0.5, 0.25, [])
    )
    pronouncer = Predictor(model, None, *lexicons.tokenizers(), Settings(8, 8))
    assert make_evaluate(lexicons, pronouncer)(params) == {"valid_wer": 0.5, "valid_per": 0.25}
    assert beams == [1]

    total, count = 0.0, 0
    examples = pronunciations.examples(lexicons.valid, lexicons.letters, lexicons.phones)
    for example in examples:
        labels = example["target"]
        inputs = np.concatenate([[BOS], labels[:-1]])
        logits = model.apply({"params": params}, example["source"], inputs)
        total -= np.log(np.asarray(nn.softmax(logits)))[np.arange(len(labels)), labels].sum()
        count += len(labels)
    for mesh in (MeshConfig(1), MeshConfig(2, 2, 2)):
        layout = Layout(mesh, config.model, config.rows)
        valid_loss = make_valid_loss(config, examples, BOS, layout)
        assert valid_loss(layout.place(params)) == pytest.approx(total / count, rel=1e-5)


def test_score_pairs_each_word_with_its_own_references():
    lexicon = {"ab": [("A", "B"), ("A",)], "c": [("K",)], "d": [("D", "E")]}
    said = {"ab": "A", "c": "K K", "d": "D E"}
    beams = []

    def pronouncer(words, beam=None):
        beams.append(beam)
        return [said[word] for word in words]

    found = score(pronouncer, lexicon, beam=3)
    assert beams == [3]
    assert found.hypotheses == [("A",), ("K", "K"), ("D", "E")]
    assert (found.wer, found.per) == (1 / 3, 1 / 4)


def test_results_hold_the_required_keys_as_fractions():
    valid, test = Score(0.5, 0.25, [()] * 4), Score(0.25, 0.125, [()] * 8)
    about = {"steps": 7, "parameters": 11, "train_seconds": 1.5}
    results = results_of(PronounceConfig(seed=3), about, valid, test)
    expected = {"test_wer": 0.25, "test_per": 0.125, "valid_wer": 0.5, "test_words": 8, **about}
    assert expected.items() <= results.items()
    assert json.loads(json.dumps(results)) == results
