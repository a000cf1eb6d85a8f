"""C1 to C3 of docs/reliability.md: the real command, killed or asked to stop, and gone on with."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import pytest
from killing import (
    SAVE_EVERY,
    TINY,
    call,
    finish,
    kill_and_compare,
    sound_step,
    start,
    write_words,
)

from experiments.checkpoints.checkpoint import Checkpoints
from experiments.pronounce import task as pronounce
from experiments.training import fitting, step_monitor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]


# ---- killed


def test_kills_lose_two_saves_at_most_and_change_nothing(tmp_path):
    kills, killed, whole = kill_and_compare(tmp_path, kills=5)
    assert sum(kill.aimed != "neither" for kill in kills) >= 3  # of four that were meant to
    for kill in kills:
        assert kill.sound > 0 and kill.lost <= 2 * SAVE_EVERY
    assert killed["state_sha256"] == whole["state_sha256"]
    # The newest sound step after a kill is where the next process goes on.
    assert killed["resumed_from"] == [kill.sound for kill in kills]
    assert whole["resumed_from"] == []


# ---- asked to stop


@pytest.fixture
def compiles(monkeypatch):
    """The step is compiled anew, which takes seconds."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")


def asked_to_stop(run, flags, when, *numbers, apart=0.0):
    """(exit code, standard error) of a run that is sent signals as soon as `when()` is true."""
    process = start(run, 1_000_000, flags)
    try:
        deadline = time.monotonic() + 120
        while not when():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        for number in numbers:
            process.send_signal(number)
            time.sleep(apart)
        error = process.communicate(timeout=120)[1].decode()
    finally:
        process.kill()
    assert "Traceback" not in error
    return process.returncode, error


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_it_compiles_saves_the_first_step(tmp_path, number, code):
    run, flags = tmp_path / "run", write_words(tmp_path)
    # It is made just before the step is compiled.
    returned, error = asked_to_stop(run, flags, (run / "checkpoints").exists, number)
    assert returned == code
    assert f"{signal.Signals(number).name}: finishing the step and saving" in error
    assert "stopped and saved at step 1;" in error and sound_step(run) == 1


@pytest.mark.usefixtures("compiles")
def test_a_second_signal_leaves_at_once_even_while_it_compiles(tmp_path):
    run, flags = tmp_path / "run", write_words(tmp_path)
    started = time.monotonic()
    returned, error = asked_to_stop(
        run, flags, (run / "checkpoints").exists, signal.SIGTERM, signal.SIGTERM, apart=0.2
    )
    assert returned == 143 and "again to leave at once" in error
    assert "stopped and saved" not in error and sound_step(run) == 0
    assert time.monotonic() - started < 60


def test_a_signal_while_it_saves_keeps_the_step(tmp_path):
    run, flags = tmp_path / "run", write_words(tmp_path)

    def saving():
        return any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    returned, error = asked_to_stop(run, flags, saving, signal.SIGTERM)
    assert returned == 143
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"stopped and saved at step {last};" in error and sound_step(run) == last


