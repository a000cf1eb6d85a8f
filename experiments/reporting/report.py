"""The report of a pronunciation run, as one self-contained HTML file."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from experiments.checkpoints.run_folder import write_text
from experiments.evaluation.cautions import cautions
from experiments.evaluation.error_rates import GAP, closest_reference, edit_operations
from experiments.reporting.figures import PANELS, attention_map
from experiments.reporting.page import (
    Section,
    Tile,
    learning,
    page,
    settings,
    tiles,
    training_tiles,
)

_INTRO = """A Transformer began with random numbers and learned, from a dictionary alone, to
turn the letters of a word into its sounds. This page tells how well, how it got there, and where
it looks."""

_LEARNING = (
    "If the validation error rises again, the model has begun to learn its dictionary by heart."
)

_GROUPS = {
    "seen": ("Seen", "words of the training data"),
    "unseen": ("Unseen", "test words, never shown in training"),
    "invented": ("Invented", "in no dictionary: judge by ear"),
    "wrong": ("Wrong", "test words that the model gets wrong"),
}


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """The cross-attention weights of every head for one word."""

    word: str
    letters: list[str]
    """columns, the end symbol '</s>' included"""
    sounds: list[str]
    """rows, the end symbol '</s>' included"""
    weights: np.ndarray
    """[N decoder layers, H, len(sounds), len(letters)]"""


@dataclasses.dataclass(frozen=True)
class Example:
    """One pronounced word; sounds are separated by spaces."""

    word: str
    group: str
    """'seen', 'unseen', 'invented' or 'wrong'"""
    hypothesis: str
    references: list[str]
    """empty for a word that no dictionary has"""
    score: float | None = None


def write_report(
    path: str | Path,
    *,
    title: str,
    command: str,
    config: dict[str, Any],
    results: dict[str, Any],
    metrics: list[dict[str, Any]],
    attention: list[AttentionMap],
    confusions: list[tuple[str, str, int]],
    examples: list[Example],
) -> None:
    """Writes the report of a run as one self-contained HTML file.

    Args:
      command: the command that repeats the run.
      config: JSON values; shown as they are.
      results: the fields of results.json, error rates as fractions.
      metrics: the objects of metrics.jsonl.
      confusions: (reference, hypothesis, count), worst first; '∅' for a gap.
    """
    sections = [
        learning(metrics, PANELS, _LEARNING),
        _examples(examples),
        _attention(attention),
        _confusions(confusions),
        settings(config, results),
    ]
    html = page(
        title, _INTRO, command, tiles(results, _tiles(results)), sections,
        cautions(results, "words") if "test_words" in results else (),
    )  # fmt: skip
    write_text(Path(path), html)


def _tiles(results: dict[str, Any]) -> list[Tile]:
    words, wer = results.get("test_words", 0), results.get("test_wer", 0)
    return [
        Tile("test_wer", "Test WER", "{:.1%}", f"{wer * words:,.0f} of {words:,} words wrong"),
        Tile("test_per", "Test PER", "{:.1%}", "sounds wrong, missing or extra"),
        Tile("valid_wer", "Validation WER", "{:.1%}", "on held-out words"),
        Tile("test_words", "Test words", "{:,}", "scored after training"),
        *training_tiles(results),
    ]


def _marked(hypothesis: str, references: Sequence[str]) -> str:
    """The hypothesis, with marks on the sounds that differ from the closest reference."""
    sounds = hypothesis.split()
    alternatives = [reference.split() for reference in references] or [sounds]
    _, closest = closest_reference(sounds, alternatives)
    parts = []
    for expected, got in edit_operations(sounds, closest):
        if expected == got:
            parts.append(escape(str(got)))
        elif got is None:
            parts.append(f'<del title="{escape(str(expected))} is missing"></del>')
        else:
            why = f"instead of {expected}" if expected else "extra"
            parts.append(f'<mark title="{escape(why)}">{escape(got)}</mark>')
    return " ".join(parts)


def _example_row(example: Example) -> str:
    if not example.references:
        mark = '<span class="unknown" title="no reference">–</span>'
    elif example.hypothesis in example.references:
        mark = '<span class="right" title="right">✓</span>'
    else:
        mark = '<span class="wrong" title="wrong">✗</span>'
    references = " <span class=note>or</span> ".join(map(escape, example.references))
    score = "" if example.score is None else f"{example.score:.2f}"
    return (
        f"<tr><td>{mark}</td><td>{escape(example.word)}</td>"
        f'<td class="sounds">{_marked(example.hypothesis, example.references)}</td>'
        f'<td class="sounds">{references}</td><td class="number">{score}</td></tr>'
    )


def _examples(examples: Sequence[Example]) -> Section:
    groups = []
    for group in dict.fromkeys(example.group for example in examples):
        name, note = _GROUPS[group]
        rows = "".join(_example_row(e) for e in examples if e.group == group)
        groups.append(
            f'<tbody><tr><th colspan="5" scope="rowgroup">{name}'
            f'<span class="note">{note}</span></th></tr>{rows}</tbody>'
        )
    head = '<th></th><th>Word</th><th>Model</th><th>Dictionary</th><th class="number">Score</th>'
    return Section(
        "examples",
        "What it says",
        "A word is right (✓) if the model's sounds equal one of the dictionary's pronunciations; "
        "otherwise <mark>wrong</mark> sounds and gaps <del></del> are marked against the closest "
        "one. The score is a log-probability: the nearer to 0, the surer the model. CMUdict's "
        "sounds: AH as in <i>cut</i>, AE <i>cat</i>, IH <i>kit</i>, IY <i>key</i>, ER <i>her</i>, "
        "OW <i>go</i>, AY <i>my</i>.",
        "".join(groups)
        and '<div class="card"><table class="examples">'
        f"<thead><tr>{head}</tr></thead>{''.join(groups)}</table></div>",
    )


def _layer(number: int, word: AttentionMap) -> str:
    heads = word.weights[number - 1]
    rows = math.ceil(len(heads) / 4)
    figures = "".join(
        f"<figure><figcaption>Head {head}</figcaption>"
        f"{attention_map(word.letters, word.sounds, weights)}</figure>"
        for head, weights in enumerate(heads, start=1)
    )
    return (
        f"<h4>Decoder layer {number}</h4>"
        f'<div class="heads" style="--columns:{math.ceil(len(heads) / rows)}">{figures}</div>'
    )


def _attention(attention: Sequence[AttentionMap]) -> Section:
    words = "".join(
        f"<details{' open' if index == 0 else ''}><summary>{escape(word.word)}"
        f'<span class="sounds">{escape(" ".join(word.sounds[:-1]))}</span></summary>'
        f"<div>{''.join(_layer(n + 1, word) for n in range(len(word.weights)))}</div></details>"
        for index, word in enumerate(attention)
    )
    return Section(
        "attention",
        "Where it looks",
        "To write each sound (a row, from top to bottom) every head of the decoder spreads a "
        'weight of 1 over the letters (columns): 0 <span class="scale"></span> 1. A diagonal is a '
        "head that reads along with the sounds, a vertical stripe one that waits at a letter; ■ is "
        "the end of the word. Open a word to see its maps.",
        words,
    )


def _kind(expected: str, got: str) -> str:
    if GAP not in (expected, got):
        return "replaced"
    return "added" if expected == GAP else "left out"


def _confusions(confusions: Sequence[tuple[str, str, int]]) -> Section:
    most = max((count for _, _, count in confusions), default=1)
    rows = "".join(
        f'<tr><td class="sounds">{escape(expected)} → {escape(got)}</td>'
        f'<td class="kind">{_kind(expected, got)}</td>'
        f'<td class="bar"><div style="width:{100 * count / most:.1f}%"></div></td>'
        f'<td class="number">{count:,}</td></tr>'
        for expected, got, count in confusions
    )
    head = '<th colspan="3">Dictionary → model</th><th class="number">Times</th>'
    return Section(
        "confusions",
        "What it mixes up",
        "The commonest errors on the test words, each pronunciation laid against its closest "
        "reference: the dictionary's sound, then what the model wrote in its place (∅: nothing). "
        "Neighbours in the mouth, such as two unstressed vowels, should lead.",
        rows
        and '<div class="card confusions"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>",
    )
