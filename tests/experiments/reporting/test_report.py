import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.reporting.figures import (
    PANELS,
    attention_map,
    learning_curve,
    learning_curves_file,
)
from experiments.reporting.report import AttentionMap, Example, write_report

LAYERS, HEADS = 2, 3


class Page(HTMLParser):
    """Text, tags with attributes, and table rows of a page; fails where tags do not match."""

    VOID = ("meta",)

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "td":
            self.rows[-1] += " "

    def handle_data(self, data):
        self.text += data
        if "tr" in self._open:
            self.rows[-1] += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(t == tag and wanted.items() <= a.items() for t, a in self.tags)

    def row(self, word: str) -> str:
        """The text of the one table row that holds `word`, spaces squeezed."""
        (found,) = (" ".join(row.split()) for row in self.rows if word in row)
        return found


def metrics(steps: int = 200) -> list[dict]:
    lines: list[dict] = []
    for step in (1, *range(20, steps + 1, 20)):
        lines.append(
            {"step": step, "loss": 1 + 3 / step, "tokens_per_second": 15_000.0, "seconds": 0.1,
             "learning_rate": 1e-3, "gradient_norm": 0.5}
        )  # fmt: skip
        if step % 100 == 0:
            lines[-1] |= {"valid_wer": 0.4, "valid_per": 0.1, "valid_loss": 0.3}
    return lines


def attention(word: str = "phone", sounds: str = "F OW N") -> AttentionMap:
    letters, rows = [*word, "</s>"], [*sounds.split(), "</s>"]
    weights = np.full((LAYERS, HEADS, len(rows), len(letters)), 1 / len(letters))
    return AttentionMap(word, letters, rows, weights)


def arguments() -> dict:
    return {
        "title": "Learning to pronounce",
        "command": "python -m experiments.run --seed 3",
        "config": {"seed": 3, "model": {"d_model": 128}},
        "results": {
            "test_wer": 0.314, "test_per": 0.073, "valid_wer": 0.305, "test_words": 12_246,
            "train_seconds": 402.4, "parameters": 1_324_032, "steps": 3_600, "seed": 3,
        },
        "metrics": metrics(),
        "attention": [attention(), attention("cat", "K AE T")],
        "confusions": [("AH", "IH", 1_812), ("∅", "T", 20), ("AH", "∅", 10)],
        "examples": [
            Example("apple", "seen", "AE P AH L", ["AE P AH L"], -0.0123),
            Example("choir", "unseen", "CH OY R", ["K W AY ER", "CH OY ER"], -0.91),
            Example("snizzle", "invented", "S N IH Z AH L", []),
            Example("debris", "wrong", "D EH B R IY S", ["D AH B R IY"]),
        ],
    }  # fmt: skip


def report(tmp_path, **changes) -> str:
    path = tmp_path / "report.html"
    write_report(path, **arguments() | changes)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return report(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_nothing_is_loaded_from_elsewhere(html, page):
    assert not re.search(r"https?://|//\w+\.\w+/|@import|url\((?!#)", html)
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")


def test_links_and_references_lead_somewhere(html, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a[n][1:] for _, a in page.tags for n in ("href", "xlink:href") if n in a]
    assert set(targets + re.findall(r"url\(#(\w+)\)", html)) <= set(ids)
    assert {"learning", "examples", "attention", "confusions", "settings"} <= set(targets)


def test_key_figures(page):
    figures = ("31.4%", "7.3%", "30.5%", "12,246", "1,324,032", "6 min 42 s", "3,600", "8.9 steps")
    for figure in (*figures, "3,845 of 12,246", "python -m experiments.run --seed 3"):
        assert figure in page.text
    assert page.text.index("Test WER") < page.text.index("How it learned")


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.6, "42 s"), (59.7, "1 min 0 s"), (5_460, "1 h 31 min")]
)
def test_training_time_is_readable(tmp_path, seconds, text):
    html = report(tmp_path, results={"train_seconds": seconds, "steps": 10})
    assert f"<dd>{text}</dd>" in html


def test_figures_that_were_not_measured_are_left_out(tmp_path):
    text = Page(report(tmp_path, results={"test_wer": 0.5, "test_words": 2})).text
    assert "1 of 2 words wrong" in text
    assert "Validation WER" not in text
    assert "Training time" not in text


def test_examples(html, page):
    assert page.row("apple") == "✓ apple AE P AH L AE P AH L -0.01"
    assert page.row("choir") == "✗ choir CH OY R K W AY ER or CH OY ER -0.91"
    assert page.row("snizzle") == "– snizzle S N IH Z AH L"
    assert page.row("debris").startswith("✗ debris D EH B R IY S D AH B R IY")
    for group in ("Seen", "Unseen", "Invented", "Wrong"):
        assert any(row.startswith(group) for row in page.rows)
    # Against the closest reference, CH OY ER: one sound differs, none is missing.
    assert '>CH OY <mark title="instead of ER">R</mark></td>' in html
    assert '<mark title="extra">S</mark>' in html


