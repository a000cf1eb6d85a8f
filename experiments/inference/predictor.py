"""A translation model with its vocabularies: sentences in, translations out."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from experiments.checkpoints.run_folder import RunFolder, RunFolderError, named, plain
from experiments.checkpoints.trained import newest_model, write_final
from experiments.data.subwords import Subwords
from experiments.inference import scoring as given
from experiments.inference.generation import Done, Generator, Job
from experiments.inference.hypotheses import Hypothesis, Scored, best_of_parts, joined
from experiments.inference.search import Group, Mean, Rules, Sampling
from experiments.inference.segmentation import TooLongError, parts_of
from tfm.kernels.quantization import quantize
from tfm.model import Transformer

SHOWN = 60  # characters of a sentence in a message

Long = Literal["refuse", "split"]


def _nobody(count: int) -> None:
    """Whom it does not matter to how many sentences are done."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a model was trained for, and how it is searched where nothing else is asked for."""

    source_length: int
    """Most tokens of a source sentence, its end symbol included."""
    target_length: int
    """Most tokens of a target sentence, its end symbol included."""
    beam: int = 4
    """Beam width."""
    alpha: float = 0.6
    """Exponent α of the length penalty."""
    penalty: Literal["paper", "power"] = "paper"
    """paper: ((5 + n)/6)^α. power: n^α (Marian, fairseq, CTranslate2)."""

    def __post_init__(self) -> None:
        for name in ("source_length", "target_length", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be at least 0 and finite")
        if self.penalty not in ("paper", "power"):
            raise ValueError(f"penalty={self.penalty!r} must be 'paper' or 'power'")


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A model, its parameters, vocabularies and settings; or several models, as an ensemble.

    Padding, and the start symbol, are never generated: all probabilities are those of what can be.

    Raises ValueError where the vocabularies are not of the model's sizes.
    """

    model: Transformer
    params: chex.ArrayTree
    source: Subwords
    target: Subwords
    settings: Settings
    others: tuple["Predictor", ...] = ()
    """The further members of an ensemble, which `ensemble.ensemble` makes."""
    mean: Mean = "log_linear"
    """What an ensemble takes the mean of: log-probabilities, or (linear) probabilities."""

    def __post_init__(self) -> None:
        config = self.model.config
        sizes = {
            "vocab_size": (config.vocab_size, self.target.size),
            "source_vocab_size": (config.source_vocab_size or config.vocab_size, self.source.size),
        }
        for name, (has, pieces) in sizes.items():
            if has != pieces:
                raise ValueError(f"the model has {name}={has}, its vocabulary {pieces} pieces")

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        return Group.of([(one.model, one.params) for one in (self, *self.others)])

    @property
    def _limits(self) -> tuple[int, int]:
        return self.settings.source_length, self.settings.target_length

    def _rules(self, **changes: Any) -> Rules:
        return Rules(self.target.bos, self.target.eos, mean=self.mean, **changes)

    # ---- translating

    def nbest(
        self,
        sentences: Sequence[str],
        n: int = 1,
        beam: int | None = None,
        *,
        alpha: float | None = None,
        prefixes: Sequence[str] | None = None,
        long: Long = "refuse",
        done: Done = _nobody,
    ) -> list[list[Hypothesis]]:
        """The n best translations of each sentence, best first.

        Args:
          beam, alpha: None takes the settings'; of the beam, n where that is more.
          prefixes: what each translation begins with ("" for nothing), in whole pieces.
          long: what becomes of a sentence of more tokens than the model was trained for; split
            translates its `parts`, and joins them with spaces.

        Raises:
          TooLongError: for the first sentence that is too long, or prefix.
          ValueError: n > beam, or not as many prefixes as sentences.
        """
        beam = max(n, self.settings.beam) if beam is None else beam
        if not 1 <= n <= beam:
            raise ValueError(f"nbest={n} must be at least 1 and at most beam={beam}")
        alpha = self.settings.alpha if alpha is None else alpha
        rules = self._rules(hypotheses=beam, alpha=alpha, penalty=self.settings.penalty)
        generate = Generator(self._groups, self.target, *self._limits, rules, n)
        jobs = self._jobs(sentences, prefixes, long, range(len(sentences)))
        found = iter(generate(list(itertools.chain(*jobs)), done))
        return [best_of_parts(list(itertools.islice(found, len(parts))), n) for parts in jobs]

    def __call__(self, sentences: Sequence[str], **options: Any) -> list[str]:
        """The best translation of each sentence; options and errors as `nbest`."""
        return [best.text for (best,) in self.nbest(sentences, **options)]

    def sample(
        self,
        sentences: Sequence[str],
        n: int = 1,
        *,
        seed: int = 0,
        lines: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        prefixes: Sequence[str] | None = None,
        long: Long = "refuse",
        done: Done = _nobody,
    ) -> list[list[Hypothesis]]:
        """n independent samples of each sentence's translation: `tfm.sample`.

        A sample depends on its sentence, the seed and the sentence's number in `lines` (None: 0, 1,
        2, …), not on the other sentences. Prefixes, long and errors as `nbest`.
        """
        rules = self._rules(hypotheses=n, sampling=Sampling(temperature, top_k, top_p))
        generate = Generator(self._groups, self.target, *self._limits, rules, n, seed)
        lines = range(len(sentences)) if lines is None else lines
        jobs = self._jobs(sentences, prefixes, long, lines)
        found = iter(generate(list(itertools.chain(*jobs)), done))
        own = ([next(found) for _ in parts] for parts in jobs)
        return [[joined(parts) for parts in zip(*samples, strict=True)] for samples in own]

    def lengths(self, sentences: Sequence[str]) -> list[int]:
        """The source tokens of each sentence, the end symbol included."""
        return [len(ids) for ids in self.source.encode_all(sentences)]

    def parts(self, sentence: str) -> list[str]:
        """The sentence in parts that are short enough (`long.parts_of`); itself, where it is."""
        return parts_of(sentence, self.lengths, self.settings.source_length)

    def forced(self, prefix: str) -> list[int]:
        """The tokens of a prefix; TooLongError where they leave no room."""
        ids = self.target.encode(prefix)[:-1] if prefix else []
        return self._checked(prefix, ids, self.settings.target_length - 1)

    def _jobs(
        self,
        sentences: Sequence[str],
        prefixes: Sequence[str] | None,
        long: Long,
        lines: Sequence[int],
    ) -> list[list[Job]]:
        """The jobs of each sentence; a prefix is its first part's. Raises as `nbest`."""
        prefixes = [""] * len(sentences) if prefixes is None else prefixes
        if len(prefixes) != len(sentences):
            raise ValueError(f"{len(prefixes)} prefixes do not fit {len(sentences)} sentences")
        jobs, encoded = [], self.source.encode_all(sentences)
        for sentence, ids, prefix, line in zip(sentences, encoded, prefixes, lines, strict=True):
            parts = [ids]
            if long == "refuse":
                self._checked(sentence, ids, self.settings.source_length)
            elif len(ids) > self.settings.source_length:
                parts = self.source.encode_all(self.parts(sentence))
            forced = [self.forced(prefix), *([] for _ in parts[1:])]
            places = zip(parts, forced, strict=True)
            jobs.append([Job(*job, (line, k)) for k, job in enumerate(places)])
        return jobs

    def _checked(self, text: str, ids: list[int], most: int) -> list[int]:
        """`ids`; TooLongError where they are more than `most`."""
        if len(ids) > most:
            shown = repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"
            raise TooLongError(
                f"{shown}: {len(ids)} tokens, more than the {most} that the model was trained for"
            )
        return ids

    # ---- given translations

    def check(self, source: str, target: str) -> None:
        """Raises TooLongError where a side of a pair is too long to be scored."""
        self._encoded([(source, target)])

    def score(
        self, pairs: Sequence[tuple[str, str | Hypothesis]], done: Done = _nobody
    ) -> list[Scored]:
        """The log-probability of each token of given translations of given sentences.

        A hypothesis is scored with the tokens it was made of, a string with the vocabulary's.

        Raises:
          TooLongError: for the first pair with a side that is too long, and is not of parts.
        """
        flat, counts = self._in_parts(pairs)
        encoded = self._encoded(flat)
        found = iter(given.score(self._groups, self._rules(), encoded, self._limits, done))
        return [
            Scored(*(tuple(itertools.chain(*x)) for x in zip(
                *((s.ids, s.log_probs) for s in itertools.islice(found, count)), strict=True
            )))
            for count in counts
        ]  # fmt: skip

    def align(self, pairs: Sequence[tuple[str, str | Hypothesis]]) -> list[list[tuple[int, int]]]:
        """(source piece, target piece) for each target piece (`search.attended`), numbered from 0
        and, where a sentence is of parts, through all of them; end symbols are left out.

        Raises:
          TooLongError: as `score`.
        """
        flat, counts = self._in_parts(pairs)
        encoded = self._encoded(flat)
        places = given.align(self._groups, self._rules(), encoded, self._limits)
        found = zip(encoded, places, strict=True)
        eos = self.target.eos
        return [given.numbered_through(list(itertools.islice(found, c)), eos) for c in counts]

    def _in_parts(
        self, pairs: Sequence[tuple[str, str | Hypothesis]]
    ) -> tuple[list[tuple[str, str | Hypothesis]], list[int]]:
        """All pairs, those of parts as several, and how many each has become."""
        flat, counts = [], []
        for source, target in pairs:
            parts = getattr(target, "parts", ())
            own = list(zip(self.parts(source), parts, strict=True)) if parts else []
            flat += own or [(source, target)]
            counts.append(len(own) or 1)
        return flat, counts

    def _encoded(self, pairs: Sequence[tuple[str, str | Hypothesis]]) -> list[given.Pair]:
        """The ids of both sides of each pair; raises as `score`."""
        sources = self.source.encode_all([source for source, _ in pairs])
        texts = iter(self.target.encode_all([t for _, t in pairs if isinstance(t, str)]))
        encoded = []
        for (source, target), ids in zip(pairs, sources, strict=True):
            is_text = isinstance(target, str)
            text, target_ids = (target, next(texts)) if is_text else (target.text, [*target.ids])
            self._checked(source, ids, self.settings.source_length)
            self._checked(text, target_ids, self.settings.target_length)
            encoded.append((ids, target_ids))
        return encoded


