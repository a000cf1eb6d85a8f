"""`bench --device`, on the CPU: the parts at their tiny size, and the parent with parts of a test.

Parts that compile a whole model are marked slow.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import run as experiments_run
from experiments.bench.device import (
    agreement,
    attention,
    canaries,
    ceilings,
    command,
    decoding,
    profile,
    steps,
    torch_steps,
    trainings,
)
from experiments.bench.device.config import CEILINGS, PARTS, DeviceConfig, DeviceError
from experiments.bench.device.session import Session, halving, with_flags
from experiments.bench.device.sizes import FULL
from experiments.bench.device.timing import median_seconds
from tfm import Transformer
from tfm.training import init_params

CPU = {"name": "machine", "platform": "cpu", "card": "cpu", "versions": {"jax": "0"}}
GPU = CPU | {"platform": "gpu", "card": "a card"}
PEAKS = [
    {"name": "product", "seconds": 1.0, "flops_per_second": 1e12},
    {"name": "copy", "seconds": 1.0, "bytes_per_second": 1e9},
]


@pytest.fixture
def session(tmp_path):
    """A tiny session whose rows are in its list `rows`."""
    rows = []
    made = Session(rows.append, 1000, tiny=True, folder=str(tmp_path),
                   ceilings={"flops_per_second": 1e15, "bytes_per_second": 1e15})  # fmt: skip
    made.rows = rows
    return made


@pytest.fixture
def compiled_quickly():
    """Of a whole model most of the time is the compiler's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Modules:
    """In the place of the processes: the rows and the fault of each module; who was called."""

    def __init__(self, machine=GPU, **faults):
        self.machine, self.faults, self.calls = machine, faults, []

    def __call__(self, module, folder, seconds, peaks, tiny, told):
        self.calls.append((module, peaks, tiny))
        for row in [self.machine, *PEAKS] if module == "ceilings" else [{"name": "row"}]:
            told(row | ({} if row is self.machine else {"module": module}))
        return self.faults.get(module)


# ---- the parent


def test_parts_are_chosen_by_name_in_their_order(capsys):
    assert list(DeviceConfig().chosen()) == list(PARTS)
    assert list(DeviceConfig(parts="steps, agreement").chosen()) == ["agreement", "steps"]
    for wrong in ("nothing", "steps,nothing", " "):
        with pytest.raises(DeviceError, match="there are agreement, canaries, steps, attention"):
            DeviceConfig(parts=wrong).chosen()
    with pytest.raises(DeviceError, match="minutes=0 must be positive"):
        DeviceConfig(minutes=0)
    with pytest.raises(SystemExit, match="2"):
        experiments_run.main(["bench", "--device", "--parts", "nothing"])
    assert "no part 'nothing'; there are agreement" in capsys.readouterr().err


def test_each_part_takes_its_share_of_what_is_left():
    steps_, later = PARTS["steps"], [PARTS["attention"], PARTS["trainings"]]
    assert command.limit(CEILINGS, list(PARTS.values()), 4200.0) == pytest.approx(250.0)
    assert command.limit(CEILINGS, list(PARTS.values()), 420.0) == CEILINGS.least
    assert command.limit(CEILINGS, list(PARTS.values()), 60.0) == 60.0
    share = PARTS["steps"].share / (PARTS["steps"].share + PARTS["attention"].share)
    assert command.limit(steps_, later, 100.0) == pytest.approx(100 * share)
    assert command.limit(PARTS["trainings"], [], 70.0) == 70.0


def test_a_machine_without_an_accelerator_is_told_of_tiny(tmp_path, capsys):
    modules = Modules(machine=CPU)
    with pytest.raises(DeviceError, match="no accelerator here; --tiny runs the same"):
        command.run(DeviceConfig(run=tmp_path), modules)
    assert [module for module, *_ in modules.calls] == ["ceilings"]
    with pytest.raises(DeviceError, match="could not be asked for its devices: exit code 1"):
        command.run(DeviceConfig(run=tmp_path), lambda *_: "exit code 1: no driver")


