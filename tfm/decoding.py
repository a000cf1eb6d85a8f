"""Decoding: greedy, beam search (§6.1) and sampling, as loops over an explicit cache.

All three take `step(tokens [B, W], index, cache) -> (logits [B, W, V], cache)`: the model's logits
of the next token for W hypotheses of each of B sources. Every leaf of the cache is [B, W, ...] and
goes with its hypothesis; what a `tfm.cache.SharedCache` holds stays where it is. All stop early
when every hypothesis has ended. `max_length` counts the end symbol; a hypothesis that has not ended
by then is returned as it is. After the end symbol come zeros. A bos outside the vocabulary is a
ValueError; an eos outside it is a symbol that never comes.

A `step` that is a pytree of arrays, as that of `start_decoding` or a `jax.tree_util.Partial(
function, params)`, is compiled once for all calls of the same shapes. Any other function, and the
step of a model with `Functions` of its own, is taken as it is: put such a search into a jit of
yours, outside of one it is compiled at each call. There bos may be traced too, or an array [B, 1].
"""

import operator
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, nn
from jax.typing import ArrayLike

from tfm.cache import Memory, SharedCache
from tfm.compilation import compiled
from tfm.kernels.precision import working_dtype
from tfm.model import Transformer
from tfm.shapes import Number, assert_fits, assert_ids, is_traced, nan_unless
from tfm.stack import uses_our_functions

Cache = Any
Step = Callable[[Array, Array, Cache], tuple[Array, Cache]]
Penalty = Literal["paper", "power"]


class Decoded(NamedTuple):
    """Hypotheses [B, W, T] (W = 1 but for beam search, best first), and their scores."""

    tokens: Array
    lengths: Array  # [B, W], the end symbol counted
    log_probs: Array  # [B, W], ln P(tokens | source), summed over the tokens
    scores: Array  # [B, W], what the hypotheses are ranked by

    @property
    def exists(self) -> Array:
        """[B, W]; False where W is more than the number of hypotheses."""
        return self.scores > -jnp.inf


class _Search(NamedTuple):
    position: Array
    tokens: Array
    last: Array
    ended: Array
    lengths: Array
    log_probs: Array
    cache: Cache


def length_penalty(length: Number, alpha: Number, form: Penalty = "paper") -> Array:
    """lp(n) = ((5 + n) / 6)^α (§6.1; Wu et al. 2016, equation 14); of the form power, n^α."""
    if form not in get_args(Penalty):
        raise ValueError(f"penalty={form!r} must be one of {get_args(Penalty)}")
    return (length * 1.0 if form == "power" else (5.0 + length) / 6.0) ** alpha


def length_normalized_score(
    log_prob: Array, length: Array, alpha: Number, penalty: Penalty = "paper"
) -> Array:
    """ln P / lp(n): what beam search ranks by, so that none wins by being short."""
    return log_prob / length_penalty(length, alpha, penalty)


