"""The loop around a toy step: no model to compile, but real batches, checkpoints and signals."""

import os
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import loop
from experiments.loop import DivergedError, Schedule, StopSignal, train
from experiments.packing import packed_batches
from experiments.run_folder import RunFolder, RunFolderError
from tfm.checkpoint import Checkpoints
from tfm.training import TrainState

STEPS = 12
EXAMPLES = [
    {"source": np.array([3 + i % 5, 2], np.int32), "target": np.array([3 + i % 7, 3, 2], np.int32)}
    for i in range(50)
]
HANDLERS = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}


def fresh_state():
    params = {"w": jnp.zeros(3, jnp.float32)}
    return TrainState(jnp.zeros((), jnp.int32), params, (), jax.random.PRNGKey(7))


def toy_step(state, batch):
    """Parameters that depend on every batch so far, on their order, and on the key."""
    noise = jax.random.uniform(jax.random.fold_in(state.key, state.step), (3,))
    w = 0.9 * state.params["w"] + noise * float(batch["target"].astype(np.float64).std())
    metrics = {"loss": w.sum(), "tokens": jnp.asarray(9), "gradient_norm": jnp.asarray(1.0)}
    return state.replace(step=state.step + 1, params={"w": w}), metrics


class Step:
    """The toy step, counting its calls; `at` does something just before a call's return."""

    def __init__(self, at=None):
        self.calls, self.at = 0, at or {}

    def __call__(self, state, batch):
        self.calls += 1
        result = toy_step(state, batch)
        if self.calls in self.at:
            self.at[self.calls]()
        return result


def run(path, step=None, steps=STEPS, fingerprint="f", evaluated=None, **periods):
    """Trains as a new process would: everything but the folder is made anew."""
    (path).mkdir(exist_ok=True)
    batches = packed_batches(EXAMPLES, rows=4, source_length=5, target_length=7, seed=0)
    periods = {"log_every": 5, "evaluate_every": 5, "save_every": 5} | periods

    def evaluate(params):
        if evaluated is not None:
            evaluated.append(params)
        return {"valid_loss": float(params["w"].sum())}

    return train(
        step or Step(), fresh_state(), batches, RunFolder(path), Schedule(steps, **periods),
        learning_rate=lambda count: 0.1 * count, evaluate=evaluate, fingerprint=fingerprint,
    )  # fmt: skip


def steps_logged(path):
    return [line["step"] for line in RunFolder(path).metrics()]


