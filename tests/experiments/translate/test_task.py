"""The translation task from end to end, on a language of twenty words that a small model learns."""

import dataclasses
import gzip
import json
import random
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from killing import call

from experiments.checkpoints.checkpoint import Checkpoints
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, plain, write_json
from experiments.checkpoints.safetensors_io import import_params
from experiments.data.cleaning import Limits
from experiments.data.subwords import train_subwords
from experiments.errors import UserError
from experiments.inference.saved import load, write
from experiments.training.config import decide_compute_dtype
from experiments.translate import texts as translate_texts
from experiments.translate.config import TranslateConfig, configured
from experiments.translate.report import report, unpicked
from experiments.translate.scores import translated
from experiments.translate.task import TranslateTask, begun_from, chosen_weights
from tfm.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("compiled_once")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
THEIRS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
STEPS = 60
TINY = [
    *("--model.d-model", "32", "--model.d-ff", "64", "--model.num-heads", "2"),
    *("--model.num-encoder-layers", "1", "--model.num-decoder-layers", "1"),
    *("--model.dropout-rate", "0.0", "--mesh.data", "1", "--rows", "16", "--source-length", "24"),
    *("--target-length", "24", "--beam", "2", "--learning-rate", "0.01", "--warmup-steps", "10"),
    *("--log-every", "20", "--evaluate-every", "20", "--save-every", "20"),
    *("--vocabulary-size", "300", "--schedule", "paper", "--model.compute-dtype", "auto"),
]