def filter_logits(logits: Array, top_k: int | None = None, top_p: Number | None = None) -> Array:
    """−inf for all but the k likeliest symbols, and all but the smallest set of probability ≥ p.

    logits: [..., V] -> [..., V]. The likeliest symbol always stays.

    Raises:
      ValueError: top_k below 1, or top_p outside (0, 1].
    """
    _assert_restrictions(top_k, top_p)
    if top_k is not None:
        kth = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest always; at 1 everything, where the sum's rounding would cut the tail.
        stay = (before < top_p) | (before == 0) | (top_p == 1)
        least = jnp.where(stay, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _assert_restrictions(top_k: int | None, top_p: Number | None) -> None:
    if top_k is not None and operator.index(top_k) < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if not (top_p is None or is_traced(top_p)) and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")


def _start(step: Step, cache: Cache, bos: ArrayLike, max_length: int) -> _Search:
    """Empty hypotheses; ValueError for a bos that is no symbol of the vocabulary, or no room."""
    if bos is None or isinstance(bos, float | str):
        raise TypeError(f"bos={bos!r} must be an id: an integer, or an array of them")
    if max_length < 1:
        raise ValueError(f"{max_length=} must be at least 1")
    batch, width = jax.tree.leaves(cache)[0].shape[:2]
    index, last = jnp.zeros((), jnp.int32), jnp.full((batch, width), bos, jnp.int32)
    logits, _ = jax.eval_shape(step, last, index, cache)
    assert_ids("bos", bos, logits.shape[-1])
    return _Search(
        position=index,
        tokens=jnp.zeros((batch, width, max_length), jnp.int32),
        last=last,
        ended=jnp.zeros((batch, width), bool),
        lengths=jnp.zeros((batch, width), jnp.int32),
        log_probs=jnp.zeros((batch, width), working_dtype(logits)),
        cache=cache,
    )


def _run(advance: Callable[[_Search], _Search], state: _Search, max_length: int) -> _Search:
    def unfinished(state: _Search) -> Array:
        return (state.position < max_length) & ~state.ended.all()

    return lax.while_loop(unfinished, advance, state)


def _append(
    state: _Search, choice: Array, chosen_log_probs: Array, eos: Number, cache: Cache
) -> _Search:
    """`state` one token longer; ended hypotheses take a zero, at no cost."""
    choice = jnp.where(state.ended, 0, choice)
    return _Search(
        position=state.position + 1,
        tokens=lax.dynamic_update_index_in_dim(state.tokens, choice, state.position, axis=-1),
        last=choice,
        ended=state.ended | (choice == eos),
        lengths=state.lengths + ~state.ended,
        log_probs=state.log_probs + jnp.where(state.ended, 0, chosen_log_probs),
        cache=cache,
    )


def _continued(log_probs: Array, ended: Array) -> Array:
    """ln P [B, W, V] of each continuation; an ended hypothesis has one: itself, in the column of
    symbol 0."""
    symbols = lax.broadcasted_iota(jnp.int32, log_probs.shape, log_probs.ndim - 1)
    itself = jnp.where(symbols == 0, 0, -jnp.inf).astype(log_probs.dtype)
    return jnp.where(ended[..., None], itself, log_probs)


def _reorder(x: Any, order: Array) -> Any:
    """Takes hypotheses of each source: x [B, W, ...], order [B, W'] -> [B, W', ...]."""
    if isinstance(x, SharedCache):
        return x
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


@flax.struct.dataclass(eq=False)
class ModelStep:
    """The `step` of a model for its sources: a pytree of the parameters and of what decoding needs
    of the sources, so that other ones do not compile anew."""

    params: Any
    memory: Memory
    model: Transformer = flax.struct.field(pytree_node=False)

    def __call__(self, tokens: Array, index: ArrayLike, cache: Cache) -> tuple[Array, Cache]:
        assert_fits("tokens", tokens, (None, None))
        assert_ids("tokens", tokens, self.model.config.vocab_size)
        return _step(self.params, self.memory, tokens, index, cache, model=self.model)


@compiled(static=("model",), compile_if=uses_our_functions)
def _step(
    params: Any,
    memory: Memory,
    tokens: Array,
    index: ArrayLike,
    cache: Cache,
    *,
    model: Transformer,
) -> tuple[Array, Cache]:
    return model.apply({"params": params}, memory, tokens, index, cache, method="step")


@compiled(static=("model", "num_hypotheses", "max_length"), compile_if=uses_our_functions)
def _start_decoding(
    params: Any, source: Array, *, model: Transformer, num_hypotheses: int, max_length: int
) -> tuple[Memory, Cache]:
    started: Any = model.apply(
        {"params": params}, source, num_hypotheses, max_length, method="start"
    )
    return started


def start_decoding(
    model: Transformer, params: Any, source: Array, num_hypotheses: int, max_length: int
) -> tuple[ModelStep, Cache]:
    """Encodes source [B, S] once; returns the `step` and the empty cache that the loops take.

    `max_length` is the room in the cache; a loop that goes on beyond it gets NaN for logits.

    Raises:
      AssertionError: source is not [B, S].
      ValueError: num_hypotheses or max_length below 1, or more positions than learned ones.
    """
    assert_fits("source", source, (None, None))
    assert_ids("source", source, model.config.source_vocab_size or model.config.vocab_size)
    # The parameters are not a result of what is compiled, which would copy them.
    memory, cache = _start_decoding(
        params,
        source,
        model=model,
        num_hypotheses=operator.index(num_hypotheses),
        max_length=operator.index(max_length),
    )
    return ModelStep(params, memory, model), cache


def _can_be_kept(
    step: Step, *_: Any, bos: ArrayLike, max_length: int, top_k: int | None = None, **__: Any
) -> bool:
    """Whether a compiled search is for all equal steps: those of arrays, not plain functions, and
    of a model without functions of its own; with one bos, and numbers for sizes."""
    ours = not isinstance(step, ModelStep) or uses_our_functions(model=step.model)
    arrays = all(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(step))
    numbers = all(n is None or isinstance(n, Integral) for n in (bos, max_length, top_k))
    return ours and arrays and numbers


def _check_sample(
    *_: Any,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    **__: Any,
) -> None:
    if not is_traced(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}; greedy takes the best")
    _assert_restrictions(top_k, top_p)


@compiled(static=("bos", "max_length", "top_k"), check=_check_sample, compile_if=_can_be_kept)
def sample(
    step: Step,
    cache: Cache,
    key: Array,
    *,
    bos: ArrayLike,
    eos: Number,
    max_length: int,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
) -> Decoded:
    """Draws each token from softmax(logits / temperature), restricted by `filter_logits`.

    Every one of the W hypotheses of a source is an independent sample. `log_probs` and `scores` are
    those of the model itself, before temperature and restriction; NaN where a traced temperature is
    not positive.

    Raises:
      ValueError: a temperature that is not positive, or as `filter_logits`.
    """

    def advance(state: _Search) -> _Search:
        logits, cache = step(state.last, state.position, state.cache)
        log_probs = nn.log_softmax(logits.astype(state.log_probs.dtype))
        restricted = filter_logits(log_probs / temperature, top_k, top_p)
        choice = jax.random.categorical(jax.random.fold_in(key, state.position), restricted)
        chosen = jnp.take_along_axis(log_probs, choice[..., None], axis=-1)[..., 0]
        return _append(state, choice.astype(jnp.int32), chosen, eos, cache)

    state = _run(advance, _start(step, cache, bos, max_length), max_length)
    log_probs = nan_unless(temperature > 0, state.log_probs)
    return Decoded(state.tokens, state.lengths, log_probs, log_probs)


@compiled(static=("bos", "max_length"), compile_if=_can_be_kept)
def greedy(step: Step, cache: Cache, *, bos: ArrayLike, eos: Number, max_length: int) -> Decoded:
    """Takes the likeliest token at each position."""

    def advance(state: _Search) -> _Search:
        logits, cache = step(state.last, state.position, state.cache)
        log_probs = nn.log_softmax(logits.astype(state.log_probs.dtype))
        # top_k finds the same index as argmax, and on large vocabularies several times as fast.
        best, choice = lax.top_k(log_probs, 1)
        return _append(state, choice[..., 0], best[..., 0], eos, cache)

    state = _run(advance, _start(step, cache, bos, max_length), max_length)
    return Decoded(state.tokens, state.lengths, state.log_probs, state.log_probs)


@compiled(static=("bos", "max_length", "penalty"), compile_if=_can_be_kept)
def beam_search(
    step: Step,
    cache: Cache,
    *,
    bos: ArrayLike,
    eos: Number,
    max_length: int,
    alpha: Number = 0.6,
    penalty: Penalty = "paper",
) -> Decoded:
    """Keeps the W best hypotheses by ln P / lp(n), lp(n) = ((5 + n)/6)^α (§6.1; α = 0.6).

    W is the cache's second axis. At each position every open hypothesis is extended by every
    symbol, and ended ones stay as they are; the W best of all these go on. So W = 1 is greedy
    search, and a W as wide as the space of sequences finds the best one; of a wider one the rest
    are not there (`Decoded.exists`), and score −∞. With `penalty="power"` lp(n) = n^α, as fairseq,
    Marian and CTranslate2 have it; another form is a ValueError.
    """

    def advance(state: _Search) -> _Search:
        logits, cache = step(state.last, state.position, state.cache)
        log_probs = nn.log_softmax(logits.astype(state.log_probs.dtype))
        batch, width, vocabulary = log_probs.shape
        totals = state.log_probs[..., None] + _continued(log_probs, state.ended)
        lengths = state.lengths + ~state.ended
        scores = length_normalized_score(totals, lengths[..., None], alpha, penalty)
        _, best = lax.top_k(scores.reshape(batch, width * vocabulary), width)
        parent, choice = best // vocabulary, best % vocabulary

        inherited = state._replace(
            tokens=_reorder(state.tokens, parent),
            ended=_reorder(state.ended, parent),
            lengths=_reorder(state.lengths, parent),
            log_probs=_reorder(totals.reshape(batch, width * vocabulary), best),
        )
        cache = jax.tree.map(
            lambda x: _reorder(x, parent), cache, is_leaf=lambda x: isinstance(x, SharedCache)
        )
        return _append(inherited, choice, jnp.zeros_like(inherited.log_probs), eos, cache)

    state = _start(step, cache, bos, max_length)
    # All hypotheses start equal, so all but the first are shut out of the first choice.
    if state.last.shape[1] > 1:
        state = state._replace(log_probs=state.log_probs.at[:, 1:].set(-jnp.inf))
    state = _run(advance, state, max_length)
    scores = length_normalized_score(state.log_probs, state.lengths, alpha, penalty)
    order = jnp.argsort(-scores, axis=1)
    results = (state.tokens, state.lengths, state.log_probs, scores)
    return Decoded(*(_reorder(x, order) for x in results))
