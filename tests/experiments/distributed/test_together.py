"""One training in two processes: the same numbers as in one, and an end for all when one ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import TINY, sound_step, write_words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

HEARTBEAT, STALL, MORE = 4, 8, 15  # seconds; the other has ended within MORE after one of them
FLAGS = [
    *(*TINY, "--mesh.data", "2"),
    *("--heartbeat-timeout", str(HEARTBEAT), "--stall-timeout", str(STALL)),
]
FOREVER = 1_000_000

# What goes wrong in a process, in which function, and when: at its call of that number, or once
# there is a file of that name beside the run folder.
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
FROZEN = "os.kill(os.getpid(), signal.SIGSTOP)"
BROKEN = "raise OSError('the disk is gone')"
STUCK = "time.sleep(10_000)"
BEFORE = ("experiments.pronounce.task", "prepare", 1)
# Of the arrays of a batch: inside of the step.
IN_A_STEP = ("experiments.training.placement.Layout", "_share", 90)
BETWEEN = ("experiments.training.step_monitor.StepMonitor", "add", 30)
REPORTING = ("experiments.pronounce.task", "report", 1)
WAITING = ("experiments.distributed.processes.Processes", "_has_arrived", "reporting")
_MAIN = """
import os, pkgutil, signal, sys, time
from experiments import run
place, name, when = {where!r}
owner, calls = pkgutil.resolve_name(place), [0]
original = getattr(owner, name)
def faulty(*arguments, **options):
    calls[0] += 1
    if calls[0] == when or os.path.exists(os.path.join({folder!r}, str(when))):
        open(os.path.join({folder!r}, {note!r}), "w").write(str(time.time()))
        {fault}
    return original(*arguments, **options)
setattr(owner, name, faulty)
run.main(sys.argv[1:])
"""


def spawn(run, steps, flags, devices=1, program=("-m", "experiments.run")):
    return subprocess.Popen(
        [sys.executable, *program, "--run", str(run), "--steps", str(steps), *flags],
        cwd=Path(__file__).parents[3], text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(run, steps, words, programs=((), ()), own_flags=((), ())):
    """The two processes of one run, each with its own program and flags."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    started = []
    for i in (0, 1):
        program = {"program": programs[i]} if programs[i] else {}
        flags = [*words, *FLAGS, *where, str(i), *own_flags[i]]
        started.append(spawn(run, steps, flags, **program))
    return started


def whole(run, steps, flags, devices):
    """The results of a run of one process."""
    process = spawn(run, steps, flags, devices)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    return json.loads((run / "results.json").read_text())


def ends(processes, timeout=300):
    """Return code and standard error of each."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [p.returncode for p in processes], errors


def until_trained(run, processes):
    """Waits for the first checkpoints of two processes at work."""
    deadline = time.monotonic() + 240
    while sound_step(run) < 20:
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory):
    """A run of two processes, one of which was told to stop; what both said, and the step."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    processes = pair(run, FOREVER, words)
    until_trained(run, processes)
    processes[1].send_signal(signal.SIGTERM)
    return run, *ends(processes)


def test_two_processes_are_one_of_two_devices_bit_for_bit(words, tmp_path):
    codes, errors = ends(pair(tmp_path / "two", 40, words))
    assert codes == [0, 0], errors
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    one = whole(tmp_path / "one", 40, [*words, *FLAGS], devices=2)
    assert two["state_sha256"] == one["state_sha256"]
    assert two["processes"] == 2 and one["processes"] == 1
    assert two["devices"] == one["devices"] == 2
    assert two["test_per"] == one["test_per"]
    losses = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]
        for run in ("two", "one")
    ]
    assert losses[0] == losses[1]  # of the evaluation, which both processes take part in


def test_a_signal_to_one_stops_both_at_the_same_step(stopped):
    run, codes, errors = stopped
    assert codes == [143, 143], errors
    step = int(re.search(r"stopped and saved at step (\d+);", errors[0])[1])
    assert sound_step(run) == step
    assert "SIGTERM: finishing the step and saving" in errors[1]


def test_ctrl_c_in_process_0_stops_both_at_the_same_step(words, tmp_path):
    processes = pair(tmp_path / "run", FOREVER, words)
    until_trained(tmp_path / "run", processes)
    processes[0].send_signal(signal.SIGINT)
    codes, errors = ends(processes)
    assert codes == [130, 130], errors
    step = int(re.search(r"stopped and saved at step (\d+);", errors[0])[1])
    assert sound_step(tmp_path / "run") == step


