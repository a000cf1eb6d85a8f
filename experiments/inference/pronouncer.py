"""A trained pronouncer: words in, pronunciations out."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.checkpoints.run_folder import RunFolder, RunFolderError
from experiments.checkpoints.trained import newest_model
from experiments.data.pronunciations import padded
from experiments.data.vocabulary import BOS, EOS, PAD, Vocabulary
from experiments.errors import UserError
from tfm.decoding import Decoded, beam_search, start_decoding
from tfm.kernels.quantization import quantize
from tfm.model import Transformer

SHOWN = 60  # characters of a word in a message
ROWS = 512  # words decoded together: one static shape, so one compilation


class UnpronounceableError(UserError):
    """Why a word cannot be pronounced."""


@dataclasses.dataclass(frozen=True)
class Pronunciation:
    """One hypothesis and its score, ln P / lp(n) (`tfm.decoding.beam_search`)."""

    phones: tuple[str, ...]
    score: float

    def __str__(self) -> str:
        return " ".join(self.phones)


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _decode(
    model: Transformer,
    params: chex.ArrayTree,
    source: jax.Array,
    beam: int,
    length: int,
    alpha: float,
) -> Decoded:
    model_step, cache = start_decoding(model, params, source, beam, length)

    def step(tokens, index, cache):
        logits, cache = model_step(tokens, index, cache)
        # A model that has learned little may say padding or start, which are no sounds.
        return logits.at[..., jnp.array([PAD, BOS])].set(-jnp.inf), cache

    return beam_search(step, cache, bos=BOS, eos=EOS, max_length=length, alpha=alpha)


@partial(jax.jit, static_argnums=0)
def _cross_attention(model, params, source, target):
    _, weights = model.apply({"params": params}, source, target, return_weights=True)
    return weights["cross"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pronouncer:
    """A model with its vocabularies and the lengths that it was trained for."""

    model: Transformer
    params: chex.ArrayTree
    letters: Vocabulary
    phones: Vocabulary
    source_length: int
    target_length: int
    beam: int
    alpha: float

    def encode(self, word: str) -> list[int]:
        """The ids of a word's letters, case folded.

        Raises UnpronounceableError: no letters, a letter that the vocabulary lacks, or too many.
        """
        folded = word.lower()
        if not folded:
            raise UnpronounceableError("empty line")
        shown = repr(word) if len(word) <= SHOWN else f"{word[:SHOWN]!r}…"
        unknown = [letter for letter in folded if letter not in self.letters.symbols]
        if unknown:
            raise UnpronounceableError(f"{shown}: unknown character {unknown[0]!r}")
        ids = self.letters.encode(folded)
        if len(ids) > self.source_length:
            raise UnpronounceableError(
                f"{shown}: {len(folded)} letters, more than the {self.source_length - 1} "
                "that the model was trained for"
            )
        return ids

    def nbest(
        self, words: Sequence[str], n: int, beam: int | None = None
    ) -> list[list[Pronunciation]]:
        """The n best pronunciations of each word, best first.

        Raises UnpronounceableError for the first word that cannot be encoded; ValueError for
        n > beam.
        """
        beam = max(n, self.beam) if beam is None else beam
        if not 1 <= n <= beam:
            raise ValueError(f"nbest={n} must be at least 1 and at most beam={beam}")
        encoded = [self.encode(word) for word in words]
        # Words of one length end at about one step, and a batch stops when its last word has ended.
        order = sorted(range(len(words)), key=lambda i: len(encoded[i]))
        results: list[list[Pronunciation]] = [[]] * len(words)
        for start in range(0, len(words), ROWS):
            chosen = order[start : start + ROWS]
            # Copies fill the last batch: rows of padding would babble on to the length limit.
            filled = chosen + [chosen[-1]] * (ROWS - len(chosen))
            source = padded([encoded[i] for i in filled], self.source_length, ROWS)
            decoded = _decode(self.model, self.params, source, beam, self.target_length, self.alpha)
            tokens, scores = jax.device_get((decoded.tokens[:, :n], decoded.scores[:, :n]))
            for i, ids, row in zip(chosen, tokens, scores, strict=False):
                results[i] = [
                    Pronunciation(tuple(self.phones.decode(hypothesis)), float(score))
                    for hypothesis, score in zip(ids, row, strict=True)
                ]
        return results

    def __call__(self, words: Sequence[str], beam: int | None = None) -> list[Pronunciation]:
        """The best pronunciation of each word; raises as `nbest`."""
        return [best for (best,) in self.nbest(words, 1, beam)]

    def cross_attention(self, word: str, phones: Sequence[str]) -> np.ndarray:
        """[N, H, sounds, letters], end symbols included: where each head looks at each sound."""
        source, labels = self.encode(word), self.phones.encode(phones)
        rows = np.array([source], np.int32), np.array([[BOS, *labels[:-1]]], np.int32)
        return np.asarray(_cross_attention(self.model, self.params, *rows))[:, 0]


def load(run: str | Path, int8: bool = False, functions: str | None = None) -> Pronouncer:
    """The trained model of a run folder, config and vocabularies as its checkpoint has them; with
    `int8` its matrices in 8 bits. `functions`: the FILE:NAME of those that it was trained with.

    A damaged checkpoint is named on standard error, and the one before it taken.

    Raises RunFolderError naming what is missing: no such run, or nothing saved in it;
    CheckpointError where all that was saved is damaged.
    """
    folder = RunFolder(Path(run))
    if folder.read("config.json") is None:
        raise RunFolderError(f"{run}: not the folder of a run (no config.json)")
    config, model, params = newest_model(folder, functions)
    params = quantize(params) if int8 else params
    return Pronouncer(
        model=model,
        params=params,
        letters=Vocabulary.from_json(config["vocabularies"]["letters"]),
        phones=Vocabulary.from_json(config["vocabularies"]["phones"]),
        source_length=config["source_length"],
        target_length=config["target_length"],
        beam=config["beam"],
        alpha=config["alpha"],
    )
