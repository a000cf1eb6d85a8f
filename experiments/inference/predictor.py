"""A trained model with its tokenizers: search, sampling, scoring and alignment of texts."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import chex
import numpy as np

from experiments.data.pronunciations import padded
from experiments.data.tokenizer import Tokenizer, shown
from experiments.inference import scoring as given
from experiments.inference.batches import SENTENCES, Batching
from experiments.inference.generation import Done, Generator, Job
from experiments.inference.hypotheses import Hypothesis, Scored, best_of_parts, joined
from experiments.inference.search import Group, Mean, Rules, Sampling, cross_attention
from experiments.inference.segmentation import TooLongError, parts_of
from tfm.model import Transformer

Long = Literal["refuse", "split"]


def _nobody(count: int) -> None:
    """Ignores the progress."""


def _texts(name: str, given: Sequence[str]) -> Sequence[str]:
    """Checks a list of strings: a single string would pass as a list of characters."""
    if isinstance(given, str):
        raise TypeError(f"{name} must be a list of texts: [{shown(given)}], not {shown(given)}")
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a text, not {text!r:.60}")
    return given


def _pairs(given: Sequence[tuple[str, "str | Hypothesis"]]) -> Sequence[tuple]:
    """Checks a list of pairs."""
    for i, pair in enumerate(given):
        if isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"pairs[{i}] must be (source, target), not {pair!r:.60}")
        if not (isinstance(pair[0], str) and isinstance(pair[1], str | Hypothesis)):
            raise TypeError(f"pairs[{i}] must be of texts, not {pair!r:.60}")
    return given


@dataclasses.dataclass(frozen=True)
class Settings:
    """The lengths that a model was trained for, and the defaults of its search."""

    source_length: int
    """Most tokens of a source, its end symbol included."""
    target_length: int
    """Most tokens of a target, its end symbol included."""
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
    """A model, its parameters, tokenizers and settings; or several models, as an ensemble.

    It pronounces words or translates sentences. A source is a word or sentence, a target its
    pronunciation or translation.

    Padding and the start symbol are never generated, and have no part in the probabilities.

    Raises ValueError where the sizes of tokenizers and model differ.
    """

    model: Transformer
    params: chex.ArrayTree
    source: Tokenizer
    target: Tokenizer
    settings: Settings
    others: tuple["Predictor", ...] = ()
    """The other members of an ensemble: see `ensemble.ensemble`."""
    mean: Mean = "log_linear"
    """The mean of an ensemble: of log-probabilities, or (linear) of probabilities."""
    batching: Batching = SENTENCES
    """The limits of a batch."""

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

    # ---- search

    def nbest(
        self,
        sources: Sequence[str],
        n: int = 1,
        beam: int | None = None,
        *,
        alpha: float | None = None,
        prefixes: Sequence[str] | None = None,
        long: Long = "refuse",
        done: Done = _nobody,
    ) -> list[list[Hypothesis]]:
        """The n best targets of each source, best first; fewer where fewer are possible.

        Args:
          beam, alpha: None: those of the settings; the beam is at least n.
          prefixes: what each target begins with ("" for nothing), in whole pieces.
          long: for a source of more tokens than the model was trained for; split translates its
            `parts`, and joins their targets with spaces.
          done: called with the number of sources finished since the last call.

        Raises:
          InputError: the first source or prefix with a character that has no id; its subclass
            TooLongError where one is too long.
          ValueError: n > beam, or another number of prefixes than of sources.
          TypeError: a string in the place of a list.
        """
        beam = max(n, self.settings.beam) if beam is None else beam
        if not 1 <= n <= beam:
            raise ValueError(f"nbest={n} must be at least 1 and at most beam={beam}")
        alpha = self.settings.alpha if alpha is None else alpha
        rules = self._rules(hypotheses=beam, alpha=alpha, penalty=self.settings.penalty)
        generate = self._generator(rules, n)
        jobs = self._jobs(sources, prefixes, long, range(len(sources)))
        results = iter(generate(list(itertools.chain(*jobs)), done))
        return [best_of_parts(list(itertools.islice(results, len(parts))), n) for parts in jobs]

    def __call__(self, sources: Sequence[str], **options: Any) -> list[str]:
        """The best target of each source; options and errors as `nbest`."""
        return [best.text for (best,) in self.nbest(sources, **options)]

    def sample(
        self,
        sources: Sequence[str],
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
        """n independent samples of each source's target: `tfm.sample`.

        A sample depends on its source, the seed and the source's number in `lines` (None: 0, 1,
        2, …), not on the other sources. Prefixes, long, done and errors as `nbest`.
        """
        rules = self._rules(hypotheses=n, sampling=Sampling(temperature, top_k, top_p))
        generate = self._generator(rules, n, seed)
        lines = range(len(sources)) if lines is None else lines
        jobs = self._jobs(sources, prefixes, long, lines)
        results = iter(generate(list(itertools.chain(*jobs)), done))
        own = ([next(results) for _ in parts] for parts in jobs)
        return [[joined(parts) for parts in zip(*samples, strict=True)] for samples in own]

    def _generator(self, rules: Rules, n: int, seed: int = 0) -> Generator:
        return Generator(self._groups, self.target, *self._limits, rules, n, self.batching, seed)

    def lengths(self, sources: Sequence[str]) -> list[int]:
        """The tokens of each source, the end symbol included."""
        return [len(ids) for ids in self.source.encode_all(_texts("sources", sources))]

    def parts(self, source: str) -> list[str]:
        """Splits a source into parts that are short enough: `segmentation.parts_of`."""
        return parts_of(source, self.lengths, self.settings.source_length)

    def forced(self, prefix: str) -> list[int]:
        """The tokens of a prefix; TooLongError where no further token would fit."""
        ids = self.target.encode(prefix)[:-1] if prefix else []
        return self._checked(prefix, ids, self.settings.target_length - 1)

    def _jobs(
        self,
        sources: Sequence[str],
        prefixes: Sequence[str] | None,
        long: Long,
        lines: Sequence[int],
    ) -> list[list[Job]]:
        """The jobs of each source; the first part gets the prefix. Raises as `nbest`."""
        encoded = self.source.encode_all(_texts("sources", sources))
        prefixes = [""] * len(sources) if prefixes is None else _texts("prefixes", prefixes)
        if len(prefixes) != len(sources):
            raise ValueError(f"{len(prefixes)} prefixes do not fit {len(sources)} sources")
        jobs = []
        for source, ids, prefix, line in zip(sources, encoded, prefixes, lines, strict=True):
            parts = [ids]
            if long == "refuse":
                self._checked(source, ids, self.settings.source_length)
            elif len(ids) > self.settings.source_length:
                parts = self.source.encode_all(self.parts(source))
            forced = [self.forced(prefix), *([] for _ in parts[1:])]
            places = zip(parts, forced, strict=True)
            jobs.append([Job(*job, (line, k)) for k, job in enumerate(places)])
        return jobs

    def _checked(self, text: str, ids: list[int], most: int) -> list[int]:
        """`ids`; TooLongError where they are more than `most`."""
        if len(ids) > most:
            raise TooLongError(
                f"{shown(text)}: {len(ids)} tokens, more than the {most} that the model was "
                "trained for"
            )
        return ids

    # ---- given targets

    def check(self, source: str, target: str) -> None:
        """Raises InputError where a side of a pair cannot be scored; see `score`."""
        self._encoded([(source, target)])

    def score(
        self, pairs: Sequence[tuple[str, str | Hypothesis]], done: Done = _nobody
    ) -> list[Scored]:
        """The log-probability of each token of given targets of given sources.

        A hypothesis is scored by its own tokens, a string by the tokenizer's.

        Raises:
          InputError: the first pair with a character that has no id; its subclass TooLongError
            where a side is too long, and has no parts.
          TypeError: not a list of pairs.
        """
        flat, counts = self._in_parts(pairs)
        encoded = self._encoded(flat)
        how = self._groups, self._rules()
        scored = iter(given.score(*how, encoded, self._limits, self.batching, done))
        return [
            Scored(*(tuple(itertools.chain(*x)) for x in zip(
                *((s.ids, s.log_probs) for s in itertools.islice(scored, count)), strict=True
            )))
            for count in counts
        ]  # fmt: skip

    def align(self, pairs: Sequence[tuple[str, str | Hypothesis]]) -> list[list[tuple[int, int]]]:
        """(source piece, target piece) for each target piece, by `search.attended`.

        Pieces are numbered from 0, across the parts of a sentence; end symbols are left out.
        Raises as `score`.
        """
        flat, counts = self._in_parts(pairs)
        encoded = self._encoded(flat)
        places = given.align(self._groups, self._rules(), encoded, self._limits, self.batching)
        placed = zip(encoded, places, strict=True)
        eos = self.target.eos
        return [given.numbered_through(list(itertools.islice(placed, c)), eos) for c in counts]

    def _in_parts(
        self, pairs: Sequence[tuple[str, str | Hypothesis]]
    ) -> tuple[list[tuple[str, str | Hypothesis]], list[int]]:
        """Splits each pair into its parts; returns all of them, and the number of each pair's."""
        flat, counts = [], []
        for source, target in _pairs(pairs):
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

    def cross_attention(self, source: str, target: str | Hypothesis) -> np.ndarray:
        """Cross-attention weights [N, H, T, S] of the first model, end symbols included; raises as
        `score`."""
        ((source_ids, target_ids),) = self._encoded([(source, target)])
        rows = (padded([ids], len(ids), 1) for ids in (source_ids, target_ids))
        return np.asarray(cross_attention(self.model, self.params, *rows, bos=self.target.bos))
