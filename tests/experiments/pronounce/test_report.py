"""What is shown of a model: which words, with which references, in the table and on the page."""

import pytest

from experiments.data.tokenizer import InputError
from experiments.inference.hypotheses import Hypothesis
from experiments.pronounce.report import INVENTED, NUM_MISTAKES, make_examples, pick, show
from experiments.reporting.report import Example

TRAIN = {"rough": [("R", "AH", "F")], "abc": [("EY", "B")], "abd": [("AE", "B"), ("EY", "B", "D")]}
TEST = {f"word{i}": [("W", str(i))] for i in range(100)} | {"chaos": [("K", "EY")]}


class Spelling:
    """A pronouncer of sorts: says each word letter by letter, and knows no z."""

    source = property(lambda self: self)

    def encode(self, word):
        if "z" in word:
            raise InputError(word)
        return [ord(letter) for letter in word]

    def nbest(self, words):
        return [[Hypothesis(" ".join(w.upper()), (), -len(w) / 10, 0.0)] for w in words]


@pytest.fixture
def examples():
    said = {word: TEST[word][0] if i % 2 else ("X",) for i, word in enumerate(TEST)}
    return make_examples(Spelling(), TRAIN, TEST, said)


def of(examples, group):
    return [example for example in examples if example.group == group]


def test_familiar_words_are_picked_before_those_spread_over_the_alphabet():
    assert pick(TRAIN, 2) == ["rough", "abc"]
    words = pick(TEST, 6)
    assert words[0] == "chaos" and len(set(words)) == 6 and set(words) <= TEST.keys()


def test_each_group_holds_its_words_with_their_references(examples):
    for group, lexicon in (("seen", TRAIN), ("unseen", TEST), ("wrong", TEST)):
        assert of(examples, group)
        for example in of(examples, group):
            assert example.references == [" ".join(p) for p in lexicon[example.word]]
            assert example.hypothesis == " ".join(example.word.upper())
            assert example.score == -len(example.word) / 10
    # Words that the model can read; no dictionary has them.
    invented = {example.word: example.references for example in of(examples, "invented")}
    assert invented == {word: [] for word in INVENTED if "z" not in word}


def test_the_wrong_are_those_of_the_test_words_whose_hypothesis_is(examples):
    wrong = [example.word for example in of(examples, "wrong")]
    assert len(wrong) == NUM_MISTAKES
    assert set(wrong) <= {word for i, word in enumerate(TEST) if i % 2 == 0}


def test_words_and_sounds_in_brackets_are_shown_as_they_are(capsys):
    """They are no markup of the terminal's."""
    rates = {f"{part}_{rate}": 0.1 for part in ("valid", "test") for rate in ("wer", "per")}
    example = Example("[/noise]", "seen", "[laughter] AH", ["[red] AH"], -1.0)
    show({"seed": 3, "beam": 4, "valid_words": 1, "test_words": 1, **rates}, [example])
    out = capsys.readouterr().out
    assert "[/noise]" in out and "[laughter] AH" in out and "[red] AH" in out


def test_the_rates_and_the_words_are_printed(examples, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rates = {"valid_wer": 0.1, "valid_per": 0.02, "test_wer": 0.34567, "test_per": 0.0891}
    show({"seed": 3, "beam": 4, "valid_words": 2442, "test_words": 12246, **rates}, examples)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["validation", "2,442", "10.00%", "2.00%"] in lines
    assert ["test", "12,246", "34.57%", "8.91%"] in lines
    shown = " ".join(" ".join(line) for line in lines)
    assert "seen abd A B D AE B EY B D" in shown
    assert all(e.word in shown for e in examples if e.group != "wrong") and "wrong" not in shown
