"""Each setting in which a variant differs really changes what is computed."""

import dataclasses
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reporting.variants import MEANS, VariantsConfig, differing, run, settings
from tfm import Transformer, label_smoothed_cross_entropy
from tfm.config import BASE
from tfm.decoding import length_normalized_score
from tfm.training import param_shapes
from tfm.variants import VARIANTS

SMALL = {
    "vocab_size": 11, "d_model": 8, "d_ff": 12, "num_heads": 2, "num_encoder_layers": 1,
    "num_decoder_layers": 1, "dropout_rate": 0.0,
}  # fmt: skip
SOURCE, TARGET = jnp.array([[3, 5, 2, 8, 4]]), jnp.array([[1, 9, 4, 2]])


def small(config):
    vocabulary = None if config.source_vocab_size is None else 11
    return replace(config, **SMALL, source_vocab_size=vocabulary)


def logits(config, key=None):
    """With parameters that depend on their names and shapes alone."""

    def fill(path, leaf):
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return jnp.float32(np.random.default_rng(seed).standard_normal(leaf.shape))

    params = jax.tree_util.tree_map_with_path(fill, param_shapes(config))
    return Transformer(config).apply({"params": params}, SOURCE, TARGET, dropout_key=key)


MODEL_FIELDS = {field.name for field in dataclasses.fields(BASE)}
CHANGES = [
    (variant, name)
    for variant in VARIANTS
    for name in differing([VARIANTS["paper"], VARIANTS[variant]])
    if name in MODEL_FIELDS
]


@pytest.mark.parametrize(("variant", "name"), CHANGES)
def test_a_setting_of_the_model_changes_its_logits(variant, name):
    value = getattr(small(VARIANTS[variant].model), name)
    paper = small(BASE)
    key = jax.random.PRNGKey(0) if "dropout" in name else None  # the others act without one too
    size = 1e-6 if name == "layer_norm_epsilon" else 1e-3
    assert not np.allclose(logits(replace(paper, **{name: value}), key), logits(paper, key),
                           rtol=0, atol=size)  # fmt: skip


def test_settings_of_loss_and_beam_change_them():
    z, label = jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array(2)
    losses = {
        variant.smoothed_over: float(
            label_smoothed_cross_entropy(z, label, variant.smoothing, variant.smoothed_over)
        )
        for variant in VARIANTS.values()
    }
    assert len(losses) == len(set(losses.values())) == 3
    scores = {
        (v.alpha, v.penalty): float(length_normalized_score(-6.0, 9, v.alpha, v.penalty))
        for v in VARIANTS.values()
    }
    assert len(scores) == len(set(scores.values())) == 3
    assert scores[0.0, "paper"] == -6.0  # no penalty


def test_every_difference_is_explained():
    assert set(differing(list(VARIANTS.values()))) == set(MEANS)
    assert all(variant.read for variant in VARIANTS.values())


def test_the_paper_is_the_default_and_differs_from_itself_in_nothing():
    assert settings(VARIANTS["paper"]).items() >= dataclasses.asdict(BASE).items()
    assert differing([VARIANTS["paper"]] * 2) == {}


@pytest.mark.parametrize("columns", [80, 120])
def test_what_differs_is_told_and_nothing_else_with_no_word_broken(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    run(VariantsConfig("paper", "marian"))
    told = capsys.readouterr().out
    assert re.search(r"activation\n.*\n  paper +relu *\n  marian +swish", told)
    assert "norm_placement" not in told  # both are post-LN
    run(VariantsConfig())
    told = capsys.readouterr().out
    values = [str(v) for found in differing(list(VARIANTS.values())).values() for v in found]
    words = " ".join([*VARIANTS, *MEANS, *MEANS.values(), *values])
    assert set(words.replace(",", " ").split()) <= set(told.replace(",", " ").split())
    assert max(map(len, told.splitlines())) <= columns