@pytest.mark.parametrize("devices", [1, 8])
def test_their_checkpoint_resumes_on_other_devices(stopped, words, devices, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    step = sound_step(run)
    flags = [*words, *TINY, "--mesh.data", str(devices)]
    results = whole(run, step + 20, flags, devices)
    assert results["resumed_from"] == [step] and results["devices"] == devices


def test_a_mesh_of_eight_devices_says_what_each_holds_and_its_model_predicts(words, tmp_path):
    """Heads, vocabulary and d_model in two parts each; the vocabulary of 8 and 9 is padded."""
    run, mesh = tmp_path / "run", ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    results = whole(run, 20, [*words, *TINY, *mesh], devices=8)
    assert results["devices"] == 8
    assert results["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    held, whole_bytes = results["parameter_bytes_per_device"], 4 * results["parameters"]
    # What is no matrix stays whole, and is a tenth of this small model.
    assert whole_bytes / 4 < held < whole_bytes / 4 + whole_bytes / 10
    assert 2 * held <= results["moment_bytes_per_device"] <= 2 * held + 8
    predict = [sys.executable, "-m", "experiments.run", "predict", "--run", str(run)]
    said = subprocess.run(
        predict, input="abc\n", capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert said.returncode == 0 and said.stdout.count("\n") == 1, said.stderr


def program(run, where, note, fault):
    """The command with a fault in it, which writes its time into the file `note` beside `run`."""
    return "-c", _MAIN.format(where=where, folder=str(run.parent), note=note, fault=fault)


def goes_wrong(run, words, victim, fault, where):
    """(seconds until the other has ended, its code, what it said, code and errors of the victim).

    While process 0 reports process 1 waits for it: there the fault of process 1 lies, and process 0
    takes its time.
    """
    programs = [(), ()]
    if where == REPORTING:
        programs[0] = program(run, REPORTING, "reporting", STUCK)
        where = WAITING if victim else REPORTING
    programs[victim] = program(run, where, "noted", fault)
    steps = 20 if where in (REPORTING, WAITING) else FOREVER
    processes = pair(run, steps, words, programs)
    try:
        said = processes[1 - victim].communicate(timeout=120)
        seconds = time.time() - float((run.parent / "noted").read_text())
        if fault == FROZEN:
            processes[victim].kill()
        _, error = processes[victim].communicate(timeout=MORE)
    finally:
        for process in processes:
            process.kill()
    return seconds, processes[1 - victim].returncode, said, processes[victim].returncode, error


# JAX's own lines, ours, and that of the watchdog; no word that may stand in a traceback.
LOST = re.compile(
    "JAX distributed service detected fatal errors|tasks are unhealthy|another task was lost|"
    r"Timeout \(0:00:08\)!"
)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", [BEFORE, IN_A_STEP, BETWEEN, REPORTING], ids=lambda w: w[1])
@pytest.mark.parametrize("fault", [KILLED, FROZEN, BROKEN], ids=["killed", "frozen", "broken"])
def test_what_ends_one_process_ends_the_other_in_time(words, fault, where, victim, tmp_path):
    seconds, code, said, own_code, error = goes_wrong(tmp_path / "run", words, victim, fault, where)
    assert seconds < HEARTBEAT + MORE
    assert code not in (0, 2) and LOST.search(said[1]), said
    if fault == BROKEN:
        assert own_code == 1 and error.rstrip().endswith("OSError: the disk is gone"), error


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", [IN_A_STEP, BETWEEN], ids=lambda w: w[1])
def test_a_process_that_stands_still_says_where_and_ends_the_other(words, where, victim, tmp_path):
    seconds, code, said, own_code, error = goes_wrong(tmp_path / "run", words, victim, STUCK, where)
    assert seconds < STALL + MORE
    assert code not in (0, 2) and LOST.search(said[1]), said
    assert own_code not in (0, 2)
    assert "Timeout (0:00:08)!" in error + said[1], error  # whichever was the first
    if "Timeout" in error:
        assert "in faulty" in error, error


def test_process_0_may_take_longer_than_a_step_where_the_others_wait_for_its_file(words, tmp_path):
    """It decodes at each evaluation: at step 20 here, and at the end, when it also reports."""
    score = ("experiments.pronounce.task", "score", 1)
    slow = program(tmp_path / "run", score, "noted", "time.sleep(7)")
    flags = ("--evaluate-every", "20", "--heartbeat-timeout", "4", "--stall-timeout", "5")
    codes, errors = ends(pair(tmp_path / "run", 40, words, (slow, ()), (flags, flags)))
    assert codes == [0, 0], errors
    assert (tmp_path / "noted").exists() and (tmp_path / "run" / "report.html").exists()


def test_processes_with_other_versions_are_told_apart(words, tmp_path):
    other = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9" if name == "optax" else version(name)
from experiments import run
run.main(sys.argv[1:])
"""
    codes, errors = ends(pair(tmp_path / "run", 40, words, ((), ("-c", other))))
    assert codes == [2, 2]
    told = r"error: process 1 differs from process 0 .*versions\.optax: '[\d.]+' -> '9\.9'"
    assert all(re.search(told, error) for error in errors), errors


@pytest.mark.parametrize(
    ("flag", "told"),
    [("--seed", "seed: 0 -> 1"), ("--evaluate-every", "evaluate_every: 1000000 -> 1")],
)
def test_processes_with_other_flags_are_told_apart(words, flag, told, tmp_path):
    """Those that decide when all meet, too."""
    codes, errors = ends(pair(tmp_path / "run", 40, words, own_flags=((), (flag, "1"))))
    assert codes == [2, 2]
    for error in errors:
        assert re.search(rf"error: process 1 differs from process 0 .*{told}", error)
    assert not (tmp_path / "run").exists()


def test_processes_with_other_data_are_told_apart(words, tmp_path):
    other = tmp_path / "words"
    lines = Path(words[1]).read_text().splitlines(keepends=True)
    other.write_text("".join(lines[:-1]))
    own = ((), ("--train-file", str(other)))
    codes, errors = ends(pair(tmp_path / "run", 40, words, own_flags=own))
    assert codes == [2, 2]
    assert all("data_sha256" in error and "differs from process 0" in error for error in errors)


def test_a_coordinator_that_cannot_be_reached_is_named(words, tmp_path):
    where = ["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "1",
             "--connect-timeout", "2"]  # fmt: skip
    code, error = [x[0] for x in ends([spawn(tmp_path / "run", 40, [*words, *FLAGS, *where])])]
    assert code == 2 and "Traceback" not in error
    assert "127.0.0.1:1" in error and "2 s" in error and error.count("\n") == 1
