"""The loop around a toy step: no model to compile, but real batches, checkpoints and signals."""

import json
import os
import re
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import progress
from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, write_json
from experiments.checkpoints.trained import check_newest
from experiments.data.packing import packed_batches
from experiments.distributed.processes import Processes
from experiments.training import step_monitor as monitor
from experiments.training import stopping
from experiments.training.checkpointer import Checkpointer
from experiments.training.config import TrainingConfig
from experiments.training.loop import DivergedError, Learner, train
from experiments.training.placement import Layout
from experiments.training.run import Run
from experiments.training.stopping import StopSignal
from tfm.config import TransformerConfig
from tfm.parallel.mesh import MeshConfig
from tfm.training import TrainState, skip_nonfinite

STEPS = 12
EXAMPLES = [
    {"source": np.array([3 + i % 5, 2], np.int32), "target": np.array([3 + i % 7, 3, 2], np.int32)}
    for i in range(50)
]
LAYOUT = Layout(MeshConfig(1), TransformerConfig(), rows=4)
HANDLERS = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}


def fresh_state():
    params = {"w": jnp.zeros(3, jnp.float32)}
    return TrainState(jnp.zeros((), jnp.int32), params, (), jax.random.PRNGKey(7))


def toy_step(state, batch):
    """Parameters that depend on every batch so far, on their order, and on the key."""
    sequences = jnp.asarray(batch["target_segment_ids"]).max(-1).sum()
    noise = jax.random.uniform(jax.random.fold_in(state.key, state.step), (3,))
    w = 0.9 * state.params["w"] + noise * float(batch["target"].astype(np.float64).std())
    metrics = {"loss": w.sum(), "tokens": jnp.asarray(9), "sequences": sequences}
    metrics |= {"gradient_norm": jnp.asarray(1.0), "largest_gradient": jnp.asarray(0.5)}
    return state.replace(step=state.step + 1, params={"w": w}), metrics


class Step:
    """The toy step, counting its calls; `at` does something just before a call's return."""

    def __init__(self, at=None):
        self.calls, self.at = 0, at or {}

    def __call__(self, state, batch):
        self.calls += 1
        result = skip_nonfinite(toy_step)(state, batch)
        if self.calls in self.at:
            self.at[self.calls]()
        return result


def valid_loss(params):
    return {"valid_loss": float(params["w"].sum())}


def run(path, step=None, steps=STEPS, identity=None, evaluate=valid_loss, state=None, **periods):
    """Trains as a new process would: everything but the folder is made anew."""
    path.mkdir(exist_ok=True)
    batches = packed_batches(EXAMPLES, rows=4, source_length=5, target_length=7, seed=0)
    periods = {"log_every": 5, "evaluate_every": 5, "save_every": 5} | periods
    with StopSignal() as stop:
        learner = Learner(state or fresh_state(), step or Step(), evaluate)
        config = TrainingConfig(run=path, steps=steps, **periods)
        run = Run(config, identity or {"data": "d"}, LAYOUT, Processes())
        return train(run, learner, batches, stop)


def steps_logged(path):
    return [line["step"] for line in RunFolder(path).metrics()]


