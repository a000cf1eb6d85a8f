"""The results of the translation task: scores, sample translations, report."""

import shlex
import sys
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.text import Text

from experiments.checkpoints.run_folder import RunFolder, write_text
from experiments.data.text import Pair
from experiments.evaluation.cautions import FEW, cautions
from experiments.inference.lines import one_line
from experiments.reporting.figures import PANELS, Panel, learning_curves_file
from experiments.reporting.page import (
    Section,
    Tile,
    learning,
    page,
    settings,
    tiles,
    training_tiles,
)
from experiments.reporting.tables import table

SHOWN, PRINTED = 20, 3  # translations in the report, and on standard output

_PANELS = (
    Panel("Loss", "Nats a token, logarithmic; lower is better.",
          {"loss": "training", "valid_loss": "validation"}, "{:.2f}", "{:g}", "log"),
    Panel("BLEU", "Greedy, validation sentences; higher is better.", {"valid_bleu": ""},
          "{:.1f}", "{:g}"),
    *PANELS[-3:],
)  # fmt: skip
_INTRO = """A Transformer began with random numbers and learned to translate from pairs of
sentences alone. This page tells how well, how it got there, and what it writes."""


def unpicked(count: int, n: int = SHOWN) -> list[int]:
    """n indices below `count`, spread evenly."""
    return [i * count // n for i in range(min(n, count))] if count > n else list(range(count))


def _interval(measure: dict[str, Any], sentences: int) -> str:
    """± half the width; of few sentences the bootstrap tells nothing."""
    return f"± {measure['half_width']:.2f}" if sentences >= FEW else "–"


def _scores(results: dict[str, Any]) -> Section:
    names = {"bleu": "BLEU", "bleu_pretokenized": "BLEU, words as the files part them",
             "chrf": "chrF"}  # fmt: skip
    rows = "".join(
        f"<tr><td>{part}</td><td>{names[name]}</td><td class=number>{m['score']:.2f}</td>"
        f"<td class=number>{_interval(m, results[f'{part}_sentences'])}</td>"
        f"<td><code>{escape(m['signature'])}</code></td></tr>"
        for part, measures in results["scores"].items()
        for name, m in measures.items()
    )
    head = (
        "<th></th><th></th><th class=number>Score</th><th class=number>95 %</th><th>Signature</th>"
    )
    return Section(
        "scores",
        "How well",
        f"From 0 to 100. The interval is that of 1,000 bootstrap resamples of {FEW} sentences or "
        "more. The "
        "second BLEU parts words at the spaces of the files as they are: it is not comparable with "
        "figures from papers.",
        f'<div class="card"><table class="scores"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
    )


def _examples(test: Sequence[Pair], translations: Sequence[str]) -> Section:
    blocks = "".join(
        f"<tbody><tr><td>source</td><td>{escape(test[i][0])}</td></tr>"
        f"<tr><td>model</td><td><b>{escape(translations[i])}</b></td></tr>"
        f"<tr><td>reference</td><td>{escape(test[i][1])}</td></tr></tbody>"
        for i in unpicked(len(test))
    )
    return Section(
        "examples",
        "What it writes",
        "Sentences spread evenly over the test text; nobody has picked them. All translations "
        "stand in translations.tsv beside this page.",
        f'<div class="card"><table class="translations">{blocks}</table></div>',
    )


def show(results: dict[str, Any], test: Sequence[Pair], translations: Sequence[str]) -> None:
    """Prints the scores and a few translations."""
    console = Console()
    title = f"Seed {results['seed']}, beam {results['beam']}, {results['weights']}"
    columns = ("sentences", "BLEU", "95 %", "chrF", "BLEU, words of the files")
    shown = table(title, [""], columns)
    for part, measures in results["scores"].items():
        bleu, chrf, spaced = (measures[n] for n in ("bleu", "chrf", "bleu_pretokenized"))
        shown.add_row(
            part, f"{results[f'{part}_sentences']:,}", f"{bleu['score']:.2f}",
            _interval(bleu, results[f"{part}_sentences"]), f"{chrf['score']:.2f}",
            f"{spaced['score']:.2f}",
        )  # fmt: skip
    console.print(shown)
    for line in cautions(results, "sentences"):
        console.print(Text(f"note: {line}"))
    for name in ("bleu", "chrf"):
        console.print(results["scores"]["test"][name]["signature"], highlight=False)
    for i in unpicked(len(test), PRINTED):
        for name, text in (("source", test[i][0]), ("model", translations[i]),
                           ("reference", test[i][1])):  # fmt: skip
            console.print(Text(f"{name:>9}: {text}"), soft_wrap=True)


def report(
    config: dict[str, Any],
    folder: RunFolder,
    results: dict[str, Any],
    test: Sequence[Pair],
    translations: Sequence[str],
) -> None:
    """Writes translations.tsv, learning_curve.svg and report.html."""
    curves = learning_curves_file(folder.metrics(), _PANELS[:2])
    write_text(folder.path / "learning_curve.svg", curves)
    rows = [("source", "reference", "model")]
    rows += [(*pair, translation) for pair, translation in zip(test, translations, strict=True)]
    lines = ("\t".join(one_line(text) for text in row) + "\n" for row in rows)
    write_text(folder.path / "translations.tsv", "".join(lines))
    sections = [
        _scores(results),
        learning(folder.metrics(), _PANELS, "If the validation loss rises again, the model has "
                 "begun to learn its text by heart."),
        _examples(test, translations),
        settings(config, results),
    ]  # fmt: skip
    shown = [
        Tile("test_bleu", "Test BLEU", "{:.1f}", "sacreBLEU, 0 to 100"),
        Tile("test_chrf", "Test chrF", "{:.1f}", "0 to 100"),
        Tile("valid_bleu", "Validation BLEU", "{:.1f}", "on held-out sentences"),
        Tile("test_sentences", "Test sentences", "{:,}", "translated after training"),
        *training_tiles(results),
    ]
    command = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    title = "Translating with a Transformer"
    write_text(folder.report, page(
        title, _INTRO, command, tiles(results, shown), sections, cautions(results, "sentences")
    ))  # fmt: skip