# ---- run folders


def _identity(translator: Predictor) -> dict[str, Any]:
    """What a checkpoint says of its model."""
    return {
        "task": "translate",
        "model": plain(translator.model.config),
        "settings": plain(translator.settings),
        "vocabulary_sha256": {
            "source": translator.source.sha256,
            "target": translator.target.sha256,
        },
    }


def load(run: str | Path, int8: bool = False, functions: str | None = None) -> Predictor:
    """The newest model of a run folder, as its checkpoint describes it; with `int8` its matrices
    in 8 bits. `functions`: the FILE:NAME of those that it was trained with. A damaged checkpoint
    is named on standard error, and the one before it taken.

    Raises:
      RunFolderError: names what is missing or does not fit: no such run, or one of another task;
        nothing saved; a vocabulary that the model was not trained with.
      SubwordError: a vocabulary that is missing or damaged.
      CheckpointError: all that was saved is damaged.
    """
    folder = RunFolder(Path(run))
    task = (folder.read("config.json") or {}).get("task")
    if task != "translate":
        raise RunFolderError(f"{run}: not the folder of a translation run")
    identity, model, params = newest_model(folder, functions)
    vocabularies = {
        side: Subwords.load(folder.path / "vocabulary", side) for side in ("source", "target")
    }
    for side, vocabulary in vocabularies.items():
        if vocabulary.sha256 != identity["vocabulary_sha256"][side]:
            raise RunFolderError(
                f"{folder.path / 'vocabulary' / side}.json: not the vocabulary that the model was "
                "trained with"
            )
    params = quantize(params) if int8 else params
    return Predictor(model, params, **vocabularies, settings=Settings(**identity["settings"]))


def write(run: str | Path, translator: Predictor, about: dict[str, str]) -> None:
    """A run folder of a model that was not trained in one; `about` says where it comes from.

    Raises:
      ValueError: an ensemble, or a model in 8 bits.
      RunFolderError: the folder holds a model, or cannot be written.
      CheckpointError: the checkpoint cannot be.
    """
    leaves = jax.tree.leaves(translator.params)
    if translator.others or any(leaf.dtype == jnp.int8 for leaf in leaves):
        raise ValueError("only a single model, and not one in 8 bits, can be written")
    folder = RunFolder(Path(run))
    identity = _identity(translator)

    def check() -> None:
        for place in (folder.final, folder.checkpoints):
            if place.exists():
                raise RunFolderError(f"{place}: there is a model already")

    with folder.claim(identity | {"about": about}, (), check):
        with named(folder.path / "vocabulary"):
            translator.source.save(folder.path / "vocabulary", "source")
            translator.target.save(folder.path / "vocabulary", "target")
        # Not step 0, which is what a training saves that has not learned anything.
        write_final(folder, translator.params, 1, identity | {"about": about})
