"""Words in, pronunciations out, with an untrained model: what it says is noise, the form is not."""

import dataclasses
import importlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints.checkpoint import Checkpoints
from experiments.checkpoints.run_folder import RunFolderError, plain, write_json
from experiments.data.vocabulary import BOS, Vocabulary
from experiments.inference import lines as lines_module
from experiments.inference import predict as command
from experiments.inference import predict_words, pronouncer
from experiments.inference.predict_config import PredictConfig
from experiments.inference.predict_words import LONGEST, predict
from experiments.inference.pronouncer import Pronouncer, UnpronounceableError, load
from experiments.pronounce.task import PronounceConfig
from tfm.config import TransformerConfig
from tfm.kernels.quantization import Quantized
from tfm.model import Transformer
from tfm.training import TrainState, init_state, make_optimizer

LETTERS, PHONES = Vocabulary(tuple("abcdé")), Vocabulary(("AA", "B", "K", "D"))
MODEL = TransformerConfig(
    vocab_size=PHONES.size, source_vocab_size=LETTERS.size, d_model=8, d_ff=8, num_heads=2,
    num_encoder_layers=1, num_decoder_layers=1, output_bias=True,
)  # fmt: skip
SOURCE_LENGTH, TARGET_LENGTH, BEAM = 7, 6, 2


