"""Decodes many texts with `search.decode`, in batches whose length limit grows where needed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from experiments.data.pronunciations import padded
from experiments.data.tokenizer import Tokenizer
from experiments.inference.batches import Batching
from experiments.inference.hypotheses import Hypothesis
from experiments.inference.search import Group, Rules, decode
from tfm.decoding import Decoded, length_normalized_score

# The first length limit of a target: RATIO · tokens of the source + CONSTANT. A higher limit
# makes every step slower. What does not end within it is decoded again with twice the limit.
RATIO, CONSTANT = 1.5, 8

Done = Callable[[int], None]
"""Called with the number of sources that have been finished since the last call."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A source, or a part of one, to find a target for."""

    source: list[int]
    prefix: list[int]  # the tokens that its target begins with
    place: tuple[int, int]  # (line, number of the part in it)


def up_to_16(length: int, most: int) -> int:
    """`length` rounded up to a multiple of 16, at most `most`: each length is compiled."""
    return min(-(-length // 16) * 16, most)


@jax.jit
def _keys(seed: jax.Array, places: jax.Array) -> jax.Array:
    """One random key for each (line, part) in places [B, 2]."""
    key, fold_in = jax.random.PRNGKey(seed), jax.random.fold_in
    return jax.vmap(lambda place: fold_in(fold_in(key, place[0]), place[1]))(places)


@dataclasses.dataclass(frozen=True)
class Generator:
    """Decodes jobs into hypotheses."""

    groups: tuple[Group, ...]
    target: Tokenizer
    source_length: int
    target_length: int
    rules: Rules
    n: int  # hypotheses returned for each job, of `rules.hypotheses`
    batching: Batching
    seed: int = 0  # of samples

    def __call__(self, jobs: Sequence[Job], done: Done) -> list[list[Hypothesis]]:
        """The n hypotheses of each job that a length limit of `target_length` gives, or as many
        as there are.

        The first limit is lower. Jobs whose result could still change are decoded again with
        twice the limit.
        """
        finished: dict[int, list[Hypothesis]] = {}
        waiting, times = list(range(len(jobs))), 1
        rows_of = partial(self.batching.rows_to_decode, hypotheses=self.rules.hypotheses)
        while waiting:
            unfinished = []
            lengths = [len(jobs[i].source) for i in waiting]
            for batch in self.batching.batches(lengths, self.source_length, rows_of):
                members = [waiting[k] for k in batch.members]
                chosen = [jobs[waiting[k]] for k in batch.filled]
                room = self._room(chosen, batch.width, times)
                decoded = self._decode(chosen, batch.width, room)
                for i, job, row in zip(members, chosen, zip(*decoded, strict=True), strict=False):
                    hypotheses = [self._hypothesis(*one) for one in zip(*row, strict=True)]
                    # A beam wider than the number of possible targets is filled with −∞.
                    hypotheses = [h for h in hypotheses if h.score > -math.inf]
                    if room == self.target_length or self.are_final(hypotheses, job):
                        finished[i] = hypotheses[: self.n]
                    else:
                        unfinished.append(i)
                # A source in several parts counts once.
                done(sum(i in finished and jobs[i].place[1] == 0 for i in members))
            waiting, times = unfinished, 2 * times
        return [finished[i] for i in range(len(jobs))]

    def _room(self, jobs: Sequence[Job], width: int, times: int) -> int:
        """The length limit for the targets of sources of `width` tokens."""
        forced = up_to_16(max(len(job.prefix) for job in jobs), self.target_length)
        return min(times * (int(RATIO * width) + CONSTANT) + forced, self.target_length)

    def are_final(self, hypotheses: Sequence[Hypothesis], job: Job) -> bool:
        """Whether a higher length limit would give a job the same first n hypotheses.

        True if all have ended, or if no open one can reach the score of the n-th: ln P only falls,
        so its score is at best ln P / lp(`target_length`). This bound does not hold after a prefix,
        since the search then ranks by the tokens after it.
        """
        still_open = [h for h in hypotheses if not h.ended]
        if self.rules.sampling or job.prefix or len(hypotheses) < self.n:
            return not still_open
        rules, longest = self.rules, self.target_length
        return all(
            length_normalized_score(h.log_prob, longest, rules.alpha, rules.penalty)
            < hypotheses[self.n - 1].score
            for h in still_open
        )

    def _decode(self, jobs: Sequence[Job], width: int, room: int) -> Decoded:
        """Decodes one batch."""
        source = padded([job.source for job in jobs], width, len(jobs))
        prefix = keys = None
        if forced := up_to_16(max(len(job.prefix) for job in jobs), self.target_length):
            prefix = padded([job.prefix for job in jobs], forced, len(jobs))
        if self.rules.sampling:
            keys = _keys(np.uint32(self.seed), np.array([job.place for job in jobs], np.uint32))
        decoded = decode(self.groups, source, prefix, keys, rules=self.rules, length=room)
        return jax.device_get(decoded)

    def _hypothesis(
        self, tokens: np.ndarray, length: np.ndarray, log_prob: np.ndarray, score: np.ndarray
    ) -> Hypothesis:
        ids = tuple(tokens[:length].tolist())
        ended = ids[-1] == self.target.eos
        return Hypothesis(self.target.decode(ids), ids, float(score), float(log_prob), ended)
