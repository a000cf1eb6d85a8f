"""C2 and C3 of docs/reliability.md: the real command, killed and asked to stop."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import pytest
from killing import SAVE_EVERY, finish, kill_and_compare, sound_step, start, write_words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]


def test_kills_lose_two_saves_at_most_and_change_nothing(tmp_path):
    kills, killed, whole = kill_and_compare(tmp_path, kills=5)
    assert sum(kill.aimed != "neither" for kill in kills) >= 3  # of four that were meant to
    for kill in kills:
        assert kill.sound > 0 and kill.lost <= 2 * SAVE_EVERY
    assert killed["state_sha256"] == whole["state_sha256"]
    # The newest sound step after a kill is where the next process goes on.
    assert killed["resumed_from"] == [kill.sound for kill in kills]
    assert whole["resumed_from"] == []


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
