import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import pytest

from experiments import run as command
from experiments.claims import drawing, ledger
from experiments.claims.evidence import (
    Budget,
    Claim,
    Hypothesis,
    Text,
    exact,
    judge,
    paired_t,
)
from experiments.claims.ledger import CLAIMS, ClaimsConfig, ClaimsError, run
from experiments.claims.pages import write_pages
from experiments.reporting import style

IDS = ["scaling", "heads", "dropout", "attention", "multihead", "positions", "feedforward", "split",
       "layernorm", "output", "clipping"]  # fmt: skip


def small_claim(name, measured):
    def measure(budget):
        measured.append(name)
        budget.report(0.5, "half way")
        figure, (axes,) = style.panels("It")
        drawing.points(axes, {"a": [1, 2]})
        found = {"grows": paired_t([0.1, 0.2, budget.first_seed]), "exact": exact(1e-7)}
        return found, figure

    hypotheses = {
        "grows": Hypothesis(Text("It | grows.", "它增长。"), "growth, m", 0.05),
        "exact": Hypothesis(Text("It is exact.", "它精确。"), "error", bound=1e-6),
    }
    question = Text(f"Why {name}?", f"为什么 {name}？")
    return Claim(name, question, "a = b", math.sqrt, hypotheses, measure, Text("So.", "因此。"))


@pytest.fixture
def measured(monkeypatch):
    """Two small claims in the place of the eleven; their names as they are measured."""
    names = []
    claims = {name: small_claim(name, names) for name in ("one", "two")}
    monkeypatch.setattr(ledger, "CLAIMS", claims)
    monkeypatch.setattr(ledger, "_SECONDS", dict.fromkeys(claims, 1.0))
    return names


def test_the_eleven_questions_are_there_in_order():
    assert list(CLAIMS) == IDS
    for claim in CLAIMS.values():
        assert claim.function.__module__.startswith("tfm.")
        assert claim.hypotheses and claim.question.zh and claim.lesson.zh


def test_a_run_leaves_a_ledger_a_report_and_figures(tmp_path, measured):
    run(ClaimsConfig(run=tmp_path))
    records = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    assert [r["id"] for r in records] == ["one", "two"]
    for record in records:
        assert {"question", "formula", "function", "seconds", "figure"} <= record.keys()
        for subclaim in record["subclaims"]:
            assert {"statement", "effect", "interval", "seeds", "rule", "verdict"} <= (
                subclaim.keys()
            )
        assert (tmp_path / record["figure"]).read_text("utf-8").startswith("<svg")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<svg") == 4 and "Why two?" in page and "undecided" in page


def test_finished_claims_are_kept_and_the_rest_is_measured(tmp_path, measured, capsys):
    run(ClaimsConfig(run=tmp_path, only="two"))
    run(ClaimsConfig(run=tmp_path))
    assert measured == ["two", "one"]
    assert "two  kept, measured before" in capsys.readouterr().err
    records = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    assert [r["id"] for r in records] == ["one", "two"]


def test_an_interruption_keeps_what_is_finished(tmp_path, measured, monkeypatch):
    def cut_off(budget):
        raise KeyboardInterrupt

    broken = dataclasses.replace(ledger.CLAIMS["two"], measure=cut_off)
    monkeypatch.setitem(ledger.CLAIMS, "two", broken)
    with pytest.raises(KeyboardInterrupt):
        run(ClaimsConfig(run=tmp_path))
    assert [r["id"] for r in json.loads((tmp_path / "claims.json").read_text("utf-8"))] == ["one"]
    assert (tmp_path / "report.html").exists()


def test_a_claim_whose_code_changed_is_measured_again_and_says_so(
    tmp_path, measured, monkeypatch, capsys
):
    run(ClaimsConfig(run=tmp_path))
    monkeypatch.setattr(ledger, "code_of", lambda claim: "other" if claim.id == "one" else "same")
    file = tmp_path / "claims.json"
    records = json.loads(file.read_text("utf-8"))
    records[1]["code"] = "same"
    file.write_text(json.dumps(records), "utf-8")
    run(ClaimsConfig(run=tmp_path))
    assert measured == ["one", "two", "one"]
    assert "one  measured again: its code has changed since" in capsys.readouterr().err