def test_a_fault_in_one_part_leaves_the_others(tmp_path, capsys):
    modules = Modules(canaries="signal 6: no memory", torch_steps="stopped at its limit of 9 s")
    command.run(DeviceConfig(run=tmp_path, parts="canaries,steps,decoding"), modules)
    names = [module for module, *_ in modules.calls]
    assert names == ["ceilings", "canaries", "steps", "torch_steps", "decoding"]
    peaks = {"flops_per_second": 1e12, "bytes_per_second": 1e9}
    assert modules.calls[1] == ("canaries", peaks, False)
    results = json.loads((tmp_path / "device.json").read_text())
    assert results["machine"]["card"] == "a card" and results["ceilings"] == peaks
    faults = {name: part["fault"] for name, part in results["parts"].items()}
    assert faults == {
        "ceilings": None, "canaries": "signal 6: no memory", "decoding": None,
        "steps": "torch_steps: stopped at its limit of 9 s",
    }  # fmt: skip
    said = capsys.readouterr()
    assert "fault: canaries: signal 6: no memory" in said.out and "tiny" not in said.out.lower()
    assert "are left in all" in said.err


def test_results_that_do_not_agree_end_with_exit_code_1(tmp_path, capsys):
    def one(module, folder, seconds, peaks, tiny, told):
        told(GPU if module == "ceilings" else {"name": "gradients", "passed": False, "error": 0.5})

    with pytest.raises(SystemExit, match="1"):
        command.run(DeviceConfig(run=tmp_path, parts="agreement"), one)
    assert capsys.readouterr().out.count("FAILED") == 2


def test_a_run_without_any_measurement_ends_with_exit_code_1(tmp_path):
    def one(module, folder, seconds, peaks, tiny, told):
        told(GPU if module == "ceilings" else {"name": "row", "fault": "RuntimeError: lost"})

    with pytest.raises(SystemExit, match="1"):
        command.run(DeviceConfig(run=tmp_path), one)


def test_no_part_begins_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "LEAST", 1e9)
    with pytest.raises(DeviceError, match="no time was left"):
        command.run(DeviceConfig(run=tmp_path), Modules())


@pytest.mark.parametrize(
    "code, seconds, fault",
    [
        ("import time; print(); time.sleep(60)", 0.3, "stopped at its limit of 0 s"),
        ("raise ValueError('lost\\nmore')", 60, "exit code 1: ValueError: lost"),
        ("import os; os.abort()", 60, "signal 6: no message"),
        ("pass", 60, None),
    ],
)
def test_a_process_is_held_to_its_time_and_its_last_words_told(
    tmp_path, monkeypatch, code, seconds, fault
):
    write = "import sys; open(sys.argv[1], 'a').write('{\"name\": 1}\\n{\"half'); "
    monkeypatch.setattr(
        command, "worker_command",
        lambda module, rows, *_: [sys.executable, "-c", write + code, str(rows)],
    )  # fmt: skip
    for name in ("rows.jsonl", "log.txt"):
        (tmp_path / name).write_text("")
    rows = []
    told = command.run_module("steps", tmp_path, seconds, {}, False, rows.append)
    assert told == fault
    if seconds > 1:  # otherwise it may not have begun
        assert rows == [{"name": 1}]


def test_workers_see_the_cpu_beside_the_accelerator_and_torch_has_it_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert command.environment_of("steps", tiny=False)["JAX_PLATFORMS"] == "cuda,cpu"
    assert command.environment_of("torch_steps", tiny=False)["JAX_PLATFORMS"] == "cpu"
    assert command.environment_of("steps", tiny=True)["JAX_PLATFORMS"] == "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "JAX_PLATFORMS" not in command.environment_of("steps", tiny=False)


# ---- rows and times


def test_a_row_that_fails_leaves_the_next(session):
    session.row("a", lambda: 1 / 0)
    session.row("b", lambda: {"seconds": 2.0, "error": float("nan")})
    session.row("c", dict, needs=1e6)
    a, b, c = session.rows
    assert a == {"name": "a", "fault": "ZeroDivisionError: division by zero"}
    assert b["error"] is None and "error nan" in b["flag"]
    assert "needs 1000000 s" in c["skipped"]


def test_numbers_that_cannot_be_true_are_flagged():
    assert "flag" not in with_flags({"share_of_peak": 1.0, "seconds": 0.1, "passed": False})
    assert with_flags({"passed": np.bool_(False)})["passed"] is False  # as JSON takes it
    for wrong in ({"share_of_peak": 1.01}, {"share_of_bandwidth": 0.0}, {"seconds": -1.0}):
        assert next(iter(wrong)) in with_flags(wrong)["flag"]


