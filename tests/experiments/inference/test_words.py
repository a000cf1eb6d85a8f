"""The same stack with words, of an untrained model: what it says is noise, the form is not."""

import dataclasses
import importlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

from experiments.checkpoints.checkpoint import Checkpoints
from experiments.checkpoints.run_folder import RunFolderError, plain, write_json
from experiments.data.tokenizer import InputError, Symbols
from experiments.data.vocabulary import BOS, Vocabulary
from experiments.inference import predict, score
from experiments.inference.batches import WORDS
from experiments.inference.ensemble import ensemble
from experiments.inference.predict_config import PredictConfig
from experiments.inference.predictor import Predictor, Settings
from experiments.inference.saved import load
from experiments.inference.score import ScoreConfig
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
SETTINGS = Settings(source_length=7, target_length=6, beam=2, alpha=0.6)
FEW_ROWS = dataclasses.replace(WORDS, rows=4)  # so that a handful of words takes several batches


@pytest.fixture(scope="module")
def pronouncer():
    """An untrained one, made once: so the beams that the tests use compile once."""
    state = init_state(Transformer(MODEL), make_optimizer(lambda _: 0.1, 1.0), jax.random.key(3))
    # A trained model never says <pad> or <s>, nor nothing: let the untrained one seldom end.
    params = state.params | {"output_bias": jnp.array([-99.0, -99.0, -1.0, 0, 0, 0, 0])}
    sides = Symbols(LETTERS), Symbols(PHONES, spaced=True)
    return Predictor(Transformer(MODEL), params, *sides, SETTINGS, batching=FEW_ROWS)


@pytest.fixture
def run(tmp_path, pronouncer):
    """A run folder with this model, as a run leaves it."""
    config = PronounceConfig(
        run=tmp_path, source_length=SETTINGS.source_length, beam=SETTINGS.beam, model=MODEL,
        target_length=SETTINGS.target_length,
    )  # fmt: skip
    write_json(tmp_path / "config.json", plain(config))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        moments, key = {"count": jnp.int32(3)}, jax.random.PRNGKey(0)
        vocabularies = {"letters": LETTERS.to_json(), "phones": PHONES.to_json()}
        identity = json.loads((tmp_path / "config.json").read_text())
        identity |= {"vocabularies": vocabularies}
        state = TrainState(jnp.int32(3), pronouncer.params, moments, key)
        checkpoints.save(3, state, {"identity": identity})
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """(output lines, what was said of lines) of a command with bytes on standard input."""

    def called(command, config, data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        command(config)
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if "no end" not in line]
        return out.split("\n")[:-1], said

    return called


@pytest.fixture
def say(call, run):
    """The same of predict."""
    return lambda data, **flags: call(predict.run, PredictConfig(run=run, **flags), data)


# ---- line for line


def test_one_line_for_each_line_and_the_reason_for_an_empty_one(say, pronouncer):
    data = b"ab\n\nABBA\r\nxab\n\xff\n\xc3\x89a\nabcdabc\n  cab \t\nabcdab"
    lines, said = say(data)
    words = ["ab", None, "ABBA", None, None, "Éa", None, "cab", "abcdab"]
    expected = dict(zip(words, pronouncer([word or "a" for word in words]), strict=True))
    assert lines == ["" if word is None else expected[word] for word in words]
    assert all(expected[word] for word in ("ab", "ABBA"))
    assert expected["ABBA"] == pronouncer(["abba"])[0]
    assert said == [
        "line 4: 'xab': unknown character 'x'",
        "line 5: invalid UTF-8",
        "line 7: 8 tokens, more than the 7 that the model was trained for (see --long split)",
        "3 lines left empty",
    ]


def test_a_word_too_long_to_show_is_cut(say):
    lines, said = say(b"ab\n" + b"?" * 200 + b"\n")
    assert lines[0] and lines[1:] == [""]
    assert said[0] == f"line 2: '{'?' * 60}'…: unknown character '?'"


def test_order_does_not_depend_on_lengths_or_batches(pronouncer):
    words = [w * n for n in (3, 1, 2) for w in ("a", "b", "ab", "d")]
    assert pronouncer(words) == [pronouncer([word])[0] for word in words]


