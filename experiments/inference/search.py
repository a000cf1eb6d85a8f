"""Search, log-probabilities and attention of one model or an ensemble.

Models with the same config form a `Group` and run as one vmapped stack; groups run in turn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax, nn

from tfm.cache import Cache
from tfm.decoding import Decoded, Step, beam_search, length_normalized_score, sample, start_decoding
from tfm.masks import shift_right
from tfm.model import Transformer

Mean = Literal["log_linear", "linear"]
_AXES = Cache(None, 0)  # each model has its own keys and values; the row indices are shared


@flax.struct.dataclass
class Group:
    """Models of one config. Where there are several, the parameters have a leading model axis."""

    params: chex.ArrayTree
    model: Transformer = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def of(cls, models: Sequence[tuple[Transformer, chex.ArrayTree]]) -> tuple["Group", ...]:
        """Groups models with their parameters by config."""
        groups: dict[Transformer, list[chex.ArrayTree]] = {}
        for model, params in models:
            groups.setdefault(model, []).append(params)
        return tuple(
            cls(jax.tree.map(lambda *x: jnp.stack(x), *members), model, len(members))
            if len(members) > 1 else cls(members[0], model)
            for model, members in groups.items()
        )  # fmt: skip

    def each(self, function: Callable[[chex.ArrayTree], Array]) -> Array:
        """function(parameters) of every model: [M, ...]."""
        return function(self.params)[None] if self.count == 1 else jax.vmap(function)(self.params)

    def start(self, source: Array, hypotheses: int, length: int) -> tuple[Step, Any]:
        """As `tfm.start_decoding`, with logits [M, B, W, V]."""
        if self.count == 1:
            step_one, cache = start_decoding(self.model, self.params, source, hypotheses, length)

            def step(tokens, index, cache):
                logits, cache = step_one(tokens, index, cache)
                return logits[None], cache

            return step, cache

        def begin(params):
            return self.model.apply({"params": params}, source, hypotheses, length, method="start")

        memory, cache = jax.vmap(begin, out_axes=(0, _AXES))(self.params)

        def step(tokens, index, cache):
            def one(params, memory, cache):
                variables = {"params": params}
                return self.model.apply(variables, memory, tokens, index, cache, method="step")

            return jax.vmap(one, (0, 0, _AXES), (0, _AXES))(self.params, memory, cache)

        return step, cache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of `tfm.sample`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """The options of a search. Hashable, as jit compiles one program for each."""

    bos: int
    eos: int
    hypotheses: int = 1
    alpha: float = 0.0
    penalty: Literal["paper", "power"] = "paper"
    mean: Mean = "log_linear"
    sampling: Sampling | None = None  # None: beam search


def joint_logits(logits: Array, rules: Rules) -> Array:
    """[M, ..., V] logits of M models -> [..., V] whose softmax is the ensemble's distribution.

    log_linear: softmax(1/M Σ ln p), the mean of the log-probabilities, made to sum to 1 (Marian).
    linear: 1/M Σ p, the mean of the probabilities (fairseq, Nematus, OpenNMT). Padding and the
    start symbol are set to −inf before that.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = logits.at[..., jnp.array([0, rules.bos])].set(-jnp.inf)
    if logits.shape[0] == 1:
        return logits[0]
    if rules.mean == "log_linear":  # each model's normaliser is a constant, and cancels
        return logits.mean(0)
    return nn.logsumexp(nn.log_softmax(logits), axis=0)


def _start(
    groups: tuple[Group, ...], source: Array, prefix: Array | None, rules: Rules, length: int
) -> tuple[Step, Any]:
    """The joint `step` and the empty caches of all models.

    Where prefix [B, P] is not 0, it is the only possible token.
    """
    begun = [group.start(source, rules.hypotheses, length) for group in groups]

    def step(tokens, index, caches):
        results = [one(tokens, index, old) for (one, _), old in zip(begun, caches, strict=True)]
        logits = joint_logits(jnp.concatenate([logits for logits, _ in results]), rules)
        if prefix is not None:
            forced = lax.dynamic_index_in_dim(prefix, index, 1)[..., None]  # [B, 1, 1]
            forced = jnp.where(index < prefix.shape[1], forced, 0)
            may_come = (forced == 0) | (jnp.arange(logits.shape[-1]) == forced)
            logits = jnp.where(may_come, logits, -jnp.inf)
        return logits, tuple(cache for _, cache in results)

    return step, tuple(cache for _, cache in begun)


def _draw(
    groups: tuple[Group, ...], source: Array, prefix: Array | None, keys: Array, rules: Rules,
    length: int,
) -> Decoded:  # fmt: skip
    """Samples with one key per source, so that the rest of the batch has no influence."""

    def one(source, prefix, key):
        prefix = None if prefix is None else prefix[None]
        step, cache = _start(groups, source[None], prefix, rules, length)
        how = dataclasses.asdict(rules.sampling)
        decoded = sample(step, cache, key, bos=rules.bos, eos=rules.eos, max_length=length, **how)
        return jax.tree.map(lambda x: x[0], decoded)

    return jax.vmap(one)(source, prefix, keys)