def saved(path):
    """(newest step, its tree) in a run folder."""
    with Checkpoints(path / "checkpoints") as checkpoints:
        step = checkpoints.latest()
        return step, checkpoints.restore(step, fresh_state())[0]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and its final state."""
    path = tmp_path_factory.mktemp("whole")
    return path, run(path)[0]


def test_first_last_and_every_nth_step_are_logged(whole):
    path, state = whole
    lines = RunFolder(path).metrics()
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    for line in lines:
        assert {"step", "loss", "tokens_per_second", "words_per_second", "learning_rate",
                "gradient_norm", "seconds"} <= line.keys()  # fmt: skip
        assert line["tokens_per_second"] > 0
        assert line["learning_rate"] == pytest.approx(0.1 * (line["step"] - 1))
        assert ("valid_loss" in line) == (line["step"] > 1)
    assert lines[-1]["valid_loss"] == float(state.params["w"].sum())
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert {s: signal.getsignal(s) for s in HANDLERS} == HANDLERS


def test_the_logged_loss_is_the_mean_since_the_last_line(whole):
    state, losses = fresh_state(), []
    batches = packed_batches(EXAMPLES, rows=4, source_length=5, target_length=7, seed=0)
    for _ in range(STEPS):
        state, metrics = toy_step(state, next(batches))
        losses.append(float(metrics["loss"]))
    logged = [line["loss"] for line in RunFolder(whole[0]).metrics()]
    means = [np.mean(part) for part in (losses[:1], losses[1:5], losses[5:10], losses[10:])]
    np.testing.assert_allclose(logged, means, rtol=1e-6)


def test_the_last_step_is_saved(whole):
    path, state = whole
    step, tree = saved(path)
    assert step == STEPS == int(state.step)
    assert_same(tree, state)


def test_evaluations_do_not_wait_for_a_step_that_is_logged(tmp_path):
    run(tmp_path, log_every=5, evaluate_every=4)
    lines = RunFolder(tmp_path).metrics()
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 8, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 7])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, whole, number, at, capsys):
    step = Step({at: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, step)
    assert stopped.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert step.calls == at == saved(tmp_path)[0]
    assert {s: signal.getsignal(s) for s in HANDLERS} == HANDLERS
    assert f"stopped and saved at step {at}" in capsys.readouterr().err
    rest = Step()
    state, _ = run(tmp_path, rest)
    assert rest.calls == STEPS - at
    assert f"at step {at}" in capsys.readouterr().err
    assert_same(state, whole[1])
    assert_same(saved(tmp_path)[1], whole[1])
    assert steps_logged(tmp_path) == [1, 5, 10, 12]


def test_a_signal_in_the_last_step_loses_nothing(tmp_path, whole):
    with pytest.raises(SystemExit):
        run(tmp_path, Step({STEPS: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    rest = Step()
    assert_same(run(tmp_path, rest)[0], whole[1])
    assert rest.calls == 0 and steps_logged(tmp_path) == [1, 5, 10, 12]


def test_a_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(loop.os, "_exit", left.append)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM and not left
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]


def test_a_crash_goes_on_from_the_newest_checkpoint(tmp_path, whole):
    def crash():
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, Step({11: crash}), save_every=4)
    assert steps_logged(tmp_path) == [1, 5, 10]  # step 10 was logged, but the save is of step 8
    rest = Step()
    assert_same(run(tmp_path, rest)[0], whole[1])
    assert rest.calls == STEPS - 8
    lines = RunFolder(tmp_path).metrics()
    assert [line["step"] for line in lines] == [1, 5, 10, 12]


def test_the_seconds_of_all_sittings_add_up(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=100.0)

    def monotonic():
        clock.now += 1e-3
        return clock.now

    def tick():
        clock.now += 10.0

    def tick_and_stop():
        tick()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=monotonic))
    with pytest.raises(SystemExit):
        run(tmp_path, Step({2: tick, 3: tick_and_stop}))
    clock.now += 1000.0  # the machine was off
    _, seconds = run(tmp_path, Step({1: tick}))
    assert seconds == pytest.approx(30.0, abs=1.0)


def test_rates_are_counts_over_seconds(tmp_path, monkeypatch, capsys):
    clock = types.SimpleNamespace(now=0.0)

    def tick():
        clock.now += 10.0

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    run(tmp_path, Step(dict.fromkeys(range(1, STEPS + 1), tick)), log_every=4, evaluate_every=12)
    batches = packed_batches(EXAMPLES, rows=4, source_length=5, target_length=7, seed=0)
    # A word is one segment of a row: as many as the row has distinct ids, but for padding's.
    words = [
        sum(len(set(row) - {0}) for row in next(batches)["target_segment_ids"].tolist())
        for _ in range(STEPS)
    ]
    for line in RunFolder(tmp_path).metrics()[1:]:
        counted = words[max(line["step"] - 4, 1) : line["step"]]
        assert line["words_per_second"] == pytest.approx(sum(counted) / (10 * len(counted)))
        assert line["tokens_per_second"] == pytest.approx(0.9)  # 9 a step of 10 seconds
        assert line["seconds"] == pytest.approx(10 * line["step"])
    shown = capsys.readouterr().err
    # Step 4 came after 40 seconds, so 8 more take 80.
    assert re.search(r"step 4/12  loss -?[\d.]+  [\d,]+ words/s  time left 80 s\n", shown)
    assert re.search(r"step 12/12  .*time left 0 s\n", shown)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize(("broken", "told"), [(6, 8), (8, 8), (9, 10)])
def test_a_number_that_is_none_ends_the_run_and_keeps_the_sound_checkpoint(
    tmp_path, name, broken, told
):
    def step(state, batch):
        state, metrics = toy_step(state, batch)
        bad = int(state.step) >= broken
        return state, metrics | ({name: jnp.float32(np.nan)} if bad else {})

    why = rf"step {told}: {name} is nan; the checkpoint of step {4 if told == 8 else 8} is kept"
    with pytest.raises(DivergedError, match=why):
        run(tmp_path, step, save_every=4)
    assert saved(tmp_path)[0] == (4 if told == 8 else 8)
    assert {s: signal.getsignal(s) for s in HANDLERS} == HANDLERS


def test_a_first_step_that_is_no_number_is_told_at_once(tmp_path):
    def step(state, batch):
        state, metrics = toy_step(state, batch)
        return state, metrics | {"loss": jnp.float32(np.inf)}

    with pytest.raises(DivergedError, match="step 1: loss is inf; nothing was saved yet"):
        run(tmp_path, step)


def files(path):
    """Every file with its content and time of change, event files aside."""
    kept = (p for p in sorted(path.rglob("*")) if p.is_file() and "tensorboard" not in p.parts)
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept}


def test_more_steps_extend(tmp_path):
    run(tmp_path, steps=7)
    step = Step()
    state, _ = run(tmp_path, step, steps=9)
    assert step.calls == 2 and int(state.step) == 9 == saved(tmp_path)[0]
    assert steps_logged(tmp_path) == [1, 5, 7, 9]


def test_other_data_is_refused_and_nothing_is_lost(tmp_path):
    run(tmp_path, steps=7)
    before, step = files(tmp_path), Step()
    with pytest.raises(RunFolderError, match="data differs"):
        run(tmp_path, step, steps=9, fingerprint="g")
    assert step.calls == 0 and files(tmp_path) == before
    assert {s: signal.getsignal(s) for s in HANDLERS} == HANDLERS