# ---- refused by the system


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What this test has compiled alone: half an entry of a process that was killed is told."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB in memory, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.usefixtures("own_cache")
def test_a_limit_on_files_ends_the_run_in_one_line_and_loses_nothing(tmp_path):
    """C5: a limit on the size of files in the place of a full disk."""
    run, flags = tmp_path / "run", write_words(tmp_path)
    finish(run, 20, flags)
    limit = (8000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    process = start(
        run, 60, flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 2 and error.count("error: ") == 1 and "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"error: {run}/") and last.endswith(": File too large")
    assert sound_step(run) == 20


@pytest.mark.usefixtures("own_cache")
def test_a_disk_that_is_full_ends_the_run_in_one_line_and_loses_nothing(tmp_path, small_disk):
    """C5 on a real disk: nothing is free, then room to begin but none to save, then enough."""
    run, flags, ballast = small_disk / "run", write_words(tmp_path), small_disk / "ballast"
    finish(run, 20, flags)
    for free, where in ((0, "config.json"), (48 << 10, "checkpoints/30: not saved")):
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
        process = start(run, 60, flags)
        error = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 2 and error.count("error: ") == 1 and "Traceback" not in error
        last = error.splitlines()[-1]
        assert last == f"error: {run}/{where}: No space left on device"
        assert sound_step(run) == 20
        ballast.unlink()
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    error = start(run, 60, flags).communicate(timeout=120)[1].decode()
    assert error == f"error: {run}: Read-only file system\n"
    subprocess.run([*remount[:2], "remount,rw", str(small_disk)], check=True)
    assert set(finish(run, 60, flags)["resumed_from"]) == {20}


def test_a_run_goes_on_and_writes_its_results_when_nobody_listens_any_more(tmp_path):
    run, flags = tmp_path / "run", write_words(tmp_path)
    reading, writing = os.pipe()
    process = start(run, 100, flags, stdout=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)  # as `| head -1` does
    process.stderr.readline()
    process.stderr.close()  # what it says from now on breaks the pipe
    assert process.wait(timeout=240) == 0
    assert json.loads((run / "results.json").read_text())["steps"] == 100


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    run, flags = tmp_path / "run", write_words(tmp_path)
    first = start(run, 1_000_000, flags)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        second = start(run, 1_000_000, flags)
        error = second.communicate(timeout=120)[1].decode()
        assert second.returncode == 2
        assert error == f"error: {run}: another process is working in it\n"
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=120)
        assert first.returncode == 143
    finally:
        first.kill()


# ---- gone on with, in this process

STEPS = 60
ACCUMULATING = ["--accumulation", "2"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [*write_words(tmp_path_factory.mktemp("words")), *TINY, "--steps", STEPS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """Results of runs that nothing interrupted, without and with accumulation."""
    folder = tmp_path_factory.mktemp("whole")
    results = {}
    for name, more in (("plain", []), ("accumulating", ACCUMULATING)):
        assert call("--run", folder / name, *flags, *more) == 0
        results[name] = json.loads((folder / name / "results.json").read_text())
    return results


def rows_an_epoch(flags):
    """How many packed rows the training words make."""
    from experiments.data.packing import packed_rows

    config = pronounce.PronounceConfig(train_file=flags[1], valid_file=flags[3], source_length=12)
    lexicons = pronounce.load_lexicons(config)
    examples, _ = pronounce.prepare(lexicons)
    return len(packed_rows(examples, 12, 12)["source"])


@pytest.mark.parametrize(
    ("cuts", "kind"),
    [
        pytest.param([7], "plain", id="in the middle of an epoch"),
        pytest.param([-1], "plain", id="at an epoch's end"),
        pytest.param([-1, 25, 40], "plain", id="in the second epoch, again and again"),
        pytest.param([7, 23], "accumulating", id="with gradient accumulation"),
    ],
)
def test_a_resumed_run_ends_in_the_same_state(tmp_path, flags, whole, cuts, kind, monkeypatch):
    more = ACCUMULATING if kind == "accumulating" else []
    epoch = rows_an_epoch(flags) // 8  # the batch that an epoch ends with or in
    assert 7 < epoch < 25
    cuts = [epoch if cut == -1 else cut for cut in cuts]
    add = step_monitor.StepMonitor.add
    for cut in cuts:

        def add_and_stop(self, *arguments, cut=cut):
            add(self, *arguments)
            if self.reached == cut:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(step_monitor.StepMonitor, "add", add_and_stop)
            assert call("--run", tmp_path, *flags, *more) == 143
    assert call("--run", tmp_path, *flags, *more) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["state_sha256"] == whole[kind]["state_sha256"]
    assert results["resumed_from"] == cuts
    assert whole["plain"]["state_sha256"] != whole["accumulating"]["state_sha256"]


def test_a_signal_while_the_parameters_are_made_saves_the_first_step(
    tmp_path, flags, monkeypatch, capsys
):
    init_state = fitting.init_state

    def stop_and_init(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return init_state(*arguments)

    monkeypatch.setattr(fitting, "init_state", stop_and_init)
    assert call("--run", tmp_path, *flags) == 143
    assert "stopped and saved at step 1;" in capsys.readouterr().err


def test_a_signal_during_an_evaluation_saves_its_step(tmp_path, flags, monkeypatch, capsys):
    make_evaluate = pronounce.make_evaluate

    def make_stopping(*arguments):
        def evaluate(params):
            os.kill(os.getpid(), signal.SIGINT)
            return make_evaluate(*arguments)(params)

        return evaluate

    monkeypatch.setattr(pronounce, "make_evaluate", make_stopping)
    assert call("--run", tmp_path, *flags, "--evaluate-every", "5") == 130
    assert "SIGINT: finishing the step and saving" in capsys.readouterr().err
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        # It came after step 5 was looked at, so one step more was under way.
        assert checkpoints.newest()[0] in (5, 6)
