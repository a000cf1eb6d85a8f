"""Translators over a little language, hardly trained: what they say is noise, the form is not."""

import dataclasses
import random

import jax
import numpy as np
import optax
import pytest

from experiments.data.pronunciations import padded
from experiments.data.subwords import Subwords, train_subwords
from experiments.inference.batches import Batching
from experiments.inference.predictor import Predictor, Settings
from tfm.config import TransformerConfig
from tfm.model import Transformer
from tfm.training import init_params, summed_loss

WORDS = ["the", "cat", "dog", "sees", "a", "bird", "small", "old", "tree", "house", "runs", "home"]
SIZE = 285
STEPS = 160  # of training


def some_text(lines, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(lines)]


@pytest.fixture(scope="session")
def subwords():
    """A vocabulary of our own: padding, start, end and unknown are 0, 1, 2, 3."""
    return train_subwords(some_text(300), SIZE)


@pytest.fixture(scope="session")
def rolled(subwords):
    """The same pieces as an import numbers them: start and padding are 0, the end is 1."""
    pieces = ("<pad>", "</s>", "<unk>", *subwords.pieces[4:])
    return Subwords(subwords.model, pieces, bos=0, eos=1, unk=2)


CONFIG = TransformerConfig(
    vocab_size=SIZE, d_model=32, d_ff=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=2,
    dropout_rate=0.0, positions="learned", max_learned_positions=64,
)  # fmt: skip
FEW_ROWS = Batching(rows=4)  # so that a handful of sentences takes several batches
SETTINGS = Settings(source_length=16, target_length=24, beam=3)
REVERSED = dict(zip(WORDS, WORDS[::-1], strict=True))


def batch_of(vocabulary, rng, rows=32):
    """Sentences, and for each of their words another one."""
    texts = some_text(rows, rng.random())
    sides = texts, [" ".join(REVERSED[word] for word in text.split()) for text in texts]
    source, target = (padded(vocabulary.encode_all(side), 24, rows) for side in sides)
    batch = {"source": source, "target": target}
    for side, ids in (("source", source), ("target", target)):
        batch |= {
            f"{side}_segment_ids": (ids != 0).astype("int32"),
            f"{side}_positions": np.broadcast_to(np.arange(24), ids.shape),
        }
    return batch


@pytest.fixture(scope="session")
def trained(subwords):
    """Parameters that have learned a little: their texts end, and are seldom right."""
    model, adam, rng = Transformer(CONFIG), optax.adam(3e-3), random.Random(0)

    def loss(params, batch):
        total, tokens = summed_loss(model, params, batch, subwords.bos, 0.1)
        return total / tokens

    @jax.jit
    def update(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        changes, state = adam.update(gradient, state)
        return optax.apply_updates(params, changes), state, value

    params = init_params(model, jax.random.PRNGKey(0))
    state = adam.init(params)
    for _ in range(STEPS):
        params, state, value = update(params, state, batch_of(subwords, rng))
    return params


@pytest.fixture(scope="session")
def translator(subwords, trained):
    return Predictor(Transformer(CONFIG), trained, subwords, subwords, SETTINGS, batching=FEW_ROWS)


@pytest.fixture(scope="session")
def imported(rolled, trained):
    """The same model, which starts with padding's id."""
    params = trained | {"embedding": trained["embedding"][1:]}
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=SIZE - 1))
    settings = dataclasses.replace(SETTINGS, penalty="power", alpha=1.0)
    return Predictor(model, params, rolled, rolled, settings, batching=FEW_ROWS)