def test_missing_sound_is_marked(tmp_path):
    html = report(tmp_path, examples=[Example("cats", "wrong", "K AE T", ["K AE T S"])])
    assert 'K AE T <del title="S is missing"></del>' in html


def test_confusions(page):
    assert page.row("AH → IH") == "AH → IH replaced 1,812"
    assert page.row("∅ → T") == "∅ → T added 20"
    assert page.row("AH → ∅") == "AH → ∅ left out 10"
    assert page.count("div", style="width:100.0%") == 1


def test_attention_maps_of_every_head(html, page):
    assert page.count("svg", class_="heat") == 2 * LAYERS * HEADS
    assert page.count("text", class_="letter") == LAYERS * HEADS * len("phone" + "cat")
    assert html.count(">OW</text>") == LAYERS * HEADS
    assert f"Decoder layer {LAYERS}" in page.text
    assert f"Head {HEADS}" in page.text


def test_attention_map_puts_weights_where_they_belong():
    svg = attention_map(["a", "</s>"], ["AH", "</s>"], np.array([[0.9, 0.1], [0.0, 1.0]]))
    cells = re.findall(r'<rect class="cell" x="([\d.]+)" y="([\d.]+)".*?opacity="([\d.]+)"', svg)
    (x0, y0, first), (x1, y1, second), (x2, y2, third) = [tuple(map(float, c)) for c in cells]
    assert (first, second, third) == (0.9, 0.1, 1.0)  # and the weight of 0 is no cell
    assert y0 == y1 < y2
    assert x0 < x1 == x2
    assert "AH looks at a: 0.90" in svg


def test_learning_curves(page):
    assert page.count("svg", role="img") == len(PANELS) + 2 * LAYERS * HEADS
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert "Loss: training from 4.00 to 1.01, validation from 0.30 to 0.30" in labels
    assert "Words wrong: from 40.0% to 40.0%" in labels
    assert "validation" in page.text


def test_learning_curve_follows_the_page_between_light_and_dark():
    svg = learning_curve(PANELS[0], metrics())
    assert "var(--accent, #" in svg
    assert "var(--second, #" in svg
    assert not re.search(r"(?<!, )#[0-9a-f]{6}\b", svg)  # colours alone are fallbacks


@pytest.mark.parametrize("value", [1e-9, 1.0, 3e7])
@pytest.mark.parametrize("steps", [1, 40])
def test_learning_curve_of_equal_values(value, steps):
    lines = [line | {"loss": value, "valid_loss": value} for line in metrics(steps)]
    svg = learning_curve(PANELS[0], lines)
    # Both lines end in one point, and still their labels do not lie on one another.
    (training,) = re.findall(r'translate\(\S+ (\S+)\)">training<', svg)
    (validation,) = re.findall(r'translate\(\S+ (\S+)\)">validation<', svg)
    assert float(validation) - float(training) > 20


def test_learning_curve_of_a_run_that_diverged():
    lines = metrics()
    for line in lines[5:]:
        line["loss"] = None  # as metrics.jsonl has what is not finite
        line["gradient_norm"] = None
    assert "Loss: training from 4.00 to 1.04" in learning_curve(PANELS[0], lines)
    nothing_finite = [{"step": 1, "loss": None}]
    assert learning_curve(PANELS[0], nothing_finite) == ""


def test_sections_with_nothing_to_show_are_left_out(tmp_path):
    html = report(tmp_path, metrics=[], attention=[], confusions=[], examples=[])
    assert re.findall(r'<section id="(\w+)"', html) == ["settings"]
    assert html.count('<a href="#') == 1


def test_config_and_results_are_folded(html, page):
    assert "&quot;d_model&quot;: 128" in html
    assert "&quot;test_wer&quot;: 0.314" in html
    assert page.count("details") == 2 + len(arguments()["attention"])
    assert page.count("details", open=None) == 1  # the first word's attention


def test_text_is_escaped(tmp_path):
    evil = '<b>"x"&'
    html = report(
        tmp_path,
        title=evil,
        command=evil,
        config={evil: evil},
        results={"seed": 1, evil: evil},
        attention=[AttentionMap(evil, [evil], [evil], np.ones((1, 1, 1, 1)))],
        confusions=[(evil, evil, 1)],
        examples=[
            Example(evil, "wrong", evil, ["K"]),
            Example(evil, "wrong", "K", [evil, evil + "2"]),
            Example(evil, "wrong", "", [evil]),
        ],
    )
    assert "<b>" not in html
    assert html.count("&lt;b&gt;&quot;x&quot;&amp;") >= 14
    Page(html)


def test_unknown_group_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="other"):
        report(tmp_path, examples=[Example("a", "other", "AH", [])])


def test_the_curves_stand_alone_as_a_file():
    picture = learning_curves_file(metrics())
    root = ElementTree.fromstring(picture)  # well-formed: nothing of the page is missing
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert picture.count("var(") == len(re.findall(r"var\(--\w+, #\w{6}\)", picture)) > 0
    texts = {element.text for element in root.iter() if element.text}
    assert {"Loss", "Words wrong"} <= texts
