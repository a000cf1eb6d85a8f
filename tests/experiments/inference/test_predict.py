"""The commands, line for line: in this process, and as a user runs them."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.inference import lines as lines_module
from experiments.inference import predict
from experiments.inference.lines import Lines, Tally, chunks, lines_ahead, one_line
from experiments.inference.predict import PrefixError
from experiments.inference.predict_config import PredictConfig
from experiments.inference.saved import write
from experiments.inference.score import ScoreConfig
from experiments.inference.score import run as score

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory, translator):
    folder = tmp_path_factory.mktemp("run")
    write(folder, translator, {})
    return folder


@pytest.fixture
def call(monkeypatch, capsys, run):
    """(output lines, error lines) of a command's function with bytes on standard input."""

    def called(function, config, data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        function(config)
        out, err = capsys.readouterr()
        assert not out or out.endswith("\n")
        return out.split("\n")[:-1], err.splitlines()

    return called


@pytest.fixture
def say(call, run):
    """The same of predict."""
    return lambda data, **flags: call(predict.run, PredictConfig(run=run, **flags), data)


def test_one_line_for_each_line_and_the_reason_for_an_empty_one(say, translator):
    data = b"\xef\xbb\xbfsees\n\n  \t\nhouse cat\r\n\xff\n" + b"a bird " * 20 + b"\nruns \nsmall"
    found, told = say(data)
    good = translator(["sees", "house cat", "runs", "small"])
    assert found == [good[0], "", "", good[1], "", "", *good[2:]] and all(good)
    (tokens,) = translator.lengths(["a bird " * 20])
    assert told == [
        "line 5: invalid UTF-8",
        f"line 6: {tokens} tokens, more than the 16 that the model was trained for "
        "(see --long split)",
        "2 lines left empty",
    ]


def test_nothing_in_nothing_out(say):
    assert say(b"") == ([], [])
    assert say(b"\n\r\n") == (["", ""], [])


def test_lines_end_at_line_feeds_alone(say):
    found, told = say("sees\u2028runs\u0085\x0b\n\x00\nruns".encode())
    assert len(found) == 3 and told == []


def test_a_line_of_many_bytes_keeps_its_place(say, monkeypatch):
    monkeypatch.setattr(lines_module, "LONGEST", 100)
    monkeypatch.setattr(predict, "LONGEST", 100)
    found, told = say(b"sees\n" + b"a" * 350 + b"\nruns")
    assert [bool(line) for line in found] == [True, False, True]
    assert told == ["line 2: longer than 100 bytes", "1 line left empty"]


def test_long_lines_in_parts_are_counted(say, translator):
    long = "the cat sees. a bird sees! old house dog"
    found, told = say(f"sees\n{long}\n".encode(), long="split")
    assert found == translator(["sees", long], long="split")
    assert told == [
        f"line 2: {translator.lengths([long])[0]} tokens, more than the 16 that the model was "
        "trained for: translated in parts",
        "1 line longer than the model was trained for, and translated in parts",
    ]


def test_nbest_keeps_step_and_has_numbers_and_scores(say, translator):
    found, _ = say(b"sees\n\nhouse cat\n", nbest=2)
    expected = translator.nbest(["sees", "house cat"], 2)
    rows = [[str(n), f"{h.score:.4f}", h.text] for n, best in zip((1, 3), expected, strict=True)
            for h in best]  # fmt: skip
    assert found[2:4] == ["2\t\t"] * 2  # the columns of the others
    assert [line.split("\t") for line in found[:2] + found[4:]] == rows


def test_beam_and_alpha_are_those_of_the_call(say, translator):
    found, _ = say(b"house cat\nthe dog bird", beam=2, alpha=2.0, nbest=1)
    for line, (best,) in zip(
        found, translator.nbest(["house cat", "the dog bird"], 1, 2, alpha=2.0), strict=True
    ):
        assert line.split("\t")[1:] == [f"{best.score:.4f}", best.text]


@pytest.mark.slow
def test_samples_go_by_the_number_of_the_line(say, translator):
    found, _ = say(b"\nhouse cat\nsees\n", sample=True, seed=5, top_p=0.9, temperature=1.5)
    drawn = translator.sample(
        ["house cat", "sees"], seed=5, lines=[2, 3], top_p=0.9, temperature=1.5
    )
    assert found == ["", *(one_line(h.text) for (h,) in drawn)]


@pytest.mark.slow
def test_prefixes_are_read_in_step(say, translator, tmp_path):
    file = tmp_path / "prefixes"
    file.write_bytes(b"\xef\xbb\xbfthe old\r\n\nnever\na")
    found, told = say(b"house cat\nsees\n\nruns\n", prefix=file)
    good = translator(["house cat", "sees", "runs"], prefixes=["the old", "", "a"])
    assert found == [*good[:2], "", good[2]] and found[0].startswith("the old") and told == []
    with pytest.raises(PrefixError, match="prefixes: 4 lines, and the input has more"):
        say(b"\n" * 5, prefix=file)
    with pytest.raises(PrefixError, match="prefixes: more lines than the 3 of the input"):
        say(b"\n" * 3, prefix=file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(PrefixError, match="prefixes, line 1: invalid UTF-8"):
        say(b"a\n", prefix=file)
    with pytest.raises(PrefixError, match="absent: No such file"):
        say(b"a\n", prefix=tmp_path / "absent")
    file.write_bytes(b"runs runs runs runs runs runs\n")
    found, told = say(b"sees\n", prefix=file)
    assert found == [""] and "line 1: prefix 'runs runs" in told[0]


def test_align_adds_a_column(say, translator):
    found, _ = say(b"house cat\n\nsees", align=True)
    best = [hypotheses[0] for hypotheses in translator.nbest(["house cat", "sees"])]
    links = translator.align([("house cat", best[0]), ("sees", best[1])])
    shown = [" ".join(f"{i}-{j}" for i, j in own) for own in links]
    assert found == [f"{best[0].text}\t{shown[0]}", "\t", f"{best[1].text}\t{shown[1]}"]
    pairs, _ = say(b"house cat\nsees", align=True, nbest=2)
    assert [line.split("\t")[3] for line in pairs[::2]] == shown


@pytest.mark.slow
def test_an_ensemble_and_eight_bits(say, run, translator):
    assert say(b"house cat", ensemble=(run,))[0] == translator(["house cat"])
    assert say(b"house cat", int8=True)[0] != [""]


def test_a_translation_without_an_end_is_told(call, translator, tmp_path):
    settings = dataclasses.replace(translator.settings, target_length=5)
    write(tmp_path, dataclasses.replace(translator, settings=settings), {})
    found, told = call(predict.run, PredictConfig(run=tmp_path), b"sees\nhouse cat\nbird house")
    assert all(found)
    assert told == [
        "line 2: no end within 5 tokens",
        "line 3: no end within 5 tokens",
        "2 lines whose answer had no end within the most tokens",
    ]


def test_chunks_are_small_where_lines_are_long(monkeypatch):
    monkeypatch.setattr(lines_module, "BYTES_AT_ONCE", 10)

    def numbers(*lines):
        stream = Lines(io.BytesIO(b"\n".join(lines)), 100)
        return [[number for number, _ in chunk] for chunk in chunks(stream, 3)]

    assert numbers(b"ab", b"cd", b"x" * 11, b"e", b"f", b"g") == [[1, 2, 3], [4, 5, 6]]
    assert numbers(b"x" * 11, b"x" * 11, b"x" * 11, b"ab") == [[1], [2], [3], [4]]
    assert numbers() == []


def test_what_has_arrived_is_answered_when_no_more_is_waiting():
    """A program that writes a line and waits for its answer would wait for ever."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as program:
        answered = chunks(Lines(stream, 100), 10)
        program.write(b"ab\ncd")
        assert next(answered) == [(1, b"ab")]
        program.write(b"\nef\n")
        assert next(answered) == [(2, b"cd"), (3, b"ef")]
        program.write(b"gh\nij")
        program.close()
        assert list(answered) == [[(4, b"gh"), (5, b"ij")]]


def test_a_person_at_a_terminal_sees_a_prompt_and_how_to_end(say, monkeypatch, capsys):
    assert not any(">" in line for line in say(b"sees\n")[1])

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    answers, shown = say(b"sees\n")
    assert answers != [""] and shown[0].startswith("loading ") and "Ctrl-D ends" in shown[0]
    assert shown[1].count("> ") == 2  # before the line, and after its answer


@pytest.mark.parametrize("block", [1, 3, 100])
def test_lines_of_any_length_in_blocks_of_any_length(monkeypatch, block):
    monkeypatch.setattr(Lines, "BLOCK", block)
    stream = io.BytesIO(b"ab\n" + b"c" * 350 + b"\n\nd\r\n" + b"e" * 101)
    assert list(Lines(stream, 100)) == [b"ab", b"c" * 100, b"", b"d\r", b"e" * 100]


def test_results_do_not_depend_on_chunks(say, monkeypatch):
    data = b"sees\n\nhouse cat\nruns\nsmall\n"
    whole = say(data, nbest=2)
    serve = predict.serve
    monkeypatch.setattr(predict, "serve", lambda *most: serve(*most[:-1], 2))
    assert say(data, nbest=2) == whole


def test_what_breaks_lines_and_columns_becomes_spaces():
    assert one_line("a\r\nb\tc\u2028d") == "a  b c\u2028d"


def test_lines_ahead_of_a_file_and_of_no_file(tmp_path):
    file = tmp_path / "lines"
    for content, lines in ((b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3)):
        file.write_bytes(content)
        with file.open("rb") as stream:
            assert lines_ahead(stream) == lines and stream.read() == content
    assert lines_ahead(io.BytesIO(b"a\n")) is None
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stream, os.fdopen(writer, "wb"):
        assert lines_ahead(stream) is None


def test_a_tally_tells_and_counts(capsys):
    tally = Tally()
    for number in (3, 5):
        tally.tell(number, "why", "left empty")
    tally.sum_up()
    assert capsys.readouterr().err.splitlines() == [
        "line 3: why", "line 5: why", "2 lines left empty",
    ]  # fmt: skip


# ---- flags


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"temperature": 1.0}, "temperature=1.0 goes with sample"),
        ({"seed": 0}, "seed=0 goes with sample"),
        ({"sample": True, "beam": 2}, "beam=2 is for a search"),
        ({"sample": True, "temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"sample": True, "top_k": 0}, "top_k=0"),
        ({"sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"sample": True, "seed": -1}, "seed=-1"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"beam": 1, "nbest": 2}, "nbest=2 must be at most beam=1"),
        ({"beam": 0}, "beam=0 must be at least 1"),
        ({"nbest": -1}, "nbest=-1 must be at least 1"),
        ({"mean": "linear"}, "mean=linear goes with an ensemble"),
    ],
)
def test_impossible_flags(flags, why):
    with pytest.raises(ValueError, match=why):
        PredictConfig(**flags)


# ---- score


def test_scores_of_pairs(call, run, translator):
    data = b"house cat\tdog runs\r\n\nsees\nsees\t\na\tb\tc\n\xff\n\tsees\nsees \t tree\n"
    data += b"sees\t" + b"runs " * 30
    found, told = call(score, ScoreConfig(run=run), data)
    first, last = translator.score([("house cat", "dog runs"), ("sees", "tree")])
    assert found[0] == f"{first.log_prob:.6f}\t{len(first.ids)}"
    assert found[7] == f"{last.log_prob:.6f}\t{len(last.ids)}"
    assert [line for i, line in enumerate(found) if i not in (0, 7)] == [""] * 7
    assert told[:5] == [
        "line 3: 1 columns, not source<TAB>target",
        "line 4: an empty target",
        "line 5: 3 columns, not source<TAB>target",
        "line 6: invalid UTF-8",
        "line 7: an empty source",
    ]
    assert "more than the 24 that" in told[5] and told[6:] == ["6 lines left empty"]


def test_scores_of_tokens(call, run, translator):
    found, _ = call(score, ScoreConfig(run=run, per_token=True), b"house cat\tdog runs")
    (scored,) = translator.score([("house cat", "dog runs")])
    _, count, pieces, values = found[0].split("\t")
    assert pieces.split(" ") == translator.target.to_pieces(scored.ids)
    assert len(pieces.split(" ")) == int(count)
    assert [float(v) for v in values.split(" ")] == pytest.approx(scored.log_probs, abs=1e-6)
    with pytest.raises(ValueError, match="mean=linear goes with an ensemble"):
        ScoreConfig(mean="linear")


# ---- as a process


@pytest.mark.slow
def test_predict_as_a_process(run, translator):
    command = [sys.executable, "-m", "experiments.run", "predict", "--run", str(run), "--align"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, bufsize=0)
    process.stdin.write(b"sees\n")
    first = process.stdout.readline()  # before it is told that no more comes
    rest, error = process.communicate(b"\xff\nruns", timeout=120)
    assert process.returncode == 0
    lines = (first + rest).decode().split("\n")
    assert [line.split("\t")[0] for line in lines] == [
        *translator(["sees"]), "", *translator(["runs"]), "",
    ]  # fmt: skip
    told = [line for line in error.decode().splitlines() if line.startswith(("line", "1"))]
    assert told == ["line 2: invalid UTF-8", "1 line left empty"]