def test_the_code_of_a_claim_is_its_own_and_what_it_stands_on(monkeypatch):
    codes = {claim.id: ledger.code_of(claim) for claim in CLAIMS.values()}
    assert len(set(codes.values())) == 11
    read = Path.read_bytes
    folder, changed = "claims", "dropout.py"

    def edited(self):
        return read(self) + (b"#" if self.parent.name == folder and self.name == changed else b"")

    monkeypatch.setattr(Path, "read_bytes", edited)
    again = {claim.id: ledger.code_of(claim) for claim in CLAIMS.values()}
    assert [name for name in codes if codes[name] != again[name]] == ["dropout"]
    for folder, changed in (  # noqa: B007  edited reads them
        ("claims", "study.py"), ("tfm", "layers.py"), ("kernels", "precision.py"),
        ("parallel", "sharding.py"),
    ):  # fmt: skip
        assert all(codes[claim.id] != ledger.code_of(claim) for claim in CLAIMS.values())


def test_an_unknown_claim_lists_the_known_ones(tmp_path, capsys, monkeypatch):
    with pytest.raises(ClaimsError, match="no claim named 'heds'; there are scaling, heads, "):
        run(ClaimsConfig(run=tmp_path / "new", only="scaling,heds"))
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "cpu_count", jax.local_device_count)  # this process has begun with them
    with pytest.raises(SystemExit) as caught:
        command.main(["claims", "--only", "heds", "--run", str(tmp_path / "new")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: no claim named 'heds'")


def test_a_folder_of_another_preset_is_refused_before_measuring(tmp_path, measured):
    run(ClaimsConfig(run=tmp_path))
    with pytest.raises(ledger.UserError, match="preset: 'default' -> 'full'.*--run"):
        run(ClaimsConfig(run=tmp_path, preset="full"))
    assert measured == ["one", "two"]


def test_a_file_that_is_no_ledger_is_named(tmp_path, measured):
    (tmp_path / "claims.json").write_text("[1]")
    with pytest.raises(ClaimsError, match="claims.json: not a ledger"):
        run(ClaimsConfig(run=tmp_path))
    assert not measured


def test_publishing_writes_the_pages_from_the_ledger(tmp_path, measured):
    with pytest.raises(ClaimsError, match="nothing measured yet"):
        run(ClaimsConfig(run=tmp_path / "run", publish=tmp_path / "docs"))
    run(ClaimsConfig(run=tmp_path / "run", seed=7))
    run(ClaimsConfig(run=tmp_path / "run", publish=tmp_path / "docs"))
    english = (tmp_path / "docs/claims.md").read_text("utf-8")
    chinese = (tmp_path / "docs/claims.zh.md").read_text("utf-8")
    assert "## Why one?" in english and "It \\| grows." in english and "undecided" in english
    assert "## 为什么 one？" in chinese and "未定" in chinese
    assert "python -m experiments.run claims --seed 7 --only one" in english
    assert (tmp_path / "docs/claims/figures/one.svg").exists()
    written = english
    write_pages(tmp_path / "docs")
    assert (tmp_path / "docs/claims.md").read_text("utf-8") == written


def test_the_figure_draws_every_effect_interval_and_threshold():
    found = [small_claim("one", [])]
    estimates, figure = found[0].measure(Budget(2, 16, 1.0, first_seed=3))
    subclaims = judge(found[0].hypotheses, estimates)
    svg = drawing.evidence(figure, "one", "Why?", subclaims)
    assert svg.count("<circle") == 2 and svg.count('class="claim-delta"') == 2
    assert "It | grows." in svg and "not a number" not in svg and "nan" not in svg
