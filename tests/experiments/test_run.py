"""The command from end to end, on a language of 400 words and a model that learns it in seconds.

In process where it can be: a new process would import and compile everything again.
"""

import configparser
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from killing import call

from experiments import run as command
from experiments.checkpoints.checkpoint import Checkpoints
from experiments.evaluation.error_rates import word_error_rate
from experiments.inference.predict_config import PredictConfig
from experiments.pronounce import task as pronounce
from experiments.training import fitting as training
from experiments.training import step_monitor

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[2]
SOUNDS = {"a": "AA", "b": "B", "c": "K", "d": "D", "e": "EH"}
STEPS = 160
TINY = [
    *("--model.d-model", "16", "--model.d-ff", "32", "--model.num-heads", "2"),
    *("--model.num-encoder-layers", "1", "--model.num-decoder-layers", "1"),
    *("--model.dropout-rate", "0.01", "--mesh.data", "1", "--rows", "16", "--source-length", "12"),
    *("--target-length", "12", "--beam", "2", "--learning-rate", "0.02", "--warmup-steps", "10"),
    *("--log-every", "20", "--evaluate-every", "80", "--save-every", "50"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """--train-file, --valid-file and --test-file, and the test words with their pronunciations."""
    folder = tmp_path_factory.mktemp("words")
    words = ["".join(w) for n in (2, 3, 4) for w in itertools.product("abcde", repeat=n)]
    random.Random(0).shuffle(words)
    lexicon = {word: [tuple(SOUNDS[letter] for letter in word)] for word in words[:500]}
    parts = {"train": words[:400], "valid": words[400:430], "test": words[430:500]}
    lexicon[parts["test"][0]].append(("B", "B", "B"))  # a word with a second pronunciation
    flags = []
    for part, members in parts.items():
        lines = (f"{word}\t{' '.join(p)}\n" for word in members for p in lexicon[word])
        (folder / part).write_text("".join(lines))
        flags += [f"--{part}-file", str(folder / part)]
    return flags, {word: lexicon[word] for word in parts["test"]}


@pytest.fixture(scope="module")
def tiny(files):
    """The flags of the tiny run, but its folder and its steps."""
    return [*files[0], *TINY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """The folder of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("runs") / "deep" / "whole"
    assert call("--run", path, "--steps", STEPS, *tiny) == 0
    return path


def read(path, name):
    return json.loads((path / name).read_text(encoding="utf-8"))


def metrics_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def last_state(path):
    """(step, every array) of the newest checkpoint."""
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        step, _ = checkpoints.newest()
        # What is saved, as it is: no structure is given that could hide a difference.
        items = {name: ocp.args.StandardRestore() for name in ("params", "rest")}
        saved = path.absolute() / "checkpoints" / str(step)
        return step, dict(checkpoints._orbax.restore(saved, args=ocp.args.Composite(**items)))


def content(path):
    """Every file of a run folder, with its bytes and its time of change."""
    kept = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in kept}


# ---- what a run leaves


def test_config_holds_every_field_as_resolved(finished):
    config = read(finished, "config.json")
    fields = {f.name for f in dataclasses.fields(pronounce.PronounceConfig)}
    assert config.keys() == fields | {"data_sha256"} and len(config["data_sha256"]) == 64
    assert (config["steps"], config["seed"], config["run"]) == (STEPS, 0, str(finished))
    model = config["model"]
    assert (model["vocab_size"], model["source_vocab_size"], model["d_model"]) == (8, 8, 16)


def test_metrics_begin_with_the_first_step_and_end_with_the_last(finished):
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == [1, *range(20, STEPS + 1, 20)]
    assert all({"step", "loss", "tokens_per_second"} <= line.keys() for line in lines)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    evaluated = [line["step"] for line in lines if "valid_wer" in line]
    assert evaluated == [80, 160]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["valid_loss"] < lines[4]["valid_loss"]


def test_results_are_fractions_with_the_required_keys(finished):
    results = read(finished, "results.json")
    for name in ("test_wer", "test_per", "valid_wer"):
        assert 0 < results[name] < 1, name
    assert (results["test_words"], results["steps"]) == (70, STEPS)
    assert results["train_seconds"] > 0
    step, tree = last_state(finished)
    assert step == STEPS
    assert results["parameters"] == sum(x.size for x in jax.tree.leaves(tree["params"]))


def test_tensorboard_events(finished):
    (events,) = (finished / "tensorboard").glob("events.out.tfevents.*")
    written = events.read_bytes()
    assert all(tag in written for tag in (b"loss", b"valid_wer", b"tokens_per_second"))


def test_the_report_is_whole_and_loads_nothing(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", page)
    assert all((a or b).strip("\"'").startswith(("#", "data:")) for a, b in fetched), fetched
    assert "<script" not in page and "<link" not in page
    assert page.count("<svg") >= 6 + 4  # learning curves; a map of each head of some words
    assert f"{read(finished, 'results.json')['test_wer']:.1%}" in page


# ---- the same folder again


def test_a_finished_run_says_so_and_does_not_train_again(finished, tiny, capsys):
    before = content(finished)
    assert call("--run", finished, "--steps", STEPS, *tiny) == 0
    assert f"finished ({STEPS} steps); a larger --steps extends it" in capsys.readouterr().out
    after = content(finished)
    assert after.keys() == before.keys()
    assert {n: b for n, (b, _) in after.items()} == {n: b for n, (b, _) in before.items()}
    kept = [n for n in before if n != "config.json"]  # rewritten as it was
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}


def test_another_config_is_refused_naming_old_and_new(finished, tiny, capsys):
    before = content(finished)
    other = [*tiny, "--seed", 5, "--model.d-ff", 64, "--smoothing", 0.2]
    assert call("--run", finished, "--steps", STEPS, *other) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for difference in ("seed: 0 -> 5", "model.d_ff: 32 -> 64", "smoothing: 0.1 -> 0.2"):
        assert difference in error
    assert content(finished) == before


def test_fewer_steps_are_refused(finished, tiny, capsys):
    before = content(finished)
    assert call("--run", finished, "--steps", STEPS - 10, *tiny) == 2
    error = capsys.readouterr().err
    assert error == f"error: {finished} is at step {STEPS}, beyond --steps {STEPS - 10}\n"
    assert content(finished) == before


@pytest.mark.parametrize(
    "sound",
    [
        # The same ids under other letters: nothing but the vocabulary differs.
        pytest.param({}, id="same ids"),
        pytest.param({"AA": "B", "B": "AA"}, id="other ids"),
    ],
)
def test_other_words_in_the_same_files_are_refused_and_nothing_is_lost(
    finished, tiny, files, sound, monkeypatch
):
    renamed = str.maketrans("abcde", "fghij")

    def renaming(path, *rest):
        lexicon = original(path)
        return {
            word.translate(renamed): [tuple(sound.get(s, s) for s in p) for p in variants]
            for word, variants in lexicon.items()
        }

    def no_training(*_, **__):
        raise AssertionError("trained on other data")

    original = pronounce.pronunciations.read_lexicon
    monkeypatch.setattr(pronounce.pronunciations, "read_lexicon", renaming)
    monkeypatch.setattr(training, "make_train_step", lambda *_, **__: no_training)
    before = content(finished)
    assert call("--run", finished, "--steps", STEPS + 10, *tiny) == 2
    assert content(finished) == before


def test_another_config_is_refused_though_the_file_that_told_is_lost(finished, tiny, capsys):
    config = (finished / "config.json").read_bytes()
    (finished / "config.json").unlink()
    try:
        before = content(finished)
        assert call("--run", finished, "--steps", STEPS, *tiny, "--seed", 5) == 2
        error = capsys.readouterr().err
        assert "belongs to another run (seed: 0 -> 5)" in error and error.count("\n") == 1
        assert content(finished) == before
    finally:
        (finished / "config.json").write_bytes(config)


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted_then_extended(
    finished, tiny, tmp_path, monkeypatch, capsys
):
    run = ["--run", tmp_path / "run", *tiny]
    add, calls = step_monitor.StepMonitor.add, []

    def add_and_stop(self, *arguments):
        calls.append(1)
        if len(calls) == 75:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_monitor.StepMonitor, "add", add_and_stop)
        assert call(*run, "--steps", STEPS) == 143
    assert len(calls) == 75 == last_state(tmp_path / "run")[0]
    assert not (tmp_path / "run" / "results.json").exists()
    assert "stopped and saved at step 75" in capsys.readouterr().err

    assert call(*run, "--steps", STEPS) == 0
    assert "at step 75" in capsys.readouterr().err
    # Two runs of one seed, one of them cut: every parameter, moment and key, bit for bit.
    (step, resumed), (_, whole) = last_state(tmp_path / "run"), last_state(finished)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [
        m["step"] for m in metrics_of(finished)
    ]
    was, now = read(finished, "results.json"), read(tmp_path / "run", "results.json")
    assert now["resumed_from"] == [75] and was["resumed_from"] == []
    same = {"train_seconds": 0, "resumed_from": 0}
    assert was | same == now | same and len(was["state_sha256"]) == 64

    lines = metrics_of(tmp_path / "run")
    assert call(*run, "--steps", STEPS + 4) == 0
    assert metrics_of(tmp_path / "run")[: len(lines)] == lines
    assert metrics_of(tmp_path / "run")[-1]["step"] == STEPS + 4
    assert read(tmp_path / "run", "results.json")["steps"] == STEPS + 4
    assert read(tmp_path / "run", "config.json")["steps"] == STEPS + 4
    assert last_state(tmp_path / "run")[0] == STEPS + 4
    # What the shorter run found is still there.
    assert read(tmp_path / "run", f"results-{STEPS}.json") == now
    assert (tmp_path / "run" / f"report-{STEPS}.html").exists()


def test_a_periodic_save_holds_the_state_of_its_step(finished, tiny, tmp_path):
    # The steps after a save run while it is written, into the memory that they were given.
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    (tmp_path / "run" / "results.json").unlink()
    assert last_state(tmp_path / "run")[0] == 150
    assert call("--run", tmp_path / "run", "--steps", STEPS, *tiny) == 0
    assert read(tmp_path / "run", "results.json")["resumed_from"] == [150]
    (step, resumed), (_, whole) = last_state(tmp_path / "run"), last_state(finished)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_every_setting_reaches_the_training(tiny, tmp_path, monkeypatch):
    seen = {}

    class EnoughError(Exception):
        pass

    def record(name):
        module = pronounce if name == "packed_batches" else training
        original = getattr(module, name)

        def recorded(*arguments, **named):
            seen[name] = arguments, named
            if name == "train":
                raise EnoughError
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, recorded)

    for name in ("init_state", "make_optimizer", "make_train_step", "packed_batches", "train"):
        record(name)
    flags = {"seed": 3, "clip": 0.3, "smoothing": 0.2, "accumulation": 2, "steps": 70,
             "learning-rate": 0.5, "warmup-steps": 7, "log-every": 11, "evaluate-every": 13,
             "save-every": 17, "most-skipped": 3, "keep-checkpoints": 4}  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with pytest.raises(EnoughError):
        call("--run", tmp_path / "run", *tiny, *given)
    np.testing.assert_array_equal(seen["init_state"][0][2], jax.random.PRNGKey(3))
    schedule, clip = seen["make_optimizer"][0]
    assert clip == 0.3 and float(schedule(7)) == pytest.approx(0.5)
    assert {"smoothing": 0.2, "accumulation": 2}.items() <= seen["make_train_step"][1].items()
    assert seen["packed_batches"][1] == {
        "rows": 16, "source_length": 12, "target_length": 12, "seed": 3, "own": slice(0, 16),
    }  # fmt: skip
    config = seen["train"][0][0].config
    assert (config.steps, config.log_every, config.evaluate_every) == (70, 11, 13)
    assert (config.save_every, config.most_skipped, config.keep_checkpoints) == (17, 3, 4)


# ---- as processes


def spawn(*arguments, **streams):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams,
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_in_the_middle_leaves_with_130_and_a_checkpoint(tmp_path, tiny):
    path = tmp_path / "run"
    process = spawn("pronounce", "--run", path, "--steps", 1_000_000, *tiny)
    try:
        # Once the first step is logged, the training is under way.
        deadline = time.monotonic() + 120
        while not ((path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    step = last_state(path)[0]
    assert f"stopped and saved at step {step}; the same command goes on" in error.decode()
    assert "Traceback" not in error.decode()
    assert metrics_of(path)[-1]["step"] <= step and not (path / "results.json").exists()


def test_predict_as_a_process(finished):
    process = spawn("predict", "--run", finished, stdin=subprocess.PIPE)
    out, error = process.communicate(b"ab\n\nxyz\ndeb", timeout=120)
    assert process.returncode == 0
    lines = out.decode().split("\n")
    assert len(lines) == 5 and lines[1] == lines[2] == lines[4] == ""
    assert set(lines[0].split()) <= set(SOUNDS.values()) and lines[0] and lines[3]
    assert [line for line in error.decode().splitlines() if line.startswith("line ")] == [
        "line 3: 'xyz': unknown character 'x'",
    ]


def test_a_missing_file_as_a_process(tmp_path):
    process = spawn("--run", tmp_path / "run", "--train-file", tmp_path / "absent")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and not out
    assert error.decode() == f"error: {tmp_path / 'absent'}: No such file or directory\n"
    assert not (tmp_path / "run").exists()


def test_what_a_terminal_cannot_show_costs_no_result(tmp_path, tiny, monkeypatch):
    def show(*_):
        raise UnicodeEncodeError("ascii", "ɑ", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr(pronounce, "show", show)
    with pytest.raises(UnicodeEncodeError):
        call("--run", tmp_path, "--steps", "1", *tiny)
    assert {"results.json", "params.safetensors", "report.html"} <= set(os.listdir(tmp_path))


# ---- predict


@pytest.fixture
def predict(monkeypatch, capsys):
    """(exit code, output, errors) of `predict` with bytes on standard input."""

    def run(data: bytes, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = call("predict", *arguments)
        return code, *capsys.readouterr()

    return run


def test_predicts_wer_is_that_of_the_results(finished, files, predict):
    words = files[1]
    code, out, error = predict("\n".join(words).encode(), "--run", finished)
    assert (code, error) == (0, "")
    hypotheses = [line.split() for line in out.splitlines()]
    wer = word_error_rate(hypotheses, list(words.values()))
    assert wer == read(finished, "results.json")["test_wer"]


def test_predict_nbest_and_beam(finished, predict):
    data = b"abc\r\n\n\xff\nDEAD\n"
    code, out, error = predict(data, "--run", finished, "--beam", "2", "--nbest", "2")
    assert code == 0 and len(error.splitlines()) == 2
    lines = out.split("\n")
    assert len(lines) == 9 and lines[2:6] == ["\t\t"] * 4
    scores = [float(line.split("\t")[1]) for line in (*lines[:2], *lines[6:8])]
    assert scores[0] >= scores[1] and scores[2] >= scores[3]
    best = predict(data, "--run", finished)[1].split("\n")
    assert [best[0], best[3]] == [lines[0].split("\t")[2], lines[6].split("\t")[2]]


def test_predict_errors(tmp_path, predict):
    code, out, error = predict(b"ab\n", "--run", tmp_path / "absent")
    assert (code, out) == (2, "") and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path / 'absent'}: ")
    assert not (tmp_path / "absent").exists()
    code, out, error = predict(b"ab\n", "--beam", "1", "--nbest", "2")
    assert (code, out) == (2, "") and "nbest=2 must be at most beam=1" in error


# ---- help and flags


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_every_experiment_with_a_sentence(flag, capsys):
    assert call(flag) == 0
    out = capsys.readouterr().out
    for name, (sentence, *_) in command.COMMANDS.items():
        assert sentence.rstrip().endswith(".")
        assert re.search(rf"^ *{name} +{re.escape(sentence)}$", out, re.MULTILINE)
    assert set(command.COMMANDS) == {
        "pronounce", "translate", "claims", "bench", "cost", "variants", "predict", "score",
        "import", "export", "plan",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [[name] for name in command.COMMANDS] + [["bench", "--device"], []]
)
def test_help_fits_80_columns_and_breaks_no_line_as_the_source_does(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(os, "cpu_count", jax.local_device_count)  # this process has begun with them
    assert call(*arguments, "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    if arguments == ["pronounce"]:
        cache = re.search(r"--compilation-cache(.*?)--seed", out, re.DOTALL)[1]
        lines = [line.strip("│ ") for line in cache.splitlines()]
        assert "processes of a machine. None: JAX_COMPILATION_CACHE_DIR, or nothing is" in lines


@pytest.mark.parametrize(
    ("former", "present"),
    [
        (["--model.attention", "chunked"], ["--model.implementation", "chunked"]),
        (["--model.attention=reference"], ["--model.implementation=formula"]),
        (["--model.attention", "reference"], ["--model.implementation", "formula"]),
    ],
)
def test_a_flag_of_a_former_name_is_taken_and_told(former, present, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(command, "call", lambda _, flags: seen.append(flags))
    command.main(["plan", "--rows", "8", *former])
    assert seen == [["--rows", "8", *present]]
    assert "--model.attention is called --model.implementation now" in capsys.readouterr().err


def test_an_unknown_experiment_leaves_with_2_and_the_list(capsys):
    assert call("pronuonce", "--steps", "3") == 2
    error = capsys.readouterr().err
    assert "'pronuonce'" in error and "predict" in error


def test_on_linux_the_process_starts_anew_once_on_huge_pages(monkeypatch):
    begun = []
    monkeypatch.setattr(command.os, "execv", lambda *arguments: begun.append(arguments))
    monkeypatch.setattr(command.sys, "orig_argv", ["python", "-m", "experiments.run", "--help"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back as it was
    monkeypatch.delenv("GLIBC_TUNABLES")
    for platform in ("darwin", "linux", "linux"):
        monkeypatch.setattr(command.sys, "platform", platform)
        command.use_huge_pages()
    arguments = [sys.executable, "-m", "experiments.run", "--help"]
    assert begun == [(sys.executable, arguments)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("script", ["/somewhere/bin/tfm", "/somewhere/experiments/run.py"])
def test_help_names_the_command_as_it_was_called(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    name = "tfm" if script.endswith("tfm") else "python -m experiments.run"
    assert call("--help") == 0 and call("variants", "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: {name} [EXPERIMENT]" in out and f"usage: {name} variants" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no huge pages to ask for")
def test_the_command_tfm_starts_anew_as_itself(tmp_path):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, function = target.split(":")
    script = tmp_path / name
    script.write_text(  # as pip writes it, and what it sees of its environment
        "import os, sys\nprint(os.environ.get('GLIBC_TUNABLES'), file=sys.stderr)\n"
        f"from {module} import {function}\nsys.exit({function}())\n"
    )
    environment = {n: value for n, value in os.environ.items() if n != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, script, "--help"], env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("usage: tfm [EXPERIMENT] [flags]\n")
    assert done.stderr == "None\nglibc.malloc.hugetlb=1\n"


def flags_of(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags_of(value, f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}".replace("_", "-")


@pytest.mark.parametrize(
    ("experiment", "config"),
    [("pronounce", pronounce.PRESETS["default"]), ("predict", PredictConfig())],
)
def test_every_field_is_a_flag_with_a_help_line(experiment, config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert call(experiment, "--help") == 0
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", capsys.readouterr().out)
    # From the start of a line with a flag to the next such line.
    entries = re.split(r"^\s*(?=--[a-z])", text, flags=re.MULTILINE)
    helps = {entry.split()[0].rstrip(","): entry for entry in entries if entry.startswith("--")}
    flags = list(flags_of(config))
    assert len(flags) > 2 and set(flags) <= helps.keys()
    for flag in flags:
        sentence, default, _ = helps[flag].partition("(default")
        assert default and re.search(r"[A-Zhlε]\w*( |\n).*[.:)]", sentence, re.DOTALL), helps[flag]
        assert len(sentence.split()) >= 5, helps[flag]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "default"),
        (["pronounce"], "default"),
        (["--preset", "full"], "full"),
        (["pronounce", "--preset=full"], "full"),
    ],
)
def test_presets_parse_and_flags_override_them(arguments, expected, monkeypatch):
    ran = []
    monkeypatch.setattr(pronounce, "run", ran.append)
    assert call(*arguments) == 0
    assert call(*arguments, "--steps", 7, "--model.d-ff", 99, "--run", "x") == 0
    preset = pronounce.PRESETS[expected]
    model = dataclasses.replace(preset.model, d_ff=99)
    assert ran == [preset, dataclasses.replace(preset, steps=7, run=Path("x"), model=model)]


# ---- what is wrong is said before anything compiles


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--steps 0", "steps=0 must be at least 1"),
        ("--rows -1", "rows=-1 must be at least 1"),
        ("--log-every 0", "log_every=0 must be at least 1"),
        ("--rows 9 --accumulation 4", "accumulation=4 does not divide rows=9"),
        ("--model.num-heads 3", "num_heads=3 does not divide d_model=16"),
        ("--model.d-model 15 --model.num-heads 5", "d_model=15 is odd"),
        ("--model.vocab-size 99", "vocab_size=99, but the data's vocabulary has 8 symbols"),
        ("--target-length 4", "327 of 400 training pronunciations are too long, as that of"),
        ("--source-length 4", "--source-length 5 --target-length 12 takes them"),
        ("--preset medium", "medium"),
        ("--no-such-flag 3", "--no-such-flag"),
        ("--steps many", "many"),
    ],
)
def test_impossible_flags_leave_with_2_and_no_folder(tiny, tmp_path, flags, why, capsys):
    assert call("--run", tmp_path / "run", *tiny, *flags.split()) == 2
    out, error = capsys.readouterr()
    assert why in " ".join(re.sub(r"[│╭╮╰╯─]", "", error).split())
    assert not out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "valid", "test"])
@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (None, ": No such file or directory"),
        (b"", ": no words in it"),
        (b"ab\tAA B\nab\n", ":2: no pronunciation after the word 'ab'"),
        (b"ab\tAA B\n\xff\tB\n", ":2: invalid UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_and_no_folder(tiny, tmp_path, part, broken, why, capsys):
    path = tmp_path / "words"
    if broken is not None:
        path.write_bytes(broken)
    assert call("--run", tmp_path / "run", *tiny, f"--{part}-file", path) == 2
    assert capsys.readouterr() == ("", f"error: {path}{why}\n")
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_folder_is_named(tiny, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert call("--run", tmp_path / "run", *tiny) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'run'}") and error.count("\n") == 1
    assert (tmp_path / "run").read_text() == "mine"