@pytest.fixture(scope="module")
def said():
    """An untrained pronouncer, made once: so the beams that the tests use compile once."""
    state = init_state(Transformer(MODEL), make_optimizer(lambda _: 0.1, 1.0), jax.random.key(3))
    # A trained model never says <pad> or <s>, nor nothing: let the untrained one seldom end.
    params = state.params | {"output_bias": jnp.array([-99.0, -99.0, -1.0, 0, 0, 0, 0])}
    return Pronouncer(
        Transformer(MODEL), params, LETTERS, PHONES, SOURCE_LENGTH, TARGET_LENGTH, BEAM, 0.6
    )


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Batches of four words, so that a handful of words takes several."""
    monkeypatch.setattr(pronouncer, "ROWS", 4)


def lines_of(said, data: bytes, at_once=4096, **flags):
    return list(predict(said, io.BytesIO(data), PredictConfig(**flags), at_once))


def test_one_line_for_each_line_and_the_reason_for_an_empty_one(said, capsys):
    data = b"ab\n\nABBA\r\nxab\n\xff\n\xc3\x89a\nabcdabc\n  cab \t\nabcdab"
    lines = lines_of(said, data)
    words = ["ab", None, "abba", None, None, "éa", None, "cab", "abcdab"]
    expected = {w: str(p) for w in words if w for p in said([w])}
    assert lines == ["" if word is None else expected[word] for word in words]
    assert all(expected[word] for word in ("ab", "abba"))
    assert capsys.readouterr().err.splitlines() == [
        "line 2: empty line",
        "line 4: 'xab': unknown character 'x'",
        "line 5: invalid UTF-8",
        "line 7: 'abcdabc': 7 letters, more than the 6 that the model was trained for",
    ]


def test_a_long_line_is_dropped_but_keeps_its_place(capsys):
    long = b"a" * (3 * LONGEST + 5)
    stream = io.BytesIO(b"ab\n" + long + b"\n\n" + long + b"\n" + b"b" * LONGEST)
    lines = list(lines_module.lines_of(stream, LONGEST))
    assert [line[:1] for line in lines] == [b"a", b"a", b"\n", b"a", b"b"]
    assert max(map(len, lines)) == LONGEST


def test_a_line_too_long_is_named_and_not_repeated(said, capsys):
    data = b"ab\n" + b"b" * LONGEST + b"\n" + b"?" * 200 + b"\n"
    lines = list(predict(said, lines_module.lines_of(io.BytesIO(data), LONGEST), PredictConfig()))
    assert len(lines) == 3 and lines[0] and lines[1:] == ["", ""]
    shown = "?" * 60
    assert capsys.readouterr().err.splitlines() == [
        "line 2: longer than 4096 bytes",
        f"line 3: '{shown}'…: unknown character '?'",
    ]


def test_no_input_gives_no_output(said, capsys):
    assert lines_of(said, b"") == []
    assert lines_of(said, b"\n\n") == ["", ""]
    assert capsys.readouterr().err.count("empty line") == 2


def test_order_does_not_depend_on_lengths_or_batches(said):
    words = [w * n for n in (3, 1, 2) for w in ("a", "b", "ab", "d")]
    together = [str(p) for p in said(words)]
    assert together == [str(said([word])[0]) for word in words]
    assert lines_of(said, "\n".join(words).encode()) == together


def test_words_beyond_one_chunk_stay_in_step(said, capsys):
    data = b"ab\n\nb\nc\n?\nd\nda"
    lines = lines_of(said, data, at_once=3)
    assert capsys.readouterr().err.splitlines() == [
        "line 2: empty line",
        "line 5: '?': unknown character '?'",
    ]
    assert lines == ["" if w in ("", "?") else str(said([w])[0]) for w in data.decode().split("\n")]


def test_the_length_penalty_is_that_of_the_run(said):
    for word in ("ab", "d", "cab"):
        plain, penalised = (
            dataclasses.replace(said, alpha=alpha)([word], beam=1)[0] for alpha in (0.0, 1.0)
        )
        assert plain.phones == penalised.phones
        length = min(len(plain.phones) + 1, TARGET_LENGTH)  # the end symbol, where there is one
        assert penalised.score == pytest.approx(plain.score / ((5 + length) / 6), rel=1e-5)


def test_the_length_penalty_of_the_call_goes_before_that_of_the_run(said, run, monkeypatch, capsys):
    monkeypatch.setattr(predict_words, "load", lambda *_: said)
    lines = {}
    for alpha in (None, 0.6, 2.0):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\ncab\n")))
        command.run(PredictConfig(run=run, nbest=1, alpha=alpha))
        lines[alpha] = capsys.readouterr().out
    assert lines[None] == lines[0.6] != lines[2.0]


def test_nbest_has_scores_best_first_and_keeps_step(said):
    lines = lines_of(said, b"ab\n?\nB\n", nbest=2)
    assert len(lines) == 6 and lines[2:4] == ["", ""]
    for word, pair in (("ab", lines[:2]), ("b", lines[4:])):
        fields = [line.split("\t") for line in pair]
        assert [len(f) for f in fields] == [3, 3]
        assert [f[0].lower() for f in fields] == [word, word]
        assert 0 > float(fields[0][1]) >= float(fields[1][1])
        assert fields[0][2] != fields[1][2]
        assert fields[0][2] == str(said([word])[0])  # the best of two is the one


def test_a_wider_nbest_widens_the_beam_of_the_run(said):
    lines = lines_of(said, b"ab", nbest=3)
    assert len({line.split("\t")[2] for line in lines}) == 3
    assert [[str(p) for p in one] for one in said.nbest(["ab"], 3, 3)] == [
        [line.split("\t")[2] for line in lines]
    ]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"beam": 1, "nbest": 2}, "nbest=2 must be at most beam=1"),
        ({"beam": 0}, "beam=0 must be at least 1"),
        ({"nbest": -1}, "nbest=-1 must be at least 1"),
    ],
)
def test_impossible_flags(flags, why):
    with pytest.raises(ValueError, match=why):
        PredictConfig(**flags)


def test_nbest_beyond_the_beam_is_an_error_from_python_too(said):
    with pytest.raises(ValueError, match="nbest=3 .* beam=2"):
        said.nbest(["ab"], 3, 2)
    with pytest.raises(UnpronounceableError, match="unknown character 'x'"):
        said(["ab", "xb"])


def test_cross_attention_is_a_distribution_over_the_letters(said):
    weights = said.cross_attention("abc", ("K", "AA"))
    assert weights.shape == (1, 2, 3, 4)  # layers, heads, sounds and letters with their ends
    assert weights.sum(-1) == pytest.approx(1.0, abs=1e-5)


def test_cross_attention_is_that_of_writing_each_sound(said):
    # Row i is where the decoder looks while it writes sound i, having read <s> and those before.
    source, target = jnp.array([LETTERS.encode("abc")]), jnp.array([[BOS, 5, 3]])
    assert PHONES.encode(["K", "AA"])[:2] == [5, 3]
    _, weights = said.model.apply({"params": said.params}, source, target, return_weights=True)
    found = said.cross_attention("abc", ("K", "AA"))
    np.testing.assert_allclose(found, weights["cross"][:, 0], rtol=1e-5)


# ---- loading


@pytest.fixture
def run(tmp_path, said):
    """A run folder with this model, as a run leaves it."""
    config = PronounceConfig(
        run=tmp_path, source_length=SOURCE_LENGTH, target_length=TARGET_LENGTH, beam=BEAM,
        model=MODEL,
    )  # fmt: skip
    write_json(tmp_path / "config.json", plain(config))
    return tmp_path


def test_a_saved_model_loads_and_says_the_same(run, said):
    with Checkpoints(run / "checkpoints") as checkpoints:
        moments, key = {"count": jnp.int32(3)}, jax.random.PRNGKey(0)
        vocabularies = {"letters": LETTERS.to_json(), "phones": PHONES.to_json()}
        identity = json.loads((run / "config.json").read_text()) | {"vocabularies": vocabularies}
        state = TrainState(jnp.int32(3), said.params, moments, key)
        checkpoints.save(3, state, {"identity": identity})
    loaded = load(run)
    words = ["ab", "cab", "éd"]
    assert [p.phones for p in loaded(words)] == [p.phones for p in said(words)]
    fields = {f.name for f in dataclasses.fields(said)} - {"params"}
    assert {f: getattr(loaded, f) for f in fields} == {f: getattr(said, f) for f in fields}

    small = load(run, int8=True)
    assert isinstance(small.params["encoder_0"]["feed_forward"]["w1"], Quantized)
    for one, other in zip(small(words), said(words), strict=True):
        assert one.score == pytest.approx(other.score, rel=0.1) and one.score != other.score


def test_a_missing_folder_is_named_and_not_made(tmp_path):
    with pytest.raises(RunFolderError, match=r"absent.*config\.json"):
        load(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_folder_without_a_checkpoint_is_named(run):
    with pytest.raises(RunFolderError, match="no checkpoint"):
        load(run)


def test_reading_makes_no_folder(run):
    with pytest.raises(RunFolderError):
        load(run)
    assert not (run / "checkpoints").exists()


def test_the_former_place_of_load_goes_on_working(monkeypatch):
    monkeypatch.delitem(sys.modules, "experiments.pronouncer", raising=False)
    with pytest.warns(FutureWarning, match=r"is experiments\.inference\.pronouncer now"):
        former = importlib.import_module("experiments.pronouncer")
    assert former.load is pronouncer.load