def sentences(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        chosen = [rng.randrange(10) for _ in range(rng.randint(1, 5))]
        yield " ".join(WORDS[i] for i in chosen), " ".join(THEIRS[i] for i in chosen)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The flags of the text: training in two files, validation in one, test in two of gzip."""
    folder = tmp_path_factory.mktemp("text")
    train, valid, test = (list(sentences(n, seed)) for n, seed in ((900, 0), (40, 1), (50, 2)))
    train[5] = ("one  ", " ")
    for side, name in ((0, "en"), (1, "de")):
        (folder / f"train.{name}").write_text("".join(f"{p[side]}\n" for p in train))
        with gzip.open(folder / f"test.{name}.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{p[side]}\n" for p in test)
    (folder / "valid.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in valid))
    return [
        *("--train", folder / "train.en", folder / "train.de", "--valid", folder / "valid.tsv"),
        *("--test", folder / "test.en.gz", folder / "test.de.gz"),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert call("translate", "--run", path, "--steps", STEPS, *text, *TINY) == 0
    return path


def read(path, name):
    return json.loads((path / name).read_text(encoding="utf-8"))


def test_results_hold_scores_with_signatures_and_counts(finished):
    results = read(finished, "results.json")
    for name in ("test_bleu", "test_bleu_pretokenized", "test_chrf", "valid_bleu"):
        assert 0 <= results[name] <= 100
    assert results["test_chrf"] > 20  # it has learned something
    signatures = {m["signature"] for m in results["scores"]["test"].values()}
    assert len(signatures) == 3 and any("tok:13a" in s for s in signatures)
    assert (results["test_sentences"], results["valid_sentences"]) == (50, 40)
    cleaned = results["cleaned"]
    assert cleaned["pairs"] == 900 and cleaned["empty"] == 1 and cleaned["duplicates"] > 0
    assert results["steps"] == STEPS and not results["stopped_early"]


def test_scores_of_few_sentences_say_so_and_have_no_interval(finished):
    html = (finished / "report.html").read_text()
    sentences = read(finished, "results.json")["test_sentences"]
    assert f"Note: {sentences} test sentences are few" in html and "±" not in html


def test_translations_stand_beside_the_report(finished):
    header, *lines = (finished / "translations.tsv").read_text().splitlines()
    assert header.split("\t") == ["source", "reference", "model"] and len(lines) == 50
    sources, references, written = zip(*(line.split("\t") for line in lines), strict=True)
    assert list(zip(sources, references, strict=True)) == list(sentences(50, 2))
    assert tuple(load(finished)(sources)) == written
    report = (finished / "report.html").read_text()
    assert written[unpicked(50)[3]] in report and "tok:13a" in report
    assert "BLEU" in (finished / "learning_curve.svg").read_text()


def test_the_result_is_of_the_lowest_validation_loss(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    best = min(evaluated, key=evaluated.get)
    assert f"step {best}," in read(finished, "results.json")["weights"]
    assert list(evaluated) == [20, 40, 60] and all("valid_bleu" in m for m in lines[-1:])


@pytest.mark.slow
def test_a_run_cut_off_goes_on_to_the_same_parameters(finished, text, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    (run / "results.json").unlink()
    assert call("translate", "--run", run, "--steps", STEPS, *text, *TINY) == 0
    now, before = read(run, "results.json"), read(finished, "results.json")
    assert now["resumed_from"] == [40]
    assert now["state_sha256"] == before["state_sha256"]
    capsys.readouterr()
    assert call("translate", "--run", run, "--steps", STEPS, *text, *TINY) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_over_a_mesh_goes_on_there_and_on_one_device(text, tmp_path):
    """299 pieces, which two parts of the vocabulary are padded to 300 for."""
    run, common = tmp_path / "run", [*text, *TINY, "--vocabulary-size", "299"]
    for steps, mesh in ((20, ("2", "2")), (40, ("2", "2")), (60, ("1", "1"))):
        flags = ["--mesh.data", mesh[0], "--mesh.tensor", mesh[1]]
        assert call("translate", "--run", run, "--steps", steps, *common, *flags) == 0
        assert read(run, "config.json")["model"]["vocab_multiple"] == 2
    results = read(run, "results.json")
    assert results["resumed_from"] == [20, 40] and results["vocabulary_size"] == 299
    assert load(run).params["embedding"].shape == (299, 32)
    params = import_params(run / "params.safetensors", load(run).params)
    np.testing.assert_array_equal(params["embedding"], load(run).params["embedding"])


def test_other_text_is_refused_by_name_and_nothing_is_lost(finished, text, tmp_path, capsys):
    changed = tmp_path / "train.de"
    changed.write_text(text[2].read_text() + "\n")
    other = [*text[:2], changed, *text[3:]]
    before = (finished / "config.json").read_bytes()
    assert call("translate", "--run", finished, "--steps", STEPS, *other, *TINY) == 2
    assert "corpora.train.target" in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before


def test_another_config_is_refused_though_the_file_that_told_is_lost(
    finished, text, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").unlink()
    command = ["translate", "--run", run, "--steps", STEPS, *text, *TINY]
    assert call(*command, "--seed", 5) == 2
    assert "belongs to another run (seed: 0 -> 5)" in capsys.readouterr().err
    assert not (run / "config.json").exists() and (run / "results.json").exists()
    assert call(*command) == 0  # nothing that was refused stands in its way
    assert read(run, "config.json") == read(finished, "config.json") | {"run": str(run)}


@pytest.mark.slow
def test_fine_tuning_begins_with_what_is_known(finished, text, tmp_path):
    run, quiet = tmp_path / "run", ["--learning-rate", "1e-5", "--vocabulary-size", "300"]
    flags = [*TINY, *quiet]
    assert call("translate", "--from", finished, "--run", run, "--steps", 20, *text, *flags) == 0
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    cold = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < cold["loss"] - 1
    assert load(run).target.sha256 == load(finished).target.sha256


@pytest.mark.slow
def test_a_model_whose_two_vocabularies_share_a_matrix_is_fine_tuned(finished, text, tmp_path):
    start = load(finished)  # as OPUS-MT models are: one list of pieces, two SentencePiece models
    other = train_subwords((f"{s} {t}" for s, t in sentences(900, 3)), 290)
    start = dataclasses.replace(start, source=dataclasses.replace(start.source, model=other.model))
    write(tmp_path / "imported", start, {})
    run = tmp_path / "run"
    flags = ["--from", tmp_path / "imported", "--run", run, "--steps", 1, *text, *TINY]
    assert call("translate", *flags) == 0
    assert load(run).model.config == start.model.config
    assert load(run).source.sha256 == start.source.sha256 != start.target.sha256


@pytest.mark.slow
def test_patience_ends_a_training_that_learns_nothing(text, tmp_path):
    run = tmp_path / "run"
    # Steps that are too small to change a number, so the second evaluation finds no lower loss.
    flags = [*TINY, "--learning-rate", "1e-30", "--patience", "1"]
    assert call("translate", "--run", run, "--steps", 400, *text, *flags) == 0
    results = read(run, "results.json")
    assert results["steps"] == 40 and results["stopped_early"]


@pytest.mark.slow
def test_the_average_of_the_newest_checkpoints(text, tmp_path):
    run = tmp_path / "run"
    flags = [*TINY, "--weights", "average", "--keep-checkpoints", "2"]
    assert call("translate", "--run", run, "--steps", STEPS, *text, *flags) == 0
    assert read(run, "results.json")["weights"] == "average of the steps 40, 60"
    averaged = np.asarray(load(run).params["embedding"])
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        trees = [checkpoints.restore_params(step, load(run).params) for step in (40, 60)]
    kept = [np.asarray(tree["embedding"]) for tree in trees]
    np.testing.assert_allclose(averaged, np.mean(kept, axis=0), rtol=1e-6)
    assert not np.allclose(averaged, kept[1], rtol=1e-3)


@pytest.mark.slow
def test_validation_text_is_carved_where_none_is_given(text, tmp_path):
    run = tmp_path / "run"
    assert call("translate", "--run", run, "--steps", 1, *text[:3], *TINY) == 0
    results = read(run, "results.json")
    assert results["test_is_valid"] and 1 <= results["valid_sentences"] <= 20
    assert results["cleaned"]["held_out"] >= results["valid_sentences"]
    assert results["test_bleu"] == results["valid_bleu"]


def test_what_is_wrong_with_the_text_is_one_line(text, tmp_path, capsys):
    short = tmp_path / "short.de"
    short.write_text("eins\n")
    cases = [
        ([], ["--train SOURCE TARGET"]),
        ([*text[:3], "--dataset", "name"], ["by one of --train SOURCE TARGET and --dataset"]),
        (["--train", text[1], short], ["short.de", "1", "900"]),
        (["--train", tmp_path / "gone"], ["gone"]),
        ([*text[:3], "--valid", text[1], short], ["short.de"]),
    ]
    for flags, words in cases:
        assert call("translate", "--run", tmp_path / "run", *flags, *TINY) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["lengths", "vocabulary", "model", "validation"])
def test_the_command_with_its_mistake_mended_is_not_refused(text, tmp_path, capsys, fault):
    target, flags = tmp_path / "train.de", []
    target.write_bytes(text[2].read_bytes())
    if fault == "lengths":
        target.write_text("eins\n")
    else:
        wrong = {
            "vocabulary": ["--vocabulary-size", "9000"],
            "model": ["--model.vocab-size", "301"],
            "validation": ["--source-length", 1],
        }
        flags = wrong[fault]
    run, own = tmp_path / "run", [text[0], text[1], target, *text[3:]]
    assert call("translate", "--run", run, "--steps", 1, *own, *TINY, *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in run.iterdir()] == [".lock"]
    target.write_bytes(text[2].read_bytes())
    config = configured("small", "paper") | {"run": run}  # another config than the refused one's
    with RunFolder(run).claim(plain(TranslateConfig(**config)), ()):
        pass


def test_a_finished_run_keeps_the_config_that_made_it(finished, text, capsys):
    before = (finished / "config.json").read_bytes()
    quiet = ["--log-every", 7]
    assert call("translate", "--run", finished, "--steps", STEPS, *text, *TINY, *quiet) == 0
    assert "is finished" in capsys.readouterr().out
    assert (finished / "config.json").read_bytes() == before
    model = read(finished, "config.json")["model"]
    assert (model["vocab_size"], model["compute_dtype"]) == (300, "float32")


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_auto_is_decided_once_by_the_devices_and_told(
    platform, dtype, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    model, folder = configured("base", "paper")["model"], RunFolder(tmp_path)
    decided = decide_compute_dtype(model, folder)
    assert decided == dataclasses.replace(model, compute_dtype=dtype)
    assert capsys.readouterr().out == f"compute_dtype auto: {dtype}, this is a {platform}\n"
    # Another sitting, on other devices, goes on with the same one.
    write_json(tmp_path / "config.json", {"model": plain(decided)})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert decide_compute_dtype(model, folder) == decided
    assert decide_compute_dtype(decided, RunFolder(tmp_path / "other")) == decided


def test_a_run_is_finished_where_the_command_would_change_nothing():
    stopped, before = {"steps": 20, "asked_steps": 50}, {"patience": 2, "weights": "best"}

    def is_finished(**changes):
        config = TranslateConfig(**{"steps": 50, "patience": 2} | changes)
        return TranslateTask(SimpleNamespace(config=config), None, None).is_finished(
            stopped, before
        )

    assert is_finished()
    assert not is_finished(steps=60)
    assert not is_finished(patience=3)
    assert not is_finished(weights="last")
    assert is_finished(steps=20, patience=3)


def test_a_run_that_patience_ended_says_what_extends_it(finished, text, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    results = read(run, "results.json") | {"asked_steps": 90, "stopped_early": True}
    (run / "results.json").write_text(json.dumps(results))
    for steps, flag in ((STEPS, "--steps"), (90, "--patience")):
        assert call("translate", "--run", run, "--steps", steps, *text, *TINY) == 0
        assert f"({STEPS} steps); a larger {flag} extends it" in capsys.readouterr().out


@pytest.mark.slow
def test_other_weights_of_a_finished_run_are_taken_without_training(finished, text, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flags = ["--run", run, "--steps", STEPS, *text, *TINY, "--weights"]
    assert call("translate", *flags, "last") == 0
    now, before = read(run, "results.json"), read(finished, "results.json")
    assert now["weights"] == "of the last step"
    assert now["state_sha256"] == before["state_sha256"]
    assert read(run, f"results-{STEPS}.json") == before
    assert (run / f"translations-{STEPS}.tsv").exists()
    assert read(run, "config.json")["weights"] == "last"


def test_a_lost_best_is_told_in_one_line(tmp_path):
    config = TranslateConfig()
    with pytest.raises(RunFolderError, match="best: no checkpoint that --weights best"):
        chosen_weights(config, RunFolder(tmp_path), {})


def test_fine_tuning_refuses_another_model_by_its_flags(finished, text, tmp_path, capsys):
    run = tmp_path / "run"
    cases = [
        (["--from", finished, "--model.dropout-rate", "0.3"], ["--model.dropout-rate: --from"]),
        ([f"--from={finished}", "--vocabulary-size", "400"], ["--vocabulary-size: --from"]),
        (["--from", tmp_path / "gone"], ["gone: not the folder of a translation run"]),
    ]
    for flags, words in cases:
        assert call("translate", "--run", run, *text, *TINY, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not run.exists()


def test_fine_tuning_refuses_lengths_beyond_the_learned_positions(finished):
    start = load(finished)
    model = dataclasses.replace(start.model.config, positions="learned", max_learned_positions=24)
    start = SimpleNamespace(model=SimpleNamespace(config=model), target=start.target)
    config = TranslateConfig(**configured("small", "paper") | {"from_run": finished})
    with pytest.raises(UserError, match="max_learned_positions=24"):
        begun_from(config, start)
    made = begun_from(dataclasses.replace(config, source_length=24, target_length=24), start)
    assert made.model == model


def test_no_test_pair_is_carved_for_validation(tmp_path):
    pairs = [f"word {i}\twort {i}\n" for i in range(2000)]
    (tmp_path / "train.tsv").write_text("".join(pairs))
    config = TranslateConfig(train=(tmp_path / "train.tsv",))
    carved = translate_texts.read(config).valid
    (tmp_path / "test.tsv").write_text("".join("\t".join(pair) + "\n" for pair in carved[:5]))
    tested = dataclasses.replace(config, test=(tmp_path / "test.tsv",))
    assert translate_texts.read(tested).valid == carved[5:]
    limited = dataclasses.replace(config, limits=Limits(characters=8))
    assert 0 < len(translate_texts.read(limited).valid) < len(carved)


def test_a_translation_with_a_line_end_in_it_stays_one_line(finished, tmp_path, capsys):
    results = read(finished, "results.json")
    report({}, RunFolder(tmp_path), results, [("a\tb", "c")], ["d\ne\r"])
    assert (tmp_path / "translations.tsv").read_text() == "source\treference\tmodel\na b\tc\td e \n"


@pytest.mark.parametrize("preset", ["small", "base", "big"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_presets_and_variants_make_sound_configs(preset, variant):
    config = TranslateConfig(**configured(preset, variant))
    assert config.model.norm_placement == VARIANTS[variant].model.norm_placement
    assert config.penalty == VARIANTS[variant].penalty
    sizes = {"small": 256, "base": 512, "big": 1024}
    assert config.model.d_model == sizes[preset]
    assert config.model.dropout_rate == (0.3 if preset == "big" else 0.1)
    assert config.model.compute_dtype == ("float32" if preset == "small" else "auto")


def test_unpicked_places_are_spread_and_in_bounds():
    assert unpicked(1000, 4) == [0, 250, 500, 750]
    assert unpicked(3, 20) == [0, 1, 2] and unpicked(0) == []


def test_a_blank_sentence_stays_blank():
    def shout(sentences, long, beam):
        assert long == "split" and beam == 1
        return [sentence.upper() for sentence in sentences]

    assert translated(shout, ["a", " ", "", "b"], beam=1) == ["A", "", "", "B"]
