"""--functions FILE:NAME: a user's modules are trained, resumed, evaluated, reported and served."""

import io
import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.functions import FunctionsError, load_functions, make_model
from experiments.inference import predict
from experiments.inference.predict_config import PredictConfig
from experiments.inference.saved import load
from experiments.pronounce.task import PronounceConfig, run
from tfm.config import TransformerConfig

FILE = """
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import tfm


class RMSNorm(nn.Module):
    config: tfm.TransformerConfig

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


RMS = tfm.Functions(layer_norm=RMSNorm)
OTHER = tfm.Functions()
NARROW = tfm.Functions(layer_norm=lambda x, scale, bias, epsilon: x[..., 1:])
NUMBER = 3
"""
MODEL = TransformerConfig(
    vocab_size=42, source_vocab_size=30, d_model=8, d_ff=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1,
)  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    load_functions.cache_clear()
    return path


@pytest.fixture
def config(tmp_path, file):
    words = ["ab", "abc", "bcd", "cab", "dab", "bad", "cad", "dac", "bac", "adb", "acb", "dcb"] * 2
    lexicon = tmp_path / "words.tsv"
    lexicon.write_text("".join(f"{w}{i}\tAA {w[0].upper()}\n" for i, w in enumerate(words)))
    return PronounceConfig(
        run=tmp_path / "run", train_file=lexicon, valid_file=lexicon, model=MODEL, steps=4,
        save_every=2, evaluate_every=4, log_every=2, rows=2, warmup_steps=2, beam=2,
        functions=f"{file}:RMS",
    )  # fmt: skip


def state_of(config):
    params = load(config.run, functions=config.functions).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


@pytest.mark.usefixtures("compiled_once")
def test_a_user_s_module_goes_through_the_whole_run(config, file, tmp_path, monkeypatch, capsys):
    run(replace(config, steps=2, schedule="paper"))
    load_functions.cache_clear()
    run(replace(config, schedule="paper"))  # goes on
    whole = replace(config, run=tmp_path / "whole", schedule="paper")
    run(whole)
    assert json.loads((config.run / "resumed_from.json").read_text())["steps"] == [2]
    resumed, uncut = state_of(config), state_of(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, uncut)
    assert not any("bias" in name and "norm" in name for name in resumed)

    results = json.loads((config.run / "results.json").read_text())
    assert results["parameters"] == sum(x.size for x in resumed.values())
    assert (config.run / "report.html").exists()
    recorded = json.loads((config.run / "config.json").read_text())["functions_of"]
    assert recorded["name"] == "RMS" and len(recorded["sha256"]) == 64

    stdin = io.TextIOWrapper(io.BytesIO(b"abc\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    capsys.readouterr()
    predict.run(PredictConfig(run=config.run, functions=config.functions))
    assert capsys.readouterr().out.count("\n") == 1

    # Of a folder nothing is run: the file is given each time, and must be the same.
    with pytest.raises(FunctionsError, match=r"RMS of a file with the SHA-256.*--functions FILE:"):
        load(config.run)
    with pytest.raises(FunctionsError, match="name: 'RMS' -> 'OTHER'"):
        load(config.run, functions=f"{file}:OTHER")
    longer = replace(config, schedule="paper", steps=6)
    with pytest.raises(FunctionsError, match=r"a copy is .*functions\.py.*--functions FILE:RMS"):
        run(replace(longer, functions=None))
    file.write_text(FILE + "\n# changed\n")
    load_functions.cache_clear()
    with pytest.raises(FunctionsError, match="sha256: "):
        load(config.run, functions=config.functions)
    with pytest.raises(FunctionsError, match=r"another now; that of then is .*functions\.py"):
        run(longer)
    assert (config.run / "functions.py").read_text() == FILE
    moved = file.rename(tmp_path / "elsewhere.py")  # its contents count, not its place
    moved.write_text(FILE)
    load(config.run, functions=f"{moved}:RMS")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("mine.py", ["FILE:NAME"]),
        ("none.py:RMS", ["none.py", "No such file"]),
        ("mine.py:RMSNorm", ["mine.py", "RMSNorm", "RMS, OTHER, NARROW"]),
        ("mine.py:NUMBER", ["mine.py", "NUMBER is 3"]),
        ("mine.py:NARROW", ["mine.py", "encoder_0/attention_norm", "7)", "8)"]),
    ],
)
def test_what_does_not_fit_is_named_before_time_is_spent(config, tmp_path, given, words):
    """Nothing is written."""
    with pytest.raises(FunctionsError) as caught:
        run(replace(config, functions=str(tmp_path / given)))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not config.run.exists()


@pytest.mark.parametrize(("line", "words"), [("RMS = nothing", ["line 1", "NameError"]),
                                             ("RMS = (", ["line 1", "SyntaxError"])])  # fmt: skip
def test_an_error_in_the_file_is_told_with_its_line(file, line, words):
    file.write_text(line)
    with pytest.raises(FunctionsError) as caught:
        make_model(MODEL, f"{file}:RMS")
    assert all(word in str(caught.value) for word in ["mine.py", *words])


def test_a_module_beside_the_file_is_not_found_in_the_working_folder_either(tmp_path, monkeypatch):
    """It would change what the file does, and not its SHA-256."""
    (tmp_path / "lies_beside.py").write_text("EPSILON = 1e-6\n")
    (tmp_path / "mine.py").write_text("import tfm\nimport lies_beside\nMINE = tfm.Functions()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FunctionsError, match=r"mine\.py, line 2: .*'lies_beside'.*itself"):
        load_functions("mine.py:MINE")
    import lies_beside  # noqa: F401 (all others find it)