def test_rows_are_halved_until_they_fit():
    tried = []

    def measure(rows):
        tried.append(rows)
        if rows > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"rows": rows}

    assert halving(8, measure) == {"rows": 2} and tried == [8, 4, 2]
    with pytest.raises(ValueError, match="another"):
        halving(8, lambda rows: (_ for _ in ()).throw(ValueError("another")))


def test_the_rows_of_a_step_are_those_that_fit_a_card():
    base, big = (steps.bfloat16(config) for _, config in FULL.models)
    for config in (base, big):
        found = [steps.fitting_rows(config, 128, 512, gigabytes * 1e9) for gigabytes in (1, 36, 72)]
        assert found == sorted(found) and all(n & (n - 1) == 0 for n in found)
        assert 1 <= found[0] < found[-1] <= 512
    assert steps.fitting_rows(big, 128, 512, 72e9) < steps.fitting_rows(base, 128, 512, 72e9)


def test_times_are_medians_after_warm_up():
    calls = []
    timed = median_seconds(lambda: calls.append(1), 10, wait=lambda result: None)
    assert timed["runs"] % 10 == 0 and len(calls) == timed["runs"] + 2
    assert 0 < timed["seconds"] < 1 and timed["spread"] >= 0


def test_kernels_are_those_of_the_device_streams():
    def named(kind, pid, tid, name):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    def ran(name, pid, tid, microseconds):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": microseconds, "args": {}}

    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        named("thread_name", 1, 7, "Stream #7(Compute)"), named("thread_name", 1, 8, "XLA Ops"),
        named("thread_name", 2, 7, "Stream of nothing"),
        ran("gemm", 1, 7, 30), ran("add_fusion_28", 1, 7, 20), ran("gemm", 1, 7, 50),
        ran("gemm again", 1, 8, 80), ran("python", 2, 7, 1e6),
    ]  # fmt: skip
    program = '  %add_fusion.28 = f32[2]{0} fusion(%x), metadata={op_name="jit(step)/add"}\n'
    assert profile.longest({"traceEvents": events}, program) == [
        {
            "kernel": "gemm",
            "computes": None,
            "seconds": 8e-5,
            "calls": 2,
            "share_of_kernels": 0.8,
        },
        {
            "kernel": "add_fusion_28",
            "computes": "jit(step)/add",
            "seconds": 2e-5,
            "calls": 1,
            "share_of_kernels": 0.2,
        },
    ]


# ---- the parts


def sound(rows):
    """No row with a fault, or a flag, or a failed check; some are measured."""
    wrong = [r for r in rows if r.get("fault") or r.get("flag") or r.get("passed") is False]
    assert not wrong
    return [r for r in rows if not r.get("skipped")]


def test_ceilings(session):
    ceilings.run(session)
    machine, product, copy = sound(session.rows)
    assert machine["platform"] == "cpu" and {"jax", "python"} <= machine["versions"].keys()
    assert product["flops_per_second"] > 0 and copy["bytes_per_second"] > 0


def test_without_tiny_a_cpu_is_named_and_not_measured():
    rows = []
    ceilings.run(Session(rows.append, 100))
    assert [row["name"] for row in rows] == ["machine"]


def test_attention_alone(session):
    made = attention.measure(session, "chunked", 8, backward=True)
    assert made["share_of_peak"] > 0 and made["seconds"] > 0
    assert attention.flops((2, 3, 5, 7), backward=True) == 3 * 4 * 2 * 3 * 25 * 7
    assert len(attention.titles(session)) == 4


def test_attention_agrees_with_the_formula(session):
    cpu = jax.local_devices()[0]
    made = agreement.attention(session, (cpu, cpu), "chunked")
    assert made["passed"] and 0 < made["error"] < made["bound"]


def test_an_error_is_judged_by_its_bound():
    assert agreement.relative_error({"a": np.array([3.0, 4.5])}, {"a": np.array([3.0, 4.0])}) == 0.1
    assert agreement.judged(0.1, 0.1)["passed"] and not agreement.judged(0.2, 0.1)["passed"]
    assert not agreement.judged(float("nan"), 0.1)["passed"]


def test_an_array_that_is_not_finite_is_named():
    right = {"w": np.ones(2), "b": np.ones(2)}
    wrong = {"w": np.array([1.0, np.nan]), "b": np.array([1.0, 1.1])}
    made = agreement.compared(wrong, right)
    assert made["worst_array_name"] == "['w']" and made["arrays_not_finite"] == [1, 0]
    assert not agreement.judged(made["error"], 1.0)["passed"]
    assert "arrays_not_finite" not in agreement.compared(right, right)