def saved(path):
    """(newest step, its tree) in a run folder."""
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        step, _ = checkpoints.newest()
        return step, checkpoints.restore(step, fresh_state())


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and its outcome."""
    path = tmp_path_factory.mktemp("whole")
    return path, run(path)


def test_first_last_and_every_nth_step_are_logged(whole):
    path, (state, _) = whole
    lines = RunFolder(path).metrics()
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    learning_rate = TrainingConfig(steps=STEPS).make_learning_rate()
    for line in lines:
        assert {"step", "loss", "tokens_per_second", "words_per_second", "learning_rate",
                "gradient_norm", "seconds"} <= line.keys()  # fmt: skip
        assert line["tokens_per_second"] > 0
        assert line["learning_rate"] == pytest.approx(learning_rate(line["step"] - 1))
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
    path, (state, _) = whole
    step, tree = saved(path)
    assert step == STEPS == int(state.step)
    assert_same(tree, state)


def test_evaluations_do_not_wait_for_a_step_that_is_logged(tmp_path):
    run(tmp_path, log_every=5, evaluate_every=4)
    lines = RunFolder(tmp_path).metrics()
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 8, 12]


def test_one_step_stays_under_way_unless_something_is_due(tmp_path):
    """Else the device would wait for the host between two steps."""
    looked_at = {}

    class Watched(Step):
        def __call__(self, state, batch):
            state, metrics = super().__call__(state, batch)
            return state, metrics | {"skipped": Look(self.calls)}

    class Look:
        def __init__(self, number):
            self.number = number

        def __bool__(self):
            looked_at[self.number] = step.calls
            return False

    step = Watched()
    run(tmp_path, step)
    due = (1, 5, 10, 12)
    assert looked_at == {n: n if n in due else n + 1 for n in range(1, STEPS + 1)}


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
    assert_same(state, whole[1].state)
    assert_same(saved(tmp_path)[1], whole[1].state)
    assert steps_logged(tmp_path) == [1, 5, 10, 12]


def test_a_signal_in_the_last_step_loses_nothing(tmp_path, whole):
    with pytest.raises(SystemExit):
        run(tmp_path, Step({STEPS: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    rest = Step()
    assert_same(run(tmp_path, rest).state, whole[1].state)
    assert rest.calls == 0 and steps_logged(tmp_path) == [1, 5, 10, 12]


def test_a_signal_saves_before_an_evaluation_that_is_due(tmp_path, monkeypatch):
    """It may take longer than there is time."""
    save, order = Checkpointer.save, []

    def noted_save(*arguments):
        order.append("save")
        save(*arguments)

    def evaluate(params):
        order.append("evaluate")
        return valid_loss(params)

    monkeypatch.setattr(Checkpointer, "save", noted_save)
    with pytest.raises(SystemExit):
        run(tmp_path, Step({5: lambda: os.kill(os.getpid(), signal.SIGTERM)}), evaluate=evaluate)
    assert order[:2] == ["save", "evaluate"]


def test_a_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(stopping.os, "_exit", left.append)
    with pytest.raises(SystemExit), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        time.sleep(0.1)  # the listener has its own pace
        assert not left
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left == [130] and stop.received == signal.SIGTERM


def test_a_signal_is_told_at_once():
    said = []
    with pytest.raises(SystemExit) as stopped, StopSignal() as stop:
        stop.say = said.append
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    assert stopped.value.code == 130
    assert said == ["SIGINT: finishing the step and saving; again to leave at once"]


def test_a_signal_during_an_evaluation_saves_its_step(tmp_path, whole):
    """C3, evaluation; tests/experiments/test_interrupting.py has compiling and saving."""

    def evaluate(params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"valid_loss": float(params["w"].sum())}

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, evaluate=evaluate)
    assert stopped.value.code == 143 and saved(tmp_path)[0] in (5, 6)
    assert_same(run(tmp_path).state, whole[1].state)


def test_a_crash_goes_on_from_the_newest_checkpoint(tmp_path, whole):
    def crash():
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, Step({11: crash}), save_every=4)
    assert steps_logged(tmp_path) == [1, 5, 10]  # step 10 was logged, but the save is of step 8
    rest = Step()
    assert_same(run(tmp_path, rest).state, whole[1].state)
    assert rest.calls == STEPS - 8
    lines = RunFolder(tmp_path).metrics()
    assert [line["step"] for line in lines] == [1, 5, 10, 12]


def test_what_is_resumed_stands_in_the_place_of_the_first_state(tmp_path):
    """Else the devices would hold two states."""
    begun = [fresh_state(), fresh_state()]
    for steps, state in zip((5, 10), begun, strict=True):
        run(tmp_path, steps=steps, state=state)
    assert [state.params["w"].is_deleted() for state in begun] == [False, True]


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

    monkeypatch.setattr(monitor, "time", types.SimpleNamespace(monotonic=monotonic))
    with pytest.raises(SystemExit):
        run(tmp_path, Step({2: tick, 3: tick_and_stop}))
    clock.now += 1000.0  # the machine was off
    seconds = run(tmp_path, Step({1: tick})).facts["train_seconds"]
    assert seconds == pytest.approx(30.0, abs=1.0)


def test_rates_are_counts_over_seconds(tmp_path, monkeypatch, capsys):
    clock = types.SimpleNamespace(now=0.0)

    def tick():
        clock.now += 10.0

    for module in (monitor, progress):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
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
    figures = r"loss -?[\d.]+  [\d,]+ words/s"
    assert re.search(rf"training  4/12  {figures}  elapsed 0:40  remaining 1:20\n", shown)
    assert re.search(rf"training  12/12  {figures}  elapsed 2:00\n", shown)


# ---- steps that go wrong


class Broken(Step):
    """The toy step, with other metrics at some of its calls."""

    def __init__(self, calls, **metrics):
        super().__init__()
        self.broken, self.metrics = set(calls), metrics

    def __call__(self, state, batch):
        self.calls += 1

        def step(state, batch):
            state, metrics = toy_step(state, batch)
            bad = {name: jnp.float32(value) for name, value in self.metrics.items()}
            return state, metrics | (bad if self.calls in self.broken else {})

        return skip_nonfinite(step)(state, batch)


WRONG = {
    "the loss is nan": {"loss": np.nan},
    "the gradient's norm is nan": {"gradient_norm": np.nan, "largest_gradient": np.nan},
    "the gradient's norm is inf": {"gradient_norm": np.inf, "largest_gradient": np.inf},
    "the gradient's norm overflows float32 (its largest element is 3e+25)": {
        "gradient_norm": np.inf, "largest_gradient": 3e25,
    },
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
@pytest.mark.parametrize("broken", [1, 5, 6, 7, 10, 12])
def test_a_step_that_goes_wrong_makes_no_update_and_is_told(tmp_path, why, broken, capsys):
    """C8: whatever else is due at that step."""
    step = Broken([broken], **WRONG[why])
    state, facts = run(tmp_path, step)
    # As if the batch had not been there.
    expected = fresh_state()
    batches = packed_batches(EXAMPLES, rows=4, source_length=5, target_length=7, seed=0)
    for call in range(1, STEPS + 2):
        batch = next(batches)
        if call != broken:
            expected, _ = toy_step(expected, batch)
    assert_same(state, expected)
    assert (step.calls, facts["steps"], facts["batches"]) == (STEPS + 1, STEPS, STEPS + 1)
    assert f"step {broken}, batch {broken}: {why}; no update was made" in capsys.readouterr().err
    (line,) = [line for line in RunFolder(tmp_path).lines() if "skipped" in line]
    expected = {"step": broken, "batch": broken, "why": why, "in_a_row": 1, "skipped": True}
    assert line == expected
    assert steps_logged(tmp_path) == [1, 5, 10, 12]
    assert saved(tmp_path)[0] == STEPS


def test_too_many_in_a_row_end_the_run_and_keep_the_sound_checkpoint(tmp_path):
    step = Broken([2, 3, 5, 8, 9, 10, 11], gradient_norm=np.nan, largest_gradient=np.nan)
    why = (
        "3 steps in a row made no update, at last step 5, batch 10: the gradient's norm is nan; "
        "the checkpoint of step 4 is kept"
    )
    with pytest.raises(DivergedError, match=why):
        run(tmp_path, step, save_every=2, most_skipped=3)
    assert saved(tmp_path)[0] == 4
    assert {s: signal.getsignal(s) for s in HANDLERS} == HANDLERS


@pytest.mark.parametrize("log_every", [1, 3, 4, 100])
def test_the_last_of_too_many_counts_though_a_good_step_follows(tmp_path, log_every):
    with pytest.raises(DivergedError, match="3 steps in a row made no update, at last step 2, b"):
        run(tmp_path, Broken([2, 3, 4], loss=np.nan), most_skipped=3, log_every=log_every)


def test_a_run_that_never_makes_an_update_says_that_nothing_was_saved(tmp_path):
    with pytest.raises(DivergedError, match=r"batch 5: the loss is inf; nothing was saved yet"):
        run(tmp_path, Broken(range(100), loss=np.inf))


def test_skipped_steps_do_not_move_a_resumed_run(tmp_path):
    broken = {"loss": np.nan}
    whole = run(tmp_path / "whole", Broken([4, 8], **broken))
    step = Broken([4, 8], **broken)

    def stopping_step(state, batch):
        result = step(state, batch)
        if step.calls == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.raises(SystemExit):
        run(tmp_path / "cut", stopping_step)
    resumed = run(tmp_path / "cut")
    assert resumed.facts["state_sha256"] == whole.facts["state_sha256"]
    assert resumed.facts["batches"] == whole.facts["batches"] == STEPS + 2


def test_steps_in_a_row_are_counted_across_a_stop(tmp_path):
    step = Broken([4, 5, 6], loss=np.nan)

    def stopping_step(state, batch):
        result = step(state, batch)
        if step.calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.raises(SystemExit):
        run(tmp_path, stopping_step, most_skipped=5)
    with pytest.raises(DivergedError, match="5 steps in a row made no update, at last step 4, b"):
        run(tmp_path, Broken([1, 2], loss=np.nan), most_skipped=5)


# ---- the same folder again


def files(path):
    """Every file with its content and time of change, event files aside."""
    kept = (p for p in sorted(path.rglob("*")) if p.is_file() and "tensorboard" not in p.parts)
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept}


def test_more_steps_extend(tmp_path):
    run(tmp_path, steps=7)
    step = Step()
    state, facts = run(tmp_path, step, steps=9)
    assert step.calls == 2 and int(state.step) == 9 == saved(tmp_path)[0]
    assert facts["resumed_from"] == [7]
    assert steps_logged(tmp_path) == [1, 5, 7, 9]


def test_another_identity_is_refused_naming_what_differs_and_nothing_is_lost(tmp_path):
    """C7, as far as the arrays do not tell."""
    run(tmp_path, steps=7, identity={"data": "d", "model": {"width": 1}})
    before, step = files(tmp_path), Step()
    why = r"checkpoints/7 belongs to another run \(data: 'd' -> 'e'; model.width: 1 -> 2\)"
    with pytest.raises(RunFolderError, match=why):
        run(tmp_path, step, steps=9, identity={"data": "e", "model": {"width": 2}})
    assert step.calls == 0 and files(tmp_path) == before
    assert {s: signal.getsignal(s) for s in HANDLERS} == HANDLERS


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, whole, capsys):
    run(tmp_path, steps=9, save_every=4)
    flip(tmp_path / "checkpoints" / "9" / "manifest.json")
    rest = Step()
    outcome = run(tmp_path, rest)
    assert rest.calls == STEPS - 8
    assert f"{tmp_path / 'checkpoints' / '9'}: damaged" in capsys.readouterr().err
    assert outcome.facts["state_sha256"] == whole[1].facts["state_sha256"]
    assert outcome.facts["resumed_from"] == [8]


def test_it_never_begins_anew_over_damaged_checkpoints(tmp_path):
    run(tmp_path)
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        flip(manifest)
    before, step = files(tmp_path), Step()
    with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
        run(tmp_path, step)
    assert step.calls == 0 and files(tmp_path) == before


def test_a_first_save_cut_short_begins_anew_and_says_so(tmp_path, whole, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    outcome = run(tmp_path)
    said = capsys.readouterr().err
    assert "5: its save was never finished, left out" in said and "beginning anew" in said
    assert outcome.facts["state_sha256"] == whole[1].facts["state_sha256"]
    assert outcome.facts["resumed_from"] == []


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path):
    run(tmp_path, steps=7)
    folder, identity = RunFolder(tmp_path), {"data": "d"}
    shutil.rmtree(tmp_path / "checkpoints")
    check_newest(folder, 12, identity)  # it was never gone on from, nor finished
    run(tmp_path, steps=7)
    run(tmp_path, steps=9)
    check_newest(folder, 12, identity)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunFolderError, match="checkpoints are gone, though the run was at step 7"):
        check_newest(folder, 12, identity)
    write_json(tmp_path / "results.json", {"steps": 9})
    with pytest.raises(RunFolderError, match="checkpoints are gone, though the run was at step 9"):
        check_newest(folder, 12, identity)
    check_newest(folder, 9, identity)  # finished: nothing is to be done


def test_the_best_by_validation_is_kept_apart(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 0.5, 1.0])

    def best():
        with Checkpoints(tmp_path / "best", read_only=True) as checkpoints:
            step, _ = checkpoints.newest()
            return step, checkpoints.notes(step)["valid_loss"]

    def evaluate(params):
        return {"valid_loss": next(losses)}

    run(tmp_path, steps=6, evaluate=evaluate, evaluate_every=2)
    assert best() == (4, 1.0)
    run(tmp_path, steps=10, evaluate=evaluate, evaluate_every=2)
    assert best() == (8, 0.5)


def test_a_damaged_best_is_named_set_aside_and_sought_anew(tmp_path, whole, capsys):
    run(tmp_path, steps=9)
    [best] = (tmp_path / "best").glob("[0-9]*")
    flip(best / "manifest.json")
    damaged = [*files(best).values()]
    assert_same(run(tmp_path).state, whole[1].state)
    assert f"{best}: damaged, left out: manifest.json" in capsys.readouterr().err
    assert [*files(best.with_name(f"{best.name}.damaged")).values()] == damaged
    with Checkpoints(tmp_path / "best", read_only=True) as checkpoints:
        assert checkpoints.newest()[0] is not None


def test_a_best_that_is_a_link_is_refused_and_what_it_leads_to_is_kept(tmp_path):
    run(tmp_path / "run", steps=9)
    (tmp_path / "run" / "best").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "best").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="best: a link, which is not followed"):
        run(tmp_path / "run")
    assert before and files(tmp_path / "elsewhere") == before


def test_a_best_beyond_the_step_that_is_resumed_does_not_stand_in_the_way(tmp_path, capsys):
    falling, rising = ({"valid_loss": x} for x in (3.0, 1.0)), ({"valid_loss": x} for x in (2.0,))
    run(tmp_path, steps=6, evaluate=lambda params: next(falling), evaluate_every=3, save_every=4)
    flip(tmp_path / "checkpoints" / "6" / "manifest.json")
    capsys.readouterr()
    # Step 6 had the best; the run goes on from 4, and evaluates at other steps.
    run(tmp_path, steps=5, evaluate=lambda params: next(rising), evaluate_every=5, save_every=4)
    with Checkpoints(tmp_path / "best", read_only=True) as checkpoints:
        step, _ = checkpoints.newest()
        assert (step, checkpoints.notes(step)["valid_loss"]) == (5, 2.0)
    best = tmp_path / "best"
    assert f"{best / '6'}: beyond step 4, set aside and sought anew" in capsys.readouterr().err
    assert (best / "6.undone").is_dir()


@pytest.mark.parametrize("cut", range(10))
def test_every_position_of_the_batches_goes_on_bit_for_bit(cut):
    """C9: 13 rows make an epoch of 4 batches of 4 rows; every position of two epochs and more."""

    def fresh():
        return packed_batches(EXAMPLES, rows=4, source_length=5, target_length=7, seed=0)

    whole, first = fresh(), fresh()
    for _ in range(cut):
        next(whole), next(first)
    second = fresh()
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(30):
        jax.tree.map(np.testing.assert_array_equal, next(second), next(whole))


def falling_till(step):
    """A validation loss that rises after `step` evaluations at every second step."""
    calls = []

    def evaluate(params):
        calls.append(params)
        return {"valid_loss": 1.0 + abs(len(calls) - step)}

    return evaluate


def test_patience_ends_the_run_and_keeps_it_ended(tmp_path, capsys):
    outcome = run(tmp_path, evaluate=falling_till(2), evaluate_every=2, patience=2)
    # Evaluated after 2, 4 (the best), 6 and 8 steps.
    assert outcome.facts["steps"] == 8 and outcome.facts["stopped_early"]
    assert "stopped early at step 8" in capsys.readouterr().err
    step = Step()
    again = run(tmp_path, step, evaluate=falling_till(2), evaluate_every=2, patience=2)
    assert again.facts["state_sha256"] == outcome.facts["state_sha256"]
    assert step.calls == 0
    longer = run(tmp_path, evaluate=falling_till(0), evaluate_every=2, patience=4)
    assert longer.facts["steps"] == 12


def test_without_patience_nothing_ends_early(tmp_path):
    facts = run(tmp_path, evaluate=falling_till(0), evaluate_every=2).facts
    assert facts["steps"] == STEPS and not facts["stopped_early"]
