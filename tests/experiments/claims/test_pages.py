import json
import re
from pathlib import Path

import pytest

from experiments.claims.ledger import CLAIMS
from experiments.claims.pages import markdown, number
from experiments.reporting.page import Section, page
from experiments.reporting.style import inline, panels

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def ledger():
    files = (DOCS / "claims" / name for name in ("claims.json", "config.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


@pytest.mark.parametrize(("language", "name"), [("en", "claims.md"), ("zh", "claims.zh.md")])
def test_the_committed_pages_are_those_of_the_committed_ledger(ledger, language, name):
    assert (DOCS / name).read_text("utf-8") == markdown(*ledger, language)


def test_the_committed_ledger_has_every_claim_and_sub_claim_that_the_code_states(ledger):
    records, _ = ledger
    assert [record["id"] for record in records] == list(CLAIMS)
    for record in records:
        stated = CLAIMS[record["id"]].hypotheses
        assert [s["id"] for s in record["subclaims"]] == list(stated)
        assert [s["rule"] for s in record["subclaims"]] == [h.rule for h in stated.values()]


def test_the_pages_pictures_are_there_and_small(ledger):
    text = (DOCS / "claims.md").read_text("utf-8")
    pictures = [DOCS / name for name in re.findall(r"\]\((claims/figures/.*?)\)", text)]
    assert len(pictures) == len(CLAIMS)
    assert sum(picture.stat().st_size for picture in pictures) < 3_000_000


def test_the_pages_say_what_the_measurements_do_not_bear_out(ledger):
    records, settings = ledger
    refuted = [s for r in records for s in r["subclaims"] if s["verdict"] == "not supported"]
    summary = markdown(records, settings, "en").split("\n## ")[1]
    assert refuted and all(s["statement"] in summary for s in refuted)
    assert summary.count("\n- ") == len(refuted)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.123456, "0.123"), (-2e-7, "-2e-07"), (12.0, "12")]
)
def test_numbers_have_three_figures(value, text):
    assert number(value) == text


def test_the_report_may_show_the_images_that_its_figures_hold():
    """A heat map is one; the policy of the page forbids all that it does not name."""
    figure, (axes,) = panels("A map")
    axes.imshow([[0, 1], [1, 0]])
    html = page("t", "i", "c", "", [Section("a", "A", "", inline(figure, "map", "a map"))])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert '<image href="data:' in html and "img-src data:" in policy
    assert "default-src 'none'" in policy