def test_hypotheses_may_differ_where_two_are_as_likely():
    tokens, expected = np.array([[1, 2, 3], [1, 2, 3]]), np.array([[1, 2, 3], [1, 9, 8]])
    own, other = (
        np.array([[-1.0, -1, -1], [-1, -2.0, -3]]),
        np.array([[-1.0, -1, -1], [-1, -2.5, -1.5]]),
    )
    assert agreement.gaps(tokens, expected, own, other, greedily=True) == [0.5]
    assert agreement.gaps(tokens, expected, own, other, greedily=False) == [pytest.approx(0.2)]
    assert agreement.gaps(tokens, tokens, own, own, greedily=True) == []


def test_what_takes_far_longer_than_the_sound_way_is_flagged(session):
    assert canaries.scatter_add(session)["ratio"] > 0
    assert "flag" not in canaries.compared(session, 9.0, 1.0, 2.0, "tiny times are noise")
    session.tiny = False
    assert canaries.compared(session, 3.0, 1.0, 2.0, "slow")["flag"] == "slow"
    assert "flag" not in canaries.compared(session, 2.0, 1.0, 2.0, "slow")


def test_a_training_is_a_command_whose_results_are_read(session, tmp_path, monkeypatch):
    def finished(arguments, **options):
        run = Path(arguments[arguments.index("--run") + 1])
        run.mkdir()
        (run / "results.json").write_text('{"test_wer": 0.25}')
        return subprocess.CompletedProcess(arguments, 0, stderr="")

    monkeypatch.setattr(trainings.subprocess, "run", finished)
    (tmp_path / "pronounce-default").mkdir()  # of an earlier call
    trainings.run(session)
    (row,) = sound(session.rows)
    assert row["word_error_rate"] == 0.25 and row["minutes"] >= 0
    failed = subprocess.CompletedProcess([], 2, stderr="noise\nerror: disk full\n")
    monkeypatch.setattr(trainings.subprocess, "run", lambda *_, **__: failed)
    assert trainings.train(session, "x", ())["fault"] == "exit code 2: error: disk full"


def test_without_torch_its_rows_say_so(session, monkeypatch):
    monkeypatch.setattr(torch_steps.importlib.util, "find_spec", lambda name: None)
    torch_steps.run(session)
    assert session.rows == [{"name": "torch", "skipped": "torch is not installed"}]


@pytest.mark.slow
def test_the_model_agrees(session, compiled_quickly):
    cpu, sizes = jax.local_devices()[0], session.sizes
    params = jax.jit(lambda: init_params(Transformer(sizes.agreeing), jax.random.key(0)))()
    agreement.training(session, (cpu, cpu), params)
    session.row("beam", lambda: agreement.decoding(session, (cpu, cpu), params, 4))
    of_cpu, _, gradients, _, exact, beam = sound(session.rows)
    assert 0 < of_cpu["error"] == gradients["error"] < gradients["bound"]
    assert exact["worst_array"] < 1e-6 and beam["different"] == 0


@pytest.mark.slow
def test_a_step_and_a_decoding(session, tmp_path, compiled_quickly):
    name, config = session.sizes.models[0]
    session.row("plain", lambda: steps.measure_fitting(session, config, {}, "base"))
    session.row("beam", lambda: decoding.measure(session, 2, 4))
    step, beam = sound(session.rows)
    assert step["rows"] == session.sizes.most_rows and step["share_of_peak"] > 0
    assert 0 < len(step["kernels"]) <= profile.LONGEST and not step["cudnn"]
    for kind in ("trace.json.gz", "hlo.gz"):
        assert (tmp_path / f"profile-base.{kind}").stat().st_size > 0
    assert beam["share_of_bandwidth"] > 0


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(tmp_path):
    arguments = [sys.executable, "-m", "experiments.run", "bench", "--device", "--tiny"]
    done = subprocess.run(
        [*arguments, "--run", str(tmp_path), "--parts", "canaries,attention"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "device.json").read_text())
    assert results["tiny"] and results["machine"]["platform"] == "cpu"
    for part in results["parts"].values():
        assert part["fault"] is None and sound(part["rows"])
    assert "TINY, on the CPU" in done.stdout and "no cuDNN on cpu" in done.stdout
    assert done.stdout.rstrip().endswith("device.json") and "canaries: at most" in done.stderr