def test_nbest_has_the_words_and_scores_best_first_and_keeps_step(say, pronouncer):
    lines, _ = say(b"ab\n?\nB\n", nbest=2)
    assert len(lines) == 6 and lines[2:4] == ["\t\t"] * 2  # the columns of the others
    for word, pair in (("ab", lines[:2]), ("B", lines[4:])):
        fields = [line.split("\t") for line in pair]
        assert [f[0] for f in fields] == [word, word]
        assert 0 > float(fields[0][1]) >= float(fields[1][1])
        assert fields[0][2] != fields[1][2]
        assert fields[0][2] == pronouncer([word])[0]  # the best of two is the one
    wide, _ = say(b"ab", nbest=3)  # wider than the beam of the run
    assert [line.split("\t")[2] for line in wide] == [
        h.text for h in pronouncer.nbest(["ab"], 3, 3)[0]
    ]


def test_the_length_penalty_is_that_of_the_run_or_of_the_call(pronouncer, say):
    for word in ("ab", "d", "cab"):
        free, penalised = (
            pronouncer.nbest([word], beam=1, alpha=alpha)[0][0] for alpha in (0.0, 1.0)
        )
        assert free.ids == penalised.ids
        length = len(free.ids)
        assert penalised.score == pytest.approx(free.score / ((5 + length) / 6), rel=1e-5)
    lines = {alpha: say(b"ab\ncab\n", nbest=1, alpha=alpha)[0] for alpha in (None, 0.6, 2.0)}
    assert lines[None] == lines[0.6] != lines[2.0]


def test_a_beam_wider_than_what_is_possible_gives_what_is_possible(pronouncer, say):
    """With one token of room there are the end and four sounds, and no seventh answer."""
    short = dataclasses.replace(SETTINGS, target_length=1)
    (best,) = dataclasses.replace(pronouncer, settings=short).nbest(["ab"], 7)
    assert len({h.ids for h in best}) == len(best) == 5
    assert all(np.isfinite(h.score) for h in best)


# ---- what sentences have, words have too


def log_probs(pronouncer, word, target):
    """ln P of each token of a pronunciation, by one call of the model."""
    source, ids = LETTERS.encode(word), PHONES.encode(target.split())
    inputs = jnp.array([[BOS, *ids[:-1]]])
    logits = pronouncer.model.apply({"params": pronouncer.params}, jnp.array([source]), inputs)
    table = nn.log_softmax(logits[0].at[:, jnp.array([0, BOS])].set(-jnp.inf))
    return np.asarray(table)[np.arange(len(ids)), ids]


def test_given_pronunciations_are_scored(pronouncer, call, run):
    pairs = [("abc", "AA B K"), ("d", "D")]
    for (word, target), scored in zip(pairs, pronouncer.score(pairs), strict=True):
        assert scored.log_probs == pytest.approx(log_probs(pronouncer, word, target), abs=1e-5)
    lines, said = call(
        score.run, ScoreConfig(run=run, per_token=True), b"abc\tAA B K\nd\tX\nd\tD\n"
    )
    assert said == ["line 2: 'X': unknown symbol 'X'", "1 line left empty"]
    assert lines[0].split("\t")[1:3] == ["4", "AA B K </s>"] and lines[1] == ""
    assert float(lines[2].split("\t")[0]) == pytest.approx(
        log_probs(pronouncer, *pairs[1]).sum(), abs=1e-5
    )


def test_pronunciations_begin_with_their_prefixes(pronouncer, say, tmp_path):
    found = pronouncer(["abc", "d"], prefixes=["K D", ""])
    assert found[0].startswith("K D ") and found[1] == pronouncer(["d"])[0]
    (tmp_path / "prefixes").write_text("K D\n\nQ\n")
    lines, said = say(b"abc\nd\nd\n", prefix=tmp_path / "prefixes")
    assert lines == [*found, ""]
    assert said == ["line 3: prefix 'Q': unknown symbol 'Q'", "1 line left empty"]


def test_samples_ensembles_and_alignments(pronouncer, say, run):
    drawn = pronouncer.sample(["abc", "d"], 2, seed=3)
    lines, _ = say(b"abc\nd\n", sample=True, seed=3, nbest=2)
    again = pronouncer.sample(["abc", "d"], 2, seed=3, lines=[1, 2])
    assert [line.split("\t")[2] for line in lines] == [h.text for two in again for h in two]
    assert len({h.text for two in drawn for h in two}) > 1
    assert ensemble([("a", pronouncer)] * 2)(["abc"]) == pronouncer(["abc"])
    assert say(b"abc\n", ensemble=(run,))[0] == pronouncer(["abc"])
    (line,), _ = say(b"abc\n", align=True)
    text, links = line.split("\t")
    assert [int(link.split("-")[1]) for link in links.split()] == [*range(len(text.split()))]
    assert {int(link.split("-")[0]) for link in links.split()} <= {0, 1, 2}