def _with_prefix(decoded: Decoded, forced: Array, rules: Rules) -> Decoded:
    """Adds the log-probabilities [B] of the forced tokens, and sorts the hypotheses again."""
    log_probs = decoded.log_probs + forced[:, None]
    if rules.sampling:
        return decoded._replace(log_probs=log_probs, scores=log_probs)
    scores = length_normalized_score(log_probs, decoded.lengths, rules.alpha, rules.penalty)
    order = jnp.argsort(-scores, axis=1)
    tokens = jnp.take_along_axis(decoded.tokens, order[..., None], axis=1)
    rest = (decoded.lengths, log_probs, scores)
    return Decoded(tokens, *(jnp.take_along_axis(x, order, axis=1) for x in rest))


@partial(jax.jit, static_argnames=("rules", "length"))
def decode(
    groups: tuple[Group, ...],
    source: Array,
    prefix: Array | None,
    keys: Array | None,
    *,
    rules: Rules,
    length: int,
) -> Decoded:
    """Hypotheses of at most `length` tokens, by beam search or sampling.

    source [B, S] ids; prefix [B, P] ids that the hypotheses begin with, 0 after them; keys [B, 2]
    for sampling.

    The search gives a forced token the probability 1, so it ranks hypotheses by the tokens after
    the prefix. The prefix has the same probability in all hypotheses of a source, and it is added
    at the end.
    """
    if rules.sampling:
        decoded = _draw(groups, source, prefix, keys, rules, length)
    else:
        step, cache = _start(groups, source, prefix, rules, length)
        decoded = beam_search(
            step, cache, bos=rules.bos, eos=rules.eos, max_length=length, alpha=rules.alpha,
            penalty=rules.penalty,
        )  # fmt: skip
    if prefix is None:
        return decoded
    forced = log_probs(groups, source, prefix, (prefix != 0).sum(-1), rules=rules)
    return _with_prefix(decoded, forced.sum(-1), rules)


def _within(lengths: Array, ids: Array) -> Array:
    """[B, T] mask: 1 at the first `lengths` [B] positions of ids, else 0."""
    return (jnp.arange(ids.shape[-1]) < lengths[:, None]).astype(jnp.int32)


@partial(jax.jit, static_argnames="rules")
def log_probs(
    groups: tuple[Group, ...], source: Array, target: Array, lengths: Array, *, rules: Rules
) -> Array:
    """ln P of each token of target [B, T], given the source and the tokens before it.

    0 from `lengths` [B] on. The segments are explicit, since padding and start may share an id.
    """
    segments = _within(lengths, target)
    inputs = shift_right(target, rules.bos)

    def logits(group: Group) -> Array:
        return group.each(
            lambda params: group.model.apply(
                {"params": params}, source, inputs, target_segment_ids=segments
            )
        )

    joint = joint_logits(jnp.concatenate([logits(group) for group in groups]), rules)
    chosen = jnp.take_along_axis(joint, target[..., None], axis=-1)[..., 0]
    return jnp.where(segments, chosen - nn.logsumexp(joint, axis=-1), 0)


@partial(jax.jit, static_argnames="rules")
def attended(
    groups: tuple[Group, ...],
    source: Array,
    target: Array,
    source_lengths: Array,
    lengths: Array,
    *,
    rules: Rules,
) -> Array:
    """[B, T]: the source position with the largest attention weight, for each target token.

    The weights are the mean over the heads of the cross-attention in the second-last decoder layer,
    which aligns best (Garg et al. 2019, "Jointly Learning to Align and Translate with Transformer
    Models"). The source's end symbol is left out, since heads attend to it when they attend to
    nothing.
    """
    segments = _within(lengths, target)
    inputs = shift_right(target, rules.bos)

    def weights(group: Group) -> Array:
        layer = max(group.model.config.num_decoder_layers - 2, 0)

        def one(params):
            _, weights = group.model.apply(
                {"params": params}, source, inputs, target_segment_ids=segments,
                return_weights=True,
            )  # fmt: skip
            return weights["cross"][layer].mean(-3)

        return group.each(one)

    mean = jnp.concatenate([weights(group) for group in groups]).mean(0)  # [B, T, S]
    pieces = _within(source_lengths - 1, source)[:, None]
    return jnp.where(pieces, mean, -1).argmax(-1)


@partial(jax.jit, static_argnames=("model", "bos"))
def cross_attention(
    model: Transformer, params: chex.ArrayTree, source: Array, target: Array, *, bos: int
) -> Array:
    """Cross-attention weights [N, H, T, S] of every head for source [1, S] and target [1, T]."""
    inputs, segments = shift_right(target, bos), jnp.ones_like(target)
    _, weights = model.apply(
        {"params": params}, source, inputs, target_segment_ids=segments, return_weights=True
    )
    return weights["cross"][:, 0]
