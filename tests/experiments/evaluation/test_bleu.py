import json
import random
import socket
import tracemalloc

import pytest
from sacrebleu.metrics import BLEU, CHRF

from experiments.evaluation import bleu as scores
from experiments.evaluation.bleu import bleu, bleu_pretokenized, chrf, tokenizer_for

REFERENCES = [
    "The cat sat on the mat, and the dog didn't.",
    "It costs 3,50 euros (more or less).",
    "Nobody knows why; everybody asks.",
    "Open the file, then save it.",
] * 10
MEASURES = (bleu, bleu_pretokenized, chrf)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("scoring asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)


def noisy(seed=0):
    rng = random.Random(seed)
    return [" ".join(w for w in r.split() if rng.random() < 0.85) for r in REFERENCES]


def tokenized(lines):
    """Punctuation parted from the words, as it stands in corpora of old."""
    return [line.replace(",", " ,").replace(".", " .").replace(";", " ;") for line in lines]


@pytest.mark.parametrize("measure", MEASURES)
def test_the_references_themselves_score_100(measure):
    found = measure(REFERENCES, REFERENCES)
    assert found.score == pytest.approx(100) and found.mean == pytest.approx(100)
    assert found.half_width == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_in_common_scores_0(measure):
    found = measure(["xyz"] * 40, ["abc"] * 40)
    assert found.score == found.mean == found.half_width == 0
    assert measure([""] * 40, REFERENCES).score == 0
    assert measure(["", "a"], ["", "b"]).score == 0


@pytest.mark.parametrize(
    "measure, metric",
    [
        (bleu, BLEU()),
        (bleu_pretokenized, BLEU(tokenize="none", force=True)),
        (lambda h, r: bleu(h, r, "char"), BLEU(tokenize="char")),
        (lambda h, r: bleu(h, r, "zh"), BLEU(tokenize="zh")),
        (chrf, CHRF()),
    ],
    ids=["bleu", "pretokenized", "char", "zh", "chrf"],
)
@pytest.mark.parametrize("sentences", [40, 7])
def test_score_interval_and_signature_are_sacrebleus_own(measure, metric, sentences):
    hypotheses, references = noisy()[:sentences], REFERENCES[:sentences]
    found = measure(hypotheses, references)
    expected = metric.corpus_score(hypotheses, [references], n_bootstrap=1000)
    assert found.score == pytest.approx(expected.score, abs=1e-9) and 0 < found.score < 100
    assert found.mean == pytest.approx(expected._mean, abs=1e-9)
    assert found.half_width == pytest.approx(expected._ci, abs=1e-9) and found.half_width > 0
    assert found.signature == str(metric.get_signature())


def test_a_score_by_hand():
    # 5, 4, 3 and 2 n-grams of 6, 5, 4 and 3 that are right; as long as the reference.
    found = bleu_pretokenized(["a b c d e x"], ["a b c d e f"])
    assert found.score == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_the_signatures_tell_the_two_bleus_apart():
    text, other = bleu(noisy(), REFERENCES), bleu_pretokenized(noisy(), REFERENCES)
    assert "tok:13a" in text.signature and "tok:none" in other.signature
    for found in (text, other):
        assert "bs:1000|seed:12345" in found.signature and "version:2." in found.signature
    # On text that is parted already, as in corpora of old, both count the same words.
    parted = tokenized(noisy()), tokenized(REFERENCES)
    assert bleu_pretokenized(*parted).score == pytest.approx(bleu(*parted).score, abs=2)
    assert abs(text.score - other.score) > 2


def test_the_environment_changes_nothing(monkeypatch):
    expected = bleu(noisy(), REFERENCES)
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    assert bleu(noisy(), REFERENCES) == expected


def test_it_prints_and_logs_nothing(capfd, caplog):
    parted = tokenized(REFERENCES) * 5  # sacrebleu warns of 100 lines that end in " ."
    for measure in MEASURES:
        measure(parted, parted)
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("measure", MEASURES)
def test_wrong_counts_are_errors(measure):
    with pytest.raises(ValueError, match="39 hypotheses, but 40 references"):
        measure(REFERENCES[1:], REFERENCES)
    with pytest.raises(ValueError, match="no sentences"):
        measure([], [])


def test_memory_does_not_grow_with_the_resamples(monkeypatch):
    hypotheses, references = noisy() * 50, REFERENCES * 50
    peaks = []
    for resamples in (2, 50):
        monkeypatch.setattr(scores, "RESAMPLES", resamples)
        tracemalloc.start()
        chrf(hypotheses, references)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_measure_prints_as_a_line_and_goes_into_json():
    found = chrf(noisy(), REFERENCES)
    assert str(found) == (
        f"{found.score:.2f} ({found.mean:.2f} ± {found.half_width:.2f}) {found.signature}"
    )
    assert json.loads(json.dumps(found.to_json())) == {
        "score": found.score, "mean": found.mean, "half_width": found.half_width,
        "signature": found.signature,
    }  # fmt: skip


def test_chrf_of_resamples_without_a_letter_in_common_has_an_interval_too():
    found = chrf(["xx", "yy", "ab"], ["ab"] * 3)
    assert 0 < found.score < 100 and found.half_width > 0


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("The cat sees the dog, 42 times.", "13a"),
        ("Η γάτα βλέπει το σκυλί.", "13a"),
        ("고양이가 개를 봅니다.", "13a"),
        ("பூனை நாயைப் பார்க்கிறது.", "13a"),
        ("那只猫看见了一只狗。", "zh"),
        ("猫が犬を見ています。", "char"),
        ("แมวเห็นหมา", "char"),
        ("ຫມາເຫັນແມວ", "char"),
        ("ឆ្មាឃើញឆ្កែ", "char"),
        ("ကြောင်က ခွေးကို မြင်တယ်။", "char"),
        ("ཞི་མིས་ཁྱི་མཐོང་།", "char"),
        ("那只猫看见了 John Smith。", "13a"),  # most letters are Latin
        ("", "13a"),
    ],
)
def test_the_tokenizer_goes_by_the_script_of_the_references(text, tokenizer):
    assert tokenizer_for([text] * 3) == tokenizer


def test_one_wrong_character_in_a_language_without_spaces_is_one_wrong_character():
    right = ["แมวเห็นหมาในบ้านของฉันเมื่อวานนี้"] * 20
    wrong = [text[:-3] + "ก" + text[-2:] for text in right]
    assert bleu(wrong, right, tokenizer_for(right)).score > 80 > 1 > bleu(wrong, right).score
