import dataclasses
import itertools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from docs.scripts import translation_peer  # noqa: E402
from docs.scripts.torch_translation import bucketed, train  # noqa: E402
from experiments.inference.saved import load  # noqa: E402
from experiments.training.fitting import make_valid_loss  # noqa: E402
from experiments.training.placement import Layout  # noqa: E402
from experiments.translate import task as translate  # noqa: E402
from experiments.translate.config import TranslateConfig, configured  # noqa: E402
from tfm.parallel.mesh import MeshConfig  # noqa: E402

ENGLISH = ("one", "two", "three", "four", "five", "six", "seven")
GERMAN = ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben")


def write_text(folder):
    """{part: paths} of numbers in English and German."""
    rng, parts = np.random.default_rng(0), {}
    for part, count in (("train", 300), ("valid", 30), ("test", 20)):
        rows = [rng.integers(0, 7, rng.integers(3, 9)) for _ in range(count)]
        parts[part] = folder / f"{part}.en", folder / f"{part}.de"
        for path, words in zip(parts[part], (ENGLISH, GERMAN), strict=True):
            path.write_text("".join(" ".join(words[i] for i in row) + "\n" for row in rows))
    return parts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a finished run, its flags that name text)"""
    folder = tmp_path_factory.mktemp("peer")
    texts = write_text(folder)
    fields = configured("small", "paper")
    fields["model"] = dataclasses.replace(
        fields["model"], d_model=32, d_ff=64, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    fields |= {"steps": 2, "rows": 4, "source_length": 48, "target_length": 48, "warmup_steps": 1,
               "learning_rate": 3e-3, "evaluated": 5, "beam": 2}  # fmt: skip
    translate.run(TranslateConfig(run=folder / "run", **fields, **texts))
    return folder / "run", ["--valid", *texts["valid"], "--test", *texts["test"]]


def test_batches_hold_each_pair_once_within_their_slots():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, (500, 2))
    lengths[7] = 64, 3  # alone too much for a batch of others
    batches = bucketed(lengths, (64, 48), rng)
    assert sorted(itertools.chain(*batches)) == list(range(500))
    filled = [len(b) * lengths[b].max(0) for b in batches]
    assert (np.array(filled) <= (64, 48)).all()
    assert np.mean([(f / (64, 48)).max() for f in filled]) > 0.85


class Learner:
    """In the place of one that computes: takes no time, and keeps the rates it is given."""

    def __init__(self, config):
        self.config, self.rates, self.model = config, [], torch.nn.Linear(1, 1, bias=False)

    def step(self, batch, rate):
        self.rates.append(rate)
        torch.nn.init.constant_(self.model.weight, len(self.rates))
        return 0.0


def test_the_clock_stands_still_in_evaluations_and_the_best_weights_stay(tmp_path, monkeypatch):
    now = 0.0

    def ticking():
        nonlocal now
        now += 0.5  # a step reads the clock twice
        return now

    def valid_loss(model):
        nonlocal now
        now += 1000
        return (model.weight.item() - 6) ** 2  # the lowest after 6 steps

    monkeypatch.setattr("time.perf_counter", ticking)
    learner = Learner(TranslateConfig(steps=100, warmup_steps=50, learning_rate=1.0))
    batch = torch.tensor([[1, 2, 0]]), torch.tensor([[2]])
    best = tmp_path / "best.safetensors"
    facts = train(learner, itertools.repeat(batch), valid_loss, 10.0, 1.5, best)
    assert (facts["steps"], facts["train_seconds"], facts["tokens"]) == (20, 10.0, [40, 20])
    assert facts["share_of_slots"] == 0.75
    assert [line["steps"] for line in facts["curve"]] == [3, 6, 9, 12, 15, 18, 20]
    assert translation_peer.load_file(best)["weight"].tolist() == [[6.0]]
    # Warm-up in half of the time, as in half of the run's steps; then down to almost 0.
    assert learner.rates[0] == 0 and np.argmax(learner.rates) == 10
    assert learner.rates[5] == pytest.approx(0.5) and learner.rates[-1] < 0.05


@pytest.mark.slow
def test_a_peer_learns_and_its_import_computes_the_same(run, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # threads that wait take turns badly
    folder, texts = run
    out = folder.parent / "out"
    flags = ["--run", folder, *texts, "--minutes", "0.1", "--evaluate-minutes", "0.05"]
    translation_peer.main([str(flag) for flag in [*flags, "--out", out]])
    results = json.loads((out / "results.json").read_text())
    losses = [line["valid_loss"] for line in results["curve"]]
    assert len(losses) == 2 and losses[1] < losses[0] < np.log(load(out).target.size)
    assert results["import_disagreement"] < 1e-4
    assert "tok:13a" in results["scores"]["test"]["bleu"]["signature"]
    assert results["test_bleu"] == results["scores"]["test"]["bleu"]["score"] >= 0
    assert results["steps_per_second"][results["mode"]] == max(results["steps_per_second"].values())
    assert 6 <= results["train_seconds"] < 8 and results["run"]["steps"] == 2
    # Our own validation loss of what was imported is what torch said it was.
    peer, ours = load(out), load(folder)
    assert peer.model.config.has_final_norm and peer.model.config.projection_bias
    read = translation_peer.read(folder, {"valid": texts[1:3], "test": texts[4:]})
    examples = [
        {"source": np.array(s, np.int32), "target": np.array(t, np.int32)}
        for s, t in read.encoded()
    ]
    config = dataclasses.replace(read.config, model=peer.model.config)
    layout = Layout(MeshConfig(1), config.model, config.rows)
    valid_loss = make_valid_loss(config, examples, ours.target.bos, layout)
    assert valid_loss(peer.params) == pytest.approx(min(losses), abs=1e-4)


@pytest.mark.slow
def test_what_the_peer_cannot_match_is_refused(run, capsys, monkeypatch):
    folder, texts = run

    def refused(*flags):
        with pytest.raises(SystemExit, match="2"):
            translation_peer.main([str(flag) for flag in ["--run", folder, *flags]])
        return capsys.readouterr().err.splitlines()[-1]

    out = ["--out", folder.parent / "none"]
    swapped = ["--valid", *texts[1:3], "--test", *texts[1:3], *out]
    assert "valid.de: not the test text of" in refused(*swapped)
    assert "--minutes -1.0 must be positive" in refused(*texts, *out, "--minutes", "-1")
    assert "run: File exists" in refused(*texts, "--out", folder)
    monkeypatch.setitem(translation_peer.NEEDED, "activation", "gelu")
    assert "activation='relu', and the peer is of 'gelu' alone" in refused(*texts, *out)
    assert not (folder.parent / "none").exists()