def test_long_words_in_parts(pronouncer, say):
    lines, said = say(b"abcdabcd\n", long="split")
    assert lines == [" ".join(pronouncer(["abcd"]) * 2)] and "translated in parts" in said[0]


def test_what_cannot_be_pronounced_is_an_error_from_python(pronouncer):
    with pytest.raises(InputError, match="'xb': unknown character 'x'"):
        pronouncer(["ab", "xb"])
    with pytest.raises(InputError, match="an empty text"):
        pronouncer([""])


def test_cross_attention_is_that_of_writing_each_sound(pronouncer):
    # Row i is where the decoder looks while it writes sound i, having read <s> and those before.
    source, target = jnp.array([LETTERS.encode("abc")]), jnp.array([[BOS, 5, 3]])
    assert PHONES.encode(["K", "AA"])[:2] == [5, 3]
    variables = {"params": pronouncer.params}
    _, weights = pronouncer.model.apply(variables, source, target, return_weights=True)
    found = pronouncer.cross_attention("abc", "K AA")
    assert found.shape == (1, 2, 3, 4)  # layers, heads, sounds and letters with their ends
    np.testing.assert_allclose(found, weights["cross"][:, 0], rtol=1e-5)
    assert found.sum(-1) == pytest.approx(1.0, abs=1e-5)


# ---- run folders


def test_a_saved_model_loads_and_says_the_same(run, pronouncer):
    loaded = load(run)
    words = ["ab", "cab", "éd"]
    assert loaded(words) == pronouncer(words)
    assert loaded.batching == WORDS
    for name in ("model", "source", "target", "settings"):
        assert getattr(loaded, name) == getattr(pronouncer, name)

    small = load(run, int8=True)
    assert isinstance(small.params["encoder_0"]["feed_forward"]["w1"], Quantized)
    for (one,), (other,) in zip(small.nbest(words), pronouncer.nbest(words), strict=True):
        assert one.score == pytest.approx(other.score, rel=0.1) and one.score != other.score


@pytest.mark.parametrize("read", ["notes", "restore_params"])
def test_a_checkpoint_that_a_training_removes_meanwhile_gives_way_to_the_newer(
    run, pronouncer, monkeypatch, read
):
    original = getattr(Checkpoints, read)

    def removed(self, step, *rest):
        if step == 3:  # as a training does that keeps one
            state = TrainState(jnp.int32(4), pronouncer.params, {}, jax.random.PRNGKey(0))
            with Checkpoints(run / "checkpoints", keep=1) as training:
                training.newest()
                training.save(4, state, {"identity": original_notes["identity"]})
        return original(self, step, *rest)

    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        checkpoints.newest()
        original_notes = checkpoints.notes(3)
    monkeypatch.setattr(Checkpoints, read, removed)
    assert load(run)(["cab"]) == pronouncer(["cab"])
    assert not (run / "checkpoints" / "3").exists()


def test_a_folder_without_a_checkpoint_is_named_and_not_made(tmp_path):
    write_json(tmp_path / "config.json", plain(PronounceConfig(run=tmp_path, model=MODEL)))
    with pytest.raises(RunFolderError, match="no checkpoint"):
        load(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_former_place_of_load_goes_on_working(monkeypatch, run, pronouncer):
    monkeypatch.delitem(sys.modules, "experiments.pronouncer", raising=False)
    with pytest.warns(FutureWarning, match=r"is experiments\.inference now"):
        former = importlib.import_module("experiments.pronouncer")
    (best,) = former.load(run)(["cab"], beam=2)
    ((expected,),) = pronouncer.nbest(["cab"], 1, 2)
    assert (str(best), best.phones) == (expected.text, tuple(expected.text.split()))
    assert best.score == pytest.approx(expected.score, rel=1e-5)
    with pytest.raises(former.UnpronounceableError):
        former.load(run)(["x"])
