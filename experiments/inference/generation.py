"""Many texts through `search.decode`: in batches, with room that grows where it is needed."""

import dataclasses
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

# Room for a target: so many times the tokens of its source, and so many more. More would make
# every step dearer; where it does not do, there is a second time with twice as much.
RATIO, CONSTANT = 1.5, 8

Done = Callable[[int], None]
"""Is called with the number of further sources that are done."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A source, or a part of one, to find a target for."""

    source: list[int]
    prefix: list[int]  # the tokens that its target begins with
    place: tuple[int, int]  # its line, and its number in it


def up_to_16(length: int, most: int) -> int:
    """`length`, or a little more, at most `most`: few different numbers, as each is compiled."""
    return min(-(-length // 16) * 16, most)


@jax.jit
def _keys(seed: jax.Array, places: jax.Array) -> jax.Array:
    """A key for each (line, part) of places [B, 2]."""
    key, fold_in = jax.random.PRNGKey(seed), jax.random.fold_in
    return jax.vmap(lambda place: fold_in(fold_in(key, place[0]), place[1]))(places)


@dataclasses.dataclass(frozen=True)
class Generator:
    """How jobs become hypotheses."""

    groups: tuple[Group, ...]
    target: Tokenizer
    source_length: int
    target_length: int
    rules: Rules
    n: int  # hypotheses of each job that are wanted, of `rules.hypotheses`
    batching: Batching
    seed: int = 0  # of samples

    def __call__(self, jobs: Sequence[Job], done: Done) -> list[list[Hypothesis]]:
        """n hypotheses of each job: those that `target_length` tokens of room would give to each
        alone. Where less leaves them open, they are sought again with twice as much."""
        found: dict[int, list[Hypothesis]] = {}
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
                    if room == self.target_length or self.are_final(hypotheses, job):
                        found[i] = hypotheses[: self.n]
                    else:
                        unfinished.append(i)
                # A source in parts is one source.
                done(sum(i in found and jobs[i].place[1] == 0 for i in members))
            waiting, times = unfinished, 2 * times
        return [found[i] for i in range(len(jobs))]

    def _room(self, jobs: Sequence[Job], width: int, times: int) -> int:
        """Tokens that the targets of sources of `width` tokens have room for."""
        forced = up_to_16(max(len(job.prefix) for job in jobs), self.target_length)
        return min(times * (int(RATIO * width) + CONSTANT) + forced, self.target_length)

    def are_final(self, hypotheses: Sequence[Hypothesis], job: Job) -> bool:
        """Whether more room would leave the first n of a job's hypotheses as they are.

        It would where all have ended; and where those that have not can only come to scores below
        the n-th, ln P / lp(`target_length`) at best, for ln P only falls. Not so after a prefix,
        since the search ranks by what comes after it.
        """
        still_open = [h for h in hypotheses if not h.ended]
        if self.rules.sampling or job.prefix:
            return not still_open
        rules, longest = self.rules, self.target_length
        return all(
            length_normalized_score(h.log_prob, longest, rules.alpha, rules.penalty)
            < hypotheses[self.n - 1].score
            for h in still_open
        )

    def _decode(self, jobs: Sequence[Job], width: int, room: int) -> Decoded:
        """All hypotheses of one batch."""
        source = padded([job.source for job in jobs], width, len(jobs))
        prefix = keys = None
        if forced := up_to_16(max(len(job.prefix) for job in jobs), self.target_length):
            prefix = padded([job.prefix for job in jobs], forced, len(jobs))
        if self.rules.sampling:
            keys = _keys(np.uint32(self.seed), np.array([job.place for job in jobs], np.uint32))
        found = decode(self.groups, source, prefix, keys, rules=self.rules, length=room)
        return jax.device_get(found)

    def _hypothesis(
        self, tokens: np.ndarray, length: np.ndarray, log_prob: np.ndarray, score: np.ndarray
    ) -> Hypothesis:
        ids = tuple(tokens[:length].tolist())
        ended = ids[-1] == self.target.eos
        return Hypothesis(self.target.decode(ids), ids, float(score), float(log_prob), ended)
