"""C1 of docs/reliability.md: the whole command, cut and resumed, ends as if it never had been."""

import json
import os
import signal

import pytest
from killing import TINY, call, write_words

from experiments.checkpoints.checkpoint import Checkpoints
from experiments.pronounce import task as pronounce
from experiments.training import fitting as training
from experiments.training import step_monitor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]
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
    examples, _ = pronounce.prepare(pronounce.resolve(config, lexicons), lexicons)
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
    init_state = training.init_state

    def stop_and_init(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return init_state(*arguments)

    monkeypatch.setattr(training, "init_state", stop_and_init)
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
