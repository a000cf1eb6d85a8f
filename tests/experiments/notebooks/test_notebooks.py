"""The notebooks run from the first cell to the last, and the committed copies are theirs."""

import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "experiments" / "notebooks"
NAMES = ("anatomy", "reading", "patching", "derivatives", "research_day")
each = pytest.mark.parametrize("name", NAMES)


def committed(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def cells_of_script(name):
    """(kind, source) of each cell, read without jupytext: the tests need none of the tools."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    start, *parts = re.split(r"^# %%", text, flags=re.MULTILINE)
    assert start == "", "a notebook begins with a cell"
    cells = []
    for part in parts:
        heading, _, body = part.partition("\n")
        assert heading in ("", " [markdown]")
        if heading:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(("markdown" if heading else "code", body.strip("\n")))
    return cells


def test_every_script_of_the_folder_is_a_notebook_or_a_helper():
    scripts = {f.stem for f in FOLDER.glob("*.py") if f.read_text("utf-8").startswith("# %%")}
    assert scripts == set(NAMES) == {f.stem for f in FOLDER.glob("*.ipynb")}


@each
def test_committed_copies_have_the_cells_of_the_scripts(name):
    cells = [(c["cell_type"], "".join(c["source"])) for c in committed(name)["cells"]]
    assert cells == cells_of_script(name)


@each
def test_committed_copies_were_executed_in_order_and_without_errors(name):
    code = [c for c in committed(name)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c["outputs"]]
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data"}
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o.get("name") == "stderr"]


@each
def test_committed_copies_name_no_path_of_a_machine(name):
    outputs = [output for c in committed(name)["cells"] for output in c.get("outputs", [])]
    said = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs]
    paths = re.compile(r"/(home|root|tmp|usr|opt|var|work|Users)/|site-packages|[A-Z]:\\")
    assert not [text for text in said if paths.search(text)]


def test_committed_copies_are_light():
    assert sum(f.stat().st_size for f in FOLDER.glob("*.ipynb")) < 1_500_000


@each
def test_notebooks_define_no_model_code(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert "import tfm" in text
    assert not re.search(r"nn\.Module|flax|self\.param", text)


@pytest.mark.slow
@each
def test_notebooks_run_to_the_end(name, monkeypatch):
    pytest.importorskip("jupytext", reason="needs requirements-notebooks.txt")
    from experiments.notebooks.execute import execute

    monkeypatch.setenv("TFM_NOTEBOOK_SIZE", "tiny")
    monkeypatch.delenv("TFM_RUN", raising=False)
    code = [c for c in execute(name).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)


@pytest.mark.slow
def test_a_failing_cell_is_named_and_ends_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jupytext", reason="needs requirements-notebooks.txt")
    from experiments.notebooks import execute
    from experiments.notebooks.__main__ import main

    (tmp_path / "anatomy.py").write_text("# %%\nx = 1\n\n# %%\nassert x == 2, 'two'\n", "utf-8")
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebooks", "anatomy"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "anatomy.py, cell 2 (`assert x == 2, 'two'`)" in capsys.readouterr().err
    assert not (tmp_path / "anatomy.ipynb").exists()
