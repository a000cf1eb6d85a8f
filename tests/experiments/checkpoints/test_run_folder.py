import dataclasses
import json
from pathlib import Path

import pytest

from experiments.checkpoints.run_folder import (
    MetricsLog,
    RunFolder,
    RunFolderError,
    plain,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    run: Path = Path("runs/a")
    rate: float = 0.5
    file: Path | None = None
    model: Inner = Inner()


CONFIG = {"run": "runs/a", "rate": 0.5, "file": None, "model": {"size": 3}}


def claim(folder, config, may_differ):
    with folder.claim(config, may_differ):
        pass


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "deep" / "run")


def test_plain_is_json():
    assert plain(Config()) == CONFIG == json.loads(json.dumps(plain(Config())))


def test_write_json_leaves_one_file_and_keeps_the_letters(tmp_path):
    write_json(tmp_path / "a.json", {"é": 1})
    write_json(tmp_path / "a.json", {"é": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": 2}


def test_a_run_of_before_a_field_was_there_goes_on_where_it_stands_at_its_default(tmp_path):
    now = {"model": {"d_model": 8, "scan_layers": False}}
    with RunFolder(tmp_path).claim({"model": {"d_model": 8}}, ()):
        pass
    with RunFolder(tmp_path).claim(now, ()):
        pass
    now["model"]["scan_layers"] = True
    with (
        pytest.raises(RunFolderError, match="model.scan_layers: False -> True"),
        RunFolder(tmp_path).claim(now, ()),
    ):
        pass


def test_a_run_whose_config_has_a_former_name_goes_on(tmp_path):
    for former, present in (("auto", "auto"), ("reference", "formula")):
        folder = RunFolder(tmp_path / former)
        with folder.claim({"model": {"d_model": 8, "attention": former}}, ()):
            pass
        with (
            pytest.raises(RunFolderError, match=f"implementation: '{present}' -> 'chunked'"),
            folder.claim({"model": {"d_model": 8, "implementation": "chunked"}}, ()),
        ):
            pass
        with folder.claim({"model": {"d_model": 8, "implementation": present}}, ()):
            pass


def test_claim_makes_the_folder_and_takes_the_same_config_again(folder):
    assert folder.read("config.json") is None
    claim(folder, CONFIG, set())
    claim(folder, CONFIG, set())
    assert folder.read("config.json") == CONFIG


def test_claim_names_every_differing_field_old_and_new_and_changes_nothing(folder):
    claim(folder, CONFIG, {"run"})
    other = {"run": "b", "rate": 0.25, "model": {"size": 4}, "new": True}
    with pytest.raises(RunFolderError) as error:
        claim(folder, other, {"run"})
    message = str(error.value)
    assert message.startswith(f"{folder.path} holds") and "\n" not in message
    for difference in ("rate: 0.5 -> 0.25", "model.size: 3 -> 4", "new: None -> True"):
        assert difference in message
    assert "run:" not in message and "file" not in message
    assert folder.read("config.json") == CONFIG


def test_claim_without_rewriting_writes_the_config_of_a_folder_where_nothing_has_begun(folder):
    file = folder.path / "config.json"
    with folder.claim(CONFIG, {"rate"}, rewrite=False):
        assert json.loads(file.read_text()) == CONFIG
    with folder.claim(CONFIG | {"rate": 1.0}, {"rate"}, rewrite=False):
        assert json.loads(file.read_text()) == CONFIG
    folder.note_sitting(5)
    file.unlink()
    with folder.claim(CONFIG | {"rate": 1.0}, (), rewrite=False):
        assert not file.exists()


def test_claim_lets_named_fields_differ_and_remembers_them(folder):
    claim(folder, CONFIG, {"rate"})
    claim(folder, CONFIG | {"rate": 0.75}, {"rate"})
    assert folder.read("config.json")["rate"] == 0.75


def test_a_folder_is_held_by_one_at_a_time(folder):
    with folder.claim(CONFIG, set()):
        with pytest.raises(RunFolderError, match="run: another process is working in it"):
            claim(RunFolder(folder.path), CONFIG, set())
        with pytest.raises(RunFolderError):
            claim(RunFolder(folder.path), CONFIG | {"rate": 1.0}, {"rate"})
        assert folder.read("config.json") == CONFIG
    claim(RunFolder(folder.path), CONFIG, set())


def test_what_the_system_refuses_is_told_by_path(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(RunFolderError, match=f"{tmp_path / 'a.json'}: Is a directory"):
        write_json(tmp_path / "a.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_partial_file_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "a.json.partial").symlink_to(tmp_path / "elsewhere")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_skipped_steps_are_dropped_by_their_batch(folder):
    claim(folder, CONFIG, set())
    with MetricsLog(folder, 1) as log:
        log.write({"step": 5, "loss": 1.0})
        log.write_skipped({"step": 6, "batch": 6, "why": "nan"})
        log.write_skipped({"step": 6, "batch": 7, "why": "nan"})
    with MetricsLog(folder, 6, batches=6):
        pass
    assert [line.get("batch") for line in folder.lines()] == [None, 6]
    assert folder.metrics() == [{"step": 5, "loss": 1.0}]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match="file"):
            claim(RunFolder(path), CONFIG, set())


def test_a_file_that_is_not_json_is_named(folder):
    claim(folder, CONFIG, set())
    (folder.path / "config.json").write_text('{"half": ')
    with pytest.raises(RunFolderError, match=r"config\.json: "):
        claim(folder, CONFIG, set())


@pytest.mark.parametrize("line", ["{}", '{"step": "3"}', '{"skipped": true}', "[1]", "[" * 100_000])
def test_a_line_of_metrics_of_another_form_is_named(folder, line):
    claim(folder, CONFIG, set())
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2: "):
        MetricsLog(folder, 5)


@pytest.mark.parametrize("content", ['{"steps": 3}', '{"steps": ["a"]}', "{}", "[" * 100_000])
def test_sittings_of_another_form_are_named(folder, content):
    claim(folder, CONFIG, set())
    (folder.path / "resumed_from.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"resumed_from\.json: "):
        folder.note_sitting(5)


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl", "resumed_from.json"])
def test_links_are_not_followed(folder, tmp_path, name):
    claim(folder, CONFIG, set())
    (tmp_path / "elsewhere").mkdir()
    (folder.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match=rf"{name}: a link, which is not followed"):
        folder.note_sitting(5) if name == "resumed_from.json" else MetricsLog(folder, 1)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_metrics_are_read_back_without_a_line_cut_short(folder):
    claim(folder, CONFIG, set())
    assert folder.metrics() == []
    lines = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.5}]
    with MetricsLog(folder, 1) as log:
        for line in lines:
            log.write(line)
            assert folder.metrics()[-1] == line  # at once, for whoever watches
    assert folder.metrics() == lines
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert folder.metrics() == lines


def test_metrics_from_the_first_step_on_are_dropped(folder):
    claim(folder, CONFIG, set())
    with MetricsLog(folder, 1) as log:
        for step in (1, 5, 10, 15):
            log.write({"step": step, "loss": 1.0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    with MetricsLog(folder, 10) as log:
        log.write({"step": 10, "loss": 0.5})
    assert folder.metrics() == [
        {"step": 1, "loss": 1.0},
        {"step": 5, "loss": 1.0},
        {"step": 10, "loss": 0.5},
    ]


def test_tensorboard_events_hold_the_scalars(folder):
    claim(folder, CONFIG, set())
    with MetricsLog(folder, 1) as log:
        log.write({"step": 7, "loss": 2.0, "valid_wer": 0.25})
    (events,) = (folder.path / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"loss" in content and b"valid_wer" in content
