import gc
import itertools
import math
import weakref
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_refuses

import tfm
from tfm import Transformer, TransformerConfig, beam_search, greedy, sample, start_decoding
from tfm.decoding import filter_logits, length_penalty
from tfm.training import param_shapes

BOS, EOS = 1, 2
PAPER = TransformerConfig(
    vocab_size=7, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=1, num_decoder_layers=2
)
DEPARTED = TransformerConfig(
    first_position=1,
    tied_output=False,
    activation="swish",
    vocab_size=7,
    source_vocab_size=9,
    d_model=8,
    d_ff=12,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    norm_placement="pre",
    projection_bias=True,
    output_bias=True,
    positions="learned",
    max_learned_positions=7,
)
SOURCE = jnp.array([[3, 5, 2, 6, 4], [6, 1, 5, 0, 0], [4, 4, 0, 0, 0]])


def parameters(config, seed=0):
    """Large enough that the model has strong opinions."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.8 * rng.standard_normal(leaf.shape), jnp.float32),
        param_shapes(config),
    )


def teacher_force(step, cache, tokens):
    """The step's logits [..., T, V] when the hypotheses are `tokens` [B, W, T]."""

    def one(cache, indexed):
        logits, cache = step(indexed[1], indexed[0], cache)
        return cache, logits

    indices = jnp.arange(tokens.shape[-1])
    _, logits = jax.lax.scan(one, cache, (indices, jnp.moveaxis(tokens, -1, 0)))
    return jnp.moveaxis(logits, 0, -2)


@pytest.mark.parametrize("config", [PAPER, DEPARTED], ids=["the paper's", "every departure"])
def test_cached_logits_equal_uncached_ones(rng, config):
    model, params = Transformer(config), parameters(config)
    targets = jnp.asarray(rng.integers(1, 7, (3, 4, 6)))  # 4 hypotheses of each source

    @jax.jit
    def cached(params):
        return teacher_force(*start_decoding(model, params, SOURCE, 4, 6), targets)

    @jax.jit
    def uncached(params):
        sources = jnp.repeat(SOURCE[:, None], 4, axis=1)
        return model.apply({"params": params}, sources, targets)

    assert_close(cached(params), uncached(params), 1e-5)


def decode(search, params, width, source=SOURCE):
    step, cache = start_decoding(Transformer(PAPER), params, source, width, 6)
    return search(step, cache, bos=BOS, eos=EOS, max_length=6)


@jax.jit
def decode_every_way(params, key):
    likeliest = partial(sample, key=key, top_k=1)
    return [decode(search, params, 1) for search in (greedy, beam_search, likeliest)]


def test_a_beam_of_1_and_samples_of_the_likeliest_are_greedy():
    seen = set()
    for seed in range(10):
        best, beam, sampled = decode_every_way(parameters(PAPER, seed), jax.random.PRNGKey(seed))
        for other in (beam, sampled):
            np.testing.assert_array_equal(other.tokens, best.tokens)
            np.testing.assert_array_equal(other.lengths, best.lengths)
            assert_close(other.log_probs, best.log_probs, 1e-5)
        # What a score is: beam search divides by the penalty.
        assert_close(best.scores, best.log_probs, 0)
        penalty = ((5 + np.asarray(best.lengths)) / 6) ** 0.6
        assert_close(beam.scores, best.log_probs / penalty, 1e-5)
        seen |= set(np.ravel(best.lengths).tolist())
    assert len(seen) > 1  # some ended early, some did not


VOCABULARY, STATES = 4, 97


def history_table(seed=0):
    return np.random.default_rng(seed).standard_normal((STATES, VOCABULARY)) * 1.5


def follow(state, token, index):
    """The state after a token at a position: what is remembered of the whole history."""
    return (state * 31 + token * 7 + index + 1) % STATES


def history_step(tokens, index, state):
    """A model whose logits depend on everything before: its cache is a state [B, W]."""
    state = follow(state, tokens, index)
    return jnp.float32(history_table())[state], state


def start_states(batch, width):
    return jnp.broadcast_to(10 * jnp.arange(batch)[:, None], (batch, width))


def reference_log_prob(row, tokens):
    """ln P of `tokens` by the history model."""
    state, last, total = 10 * row, BOS, 0.0
    for index, token in enumerate(tokens):
        state = follow(state, last, index)
        logits = history_table()[state]
        total += logits[token] - math.log(sum(math.exp(logit) for logit in logits))
        last = token
    return total


def all_sequences(max_length):
    """Every sequence that ends in the end symbol, or has it nowhere and is as long as allowed."""
    others = [symbol for symbol in range(VOCABULARY) if symbol != EOS]
    for length in range(max_length):
        for start in itertools.product(others, repeat=length):
            yield (*start, EOS)
    yield from itertools.product(others, repeat=max_length)


@partial(jax.jit, static_argnums=(0, 1))
def search_histories(width, max_length, alpha):
    cache = start_states(2, width)
    return beam_search(history_step, cache, bos=BOS, eos=EOS, max_length=max_length, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_beam_as_wide_as_the_space_equals_brute_force(alpha):
    space = list(all_sequences(3))
    found = search_histories(len(space), 3, alpha)
    for row in range(2):
        log_probs = {tokens: reference_log_prob(row, tokens) for tokens in space}
        scores = {
            tokens: log_prob / ((5 + len(tokens)) / 6) ** alpha
            for tokens, log_prob in log_probs.items()
        }
        ranked = sorted(space, key=lambda tokens: -scores[tokens])
        padded = [[*tokens, 0, 0, 0][:3] for tokens in ranked]
        np.testing.assert_array_equal(found.tokens[row], padded)
        np.testing.assert_array_equal(found.lengths[row], [len(tokens) for tokens in ranked])
        assert_close(found.log_probs[row], [log_probs[tokens] for tokens in ranked], 1e-5)
        assert_close(found.scores[row], [scores[tokens] for tokens in ranked], 1e-5)


def reference_beam(row, width, max_length, alpha):
    """Beam search over lists: (score, tokens), best first."""

    def score(tokens):
        return reference_log_prob(row, tokens) / ((5 + len(tokens)) / 6) ** alpha

    beam = [()]
    for _ in range(max_length):
        candidates = []
        for tokens in beam:
            ended = EOS in tokens
            candidates += [tokens] if ended else [(*tokens, v) for v in range(VOCABULARY)]
        beam = sorted(candidates, key=lambda tokens: -score(tokens))[:width]
    return [(score(tokens), tokens) for tokens in beam]


def test_a_narrow_beam_keeps_the_best_of_each_step():
    found = search_histories(3, 7, 0.6)
    for row in range(2):
        scores, hypotheses = zip(*reference_beam(row, 3, 7, 0.6), strict=True)
        padded = [[*tokens, *[0] * 7][:7] for tokens in hypotheses]
        np.testing.assert_array_equal(found.tokens[row], padded)
        assert_close(found.scores[row], scores, 1e-5)


@jax.jit
def beam_of_4(params, source):
    return decode(beam_search, params, 4, source)


def test_scores_of_a_beam_are_the_uncached_models():
    # After every branching a hypothesis finds its own keys and values, in whichever row they are.
    model, params = Transformer(PAPER), parameters(PAPER)
    found = beam_of_4(params, SOURCE)

    @jax.jit
    def log_probs(params, tokens):
        inputs = jnp.concatenate([jnp.full((3, 4, 1), BOS), tokens[..., :-1]], -1)
        # A generated 0 is a token here, and no padding.
        segments = {"target_segment_ids": jnp.ones_like(inputs)}
        sources = jnp.repeat(SOURCE[:, None], 4, axis=1)
        logits = model.apply({"params": params}, sources, inputs, **segments)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        is_real = jnp.indices(chosen.shape)[-1] < found.lengths[..., None]
        return jnp.where(is_real, chosen, 0).sum(-1)

    assert_close(found.log_probs, log_probs(params, found.tokens), 1e-4)
    assert len({tuple(tokens) for tokens in np.asarray(found.tokens[0])}) == 4
    assert (np.diff(found.scores, axis=1) <= 0).all()  # best first


def test_rows_are_decoded_independently():
    params = parameters(PAPER)
    before = beam_of_4(params, SOURCE)
    after = beam_of_4(params, SOURCE.at[0].set(4).at[2].set(jnp.array([5, 0, 0, 0, 0])))
    np.testing.assert_array_equal(after.tokens[1], before.tokens[1])
    assert_close(after.scores[1], before.scores[1], 1e-5)
    assert not np.allclose(after.scores[0], before.scores[0], atol=1e-3)


@pytest.mark.parametrize("search", [greedy, beam_search])
def test_a_search_with_64_bits_finds_the_same(search):
    params, width = parameters(PAPER), 1 if search is greedy else 3
    found = decode(search, params, width)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        again = decode(search, wide, width)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    assert_close(again.scores, found.scores, 1e-5)


def test_the_length_penalty_of_others_is_a_power():
    assert float(length_penalty(9, 0.5, "power")) == pytest.approx(3)
    assert_refuses(length_penalty, 9, 0.5, "none", words=["penalty", "'none'"], error=ValueError)


def test_the_length_penalty():
    # ((5 + n) / 6) ** alpha
    for length, alpha, expected in [(1, 0.6, 1), (7, 1, 2), (7, 0, 1), (19, 0.5, 2), (13, 2, 9)]:
        assert float(length_penalty(length, alpha)) == pytest.approx(expected, rel=1e-6)


def ending_at(ends, steps_taken):
    """A step whose hypotheses of row b end at index ends[b]; it records its calls."""

    def step(tokens, index, cache):
        jax.debug.callback(lambda index: steps_taken.append(int(index)), index)
        wanted = jnp.where(index == jnp.array(ends), EOS, 3 + index % 2)  # [B]
        logits = -100.0 * (jnp.arange(6)[None] != wanted[:, None])
        return jnp.broadcast_to(logits[:, None], (*tokens.shape, 6)), cache

    return step


SEARCHES = {
    "greedy": greedy,
    "beam": beam_search,
    "sample": partial(sample, key=jax.random.PRNGKey(0)),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(("ends", "expected_steps"), [([2, 0, 3], 4), ([2, 50, 0], 8)])
def test_decoding_stops_when_every_row_has_ended(search, ends, expected_steps):
    steps_taken = []
    cache = {"unused": jnp.zeros((3, 1))}
    step = ending_at(ends, steps_taken)
    run = jax.jit(lambda: search(step, cache, bos=BOS, eos=EOS, max_length=8))
    tokens, lengths, log_probs, _ = run()
    jax.effects_barrier()
    assert sorted(steps_taken) == list(range(expected_steps))
    for row, end in enumerate(ends):
        expected = [3 + index % 2 for index in range(min(end, 8))] + [EOS] * (end < 8)
        assert lengths[row, 0] == len(expected)
        assert tokens[row, 0].tolist() == expected + [0] * (8 - len(expected))
    assert_close(log_probs, np.zeros((3, 1)), 1e-5)


def reference_filter(logits, top_k, top_p):
    """For one distribution whose logits differ: which symbols stay."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])
    order = order if top_k is None else order[:top_k]
    weights = [math.exp(logits[v]) for v in order]
    stay, mass = [], 0.0
    for v, weight in zip(order, weights, strict=True):
        if top_p is None or mass < top_p:
            stay.append(v)
        mass += weight / sum(weights)
    return set(stay)


@pytest.mark.parametrize("top_k", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
def test_filtering_keeps_the_likeliest(rng, top_k, top_p):
    logits = jnp.float32(2 * rng.standard_normal((5, 8)))
    kept = np.asarray(filter_logits(logits, top_k, top_p))
    for row in range(5):
        stay = reference_filter(np.float64(logits[row]), top_k, top_p)
        assert {int(v) for v in np.flatnonzero(np.isfinite(kept[row]))} == stay
        assert all(kept[row, v] == logits[row, v] for v in stay)


def test_filtering_edge_cases():
    # Equals stay together; the likeliest stays whatever p is; exactly p is enough.
    def kept(probabilities, **options):
        logits = jnp.log(jnp.float32(probabilities))
        return np.flatnonzero(np.isfinite(filter_logits(logits, **options))).tolist()

    assert kept([0.25, 0.25, 0.25, 0.25], top_k=2) == [0, 1, 2, 3]
    assert kept([0.1, 0.4, 0.4, 0.1], top_p=0.3) == [1, 2]
    assert kept([0.1, 0.9], top_p=1e-9) == [1]
    assert kept([0.125, 0.5, 0.25, 0.125], top_p=0.5) == [1]
    assert kept([0.125, 0.5, 0.25, 0.125], top_p=0.51) == [1, 2]
    for options, word in [({"top_k": 0}, "0"), ({"top_p": 0.0}, "0.0"), ({"top_p": 1.5}, "1.5")]:
        assert_refuses(partial(kept, [0.5, 0.5], **options), words=[next(iter(options)), word])


def test_a_p_of_1_keeps_everything(rng):
    logits = jnp.float32(3 * rng.standard_normal((4, 30_000)))
    np.testing.assert_array_equal(filter_logits(logits, top_p=1.0), logits)


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


@partial(jax.jit, static_argnames=("count", "temperature", "top_k", "top_p"))
def draw_from(logits, key, count, **options):
    def step(tokens, index, cache):
        return jnp.broadcast_to(logits, (*tokens.shape, 5)), cache

    cache = jnp.zeros((2, count))
    return sample(step, cache, key, bos=BOS, eos=9, max_length=2, **options)


def draw(count, seed=0, **options):
    """Samples [2, count, 2] of a model that always says PROBABILITIES."""
    logits = jnp.log(jnp.float32(PROBABILITIES))
    return draw_from(logits, jax.random.PRNGKey(seed), count, **options)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, np.sqrt(PROBABILITIES)),
        ({"top_k": 3}, PROBABILITIES * [0, 1, 0, 1, 1]),
        ({"top_p": 0.6}, PROBABILITIES * [0, 1, 0, 1, 0]),
        # The temperature comes first: at 1/2 the squares are .0025 .16 .01 .09 .0225.
        ({"temperature": 0.5, "top_p": 0.8}, PROBABILITIES**2 * [0, 1, 0, 1, 0]),
    ],
)
def test_samples_follow_the_distribution(options, weights):
    drawn = draw(4000, **options)
    expected = weights / weights.sum()
    # Both rows and both positions are fair, and independent: pairs have the product's frequency.
    deviation = np.sqrt(expected * (1 - expected) / 4000)
    for row in range(2):
        for index in range(2):
            observed = np.bincount(drawn.tokens[row, :, index], minlength=5) / 4000
            assert (abs(observed - expected) <= 4.5 * deviation).all()
    columns = drawn.tokens.transpose(0, 2, 1).reshape(4, 4000)
    for one, other in itertools.combinations(np.asarray(columns), 2):
        agreement = (expected**2).sum()
        deviation = math.sqrt(agreement * (1 - agreement) / 4000)
        assert abs((one == other).mean() - agreement) <= 4.5 * deviation
    # Scores are the model's own, before temperature and restriction.
    log_probs = np.log(PROBABILITIES)[np.asarray(drawn.tokens)].sum(-1)
    assert_close(drawn.log_probs, log_probs, 1e-5)
    assert_close(drawn.scores, log_probs, 1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    call = partial(draw, 1, temperature=temperature)
    assert_refuses(call, words=["temperature", str(temperature)])


def test_the_key_decides():
    one, again, other = (draw(4000, seed).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_small_temperature_takes_the_likeliest():
    assert (draw(50, temperature=1e-3).tokens == PROBABILITIES.argmax()).all()


@pytest.mark.parametrize("search", [greedy, beam_search, partial(sample, key=jax.random.key(0))])
def test_a_start_symbol_outside_the_vocabulary_is_refused(search):
    with pytest.raises(ValueError, match=r"bos holds 4, .* \[0, 4\)"):
        search(history_step, start_states(2, 1), bos=VOCABULARY, eos=EOS, max_length=3)


@pytest.mark.gives_nan
def test_beyond_the_cache_there_is_no_number():
    @jax.jit
    def logits_at(params, index):
        step, cache = start_decoding(Transformer(PAPER), params, SOURCE, 2, max_length=6)
        return step(jnp.ones((3, 2), jnp.int32), index, cache)[0]

    assert np.isfinite(logits_at(parameters(PAPER), 5)).all()
    assert np.isnan(logits_at(parameters(PAPER), 6)).all()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_of_no_sources_there_are_no_hypotheses(search):
    decoded = decode(search, parameters(PAPER), 2, source=SOURCE[:0])
    assert decoded.tokens.shape == (0, 2, 6)
    assert decoded.scores.shape == (0, 2)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_source_of_no_tokens_is_decoded(search):
    decoded = decode(search, parameters(PAPER), 2, source=SOURCE[:, :0])
    assert np.isfinite(decoded.scores).all()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_start_symbol_may_be_traced_or_differ_between_sources(search):
    params = parameters(PAPER)

    @jax.jit
    def decode_from(bos):
        step, cache = start_decoding(Transformer(PAPER), params, SOURCE, 2, 6)
        return search(step, cache, bos=bos, eos=EOS, max_length=6)

    step, cache = start_decoding(Transformer(PAPER), params, SOURCE, 2, 6)
    of_each = [search(step, cache, bos=bos, eos=EOS, max_length=6) for bos in (BOS, 4)]
    for bos, expected in zip((BOS, 4), of_each, strict=True):
        np.testing.assert_array_equal(decode_from(bos).tokens, expected.tokens)
    mixed = search(step, cache, bos=np.array([[BOS], [4], [BOS]]), eos=EOS, max_length=6)
    for row, expected in enumerate((of_each[0], of_each[1], of_each[0])):
        np.testing.assert_array_equal(mixed.tokens[row], expected.tokens[row])


def test_a_step_may_hold_what_is_no_array():
    def shifted(by, tokens, index, cache):
        return jnp.roll(history_step(tokens, index, cache)[0], int(by), -1), cache

    found = greedy(
        jax.tree_util.Partial(shifted, 1), start_states(2, 1), bos=BOS, eos=EOS, max_length=3
    )
    assert found.tokens.shape == (2, 1, 3)


def test_no_room_is_refused():
    search = partial(greedy, history_step, start_states(2, 1), bos=BOS, eos=EOS)
    assert_refuses(lambda: search(max_length=0), words=["max_length=0"], error=ValueError)


def test_hypotheses_beyond_all_that_there_are_do_not_exist():
    space = list(all_sequences(2))
    found = search_histories(len(space) + 3, 2, 0.6)
    assert found.exists.sum(-1).tolist() == [len(space)] * 2
    assert found.exists[:, : len(space)].all()


@pytest.mark.gives_nan
def test_before_the_cache_there_is_no_number():
    step, cache = start_decoding(Transformer(PAPER), parameters(PAPER), SOURCE, 2, max_length=6)
    assert np.isnan(step(jnp.ones((3, 2), jnp.int32), -1, cache)[0]).all()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_step_that_is_a_pytree_finds_what_its_function_finds(search):
    params = parameters(PAPER)
    step, cache = start_decoding(Transformer(PAPER), params, SOURCE, 2, 6)
    as_pytree = search(step, cache, bos=BOS, eos=EOS, max_length=6)
    as_function = search(lambda *x: step(*x), cache, bos=BOS, eos=EOS, max_length=6)
    jax.tree.map(partial(assert_close, tolerance=1e-5), as_pytree, as_function)


def test_ids_that_can_be_seen_are_refused():
    model, params = Transformer(PAPER), parameters(PAPER)
    words = ["source", "7", "[0, 7)"]
    start = partial(start_decoding, model, params)
    assert_refuses(start, SOURCE.at[0, 0].set(7), 2, 6, words=words, error=ValueError)
    step, cache = start(SOURCE, 2, 6)
    words = ["tokens", "-1", "[0, 7)"]
    assert_refuses(step, jnp.full((3, 2), -1), 0, cache, words=words, error=ValueError)


def test_decoding_exported_with_symbolic_sizes_is_decoding():
    model, params = Transformer(PAPER), parameters(PAPER)

    @jax.jit
    def search(params, source):
        step, cache = start_decoding(model, params, source, 3, 6)
        return beam_search(step, cache, bos=BOS, eos=EOS, max_length=6)[0]

    source = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, s"), jnp.int32)
    exported = jax.export.export(search)(params, source)
    for rows in (1, 3):
        np.testing.assert_array_equal(
            exported.call(params, SOURCE[:rows]), search(params, SOURCE[:rows])
        )


def test_a_traced_p_of_0_leaves_the_likeliest(rng):
    logits = jnp.float32(rng.standard_normal((5, 8)))
    kept = jax.jit(lambda p: filter_logits(logits, top_p=p))(0.0)
    np.testing.assert_array_equal(jnp.isfinite(kept).sum(-1), np.ones(5))
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))


def test_a_step_may_be_compiled_and_a_number_be_an_array():
    step, cache = start_decoding(Transformer(PAPER), parameters(PAPER), SOURCE, 1, 6)
    tokens = jnp.ones((3, 1), jnp.int32)
    assert_close(jax.jit(step)(tokens, 0, cache)[0], step(tokens, 0, cache)[0], 1e-5)
    plain, arrays = (
        greedy(step, cache, bos=kind(BOS), eos=kind(EOS), max_length=kind(6)).tokens
        for kind in (int, jnp.int32)
    )
    np.testing.assert_array_equal(plain, arrays)


def test_a_model_with_functions_made_anew_is_not_kept():
    params, held = parameters(PAPER), []
    for _ in range(2):

        def same(x, scale, bias, epsilon):
            return tfm.layer_norm(x, scale, bias, epsilon)

        held.append(weakref.ref(same))
        model = Transformer(PAPER, tfm.Functions(layer_norm=same))
        step, cache = start_decoding(model, params, SOURCE, 1, 6)
        greedy(step, cache, bos=BOS, eos=EOS, max_length=6)
        tfm.summed_loss(model, params, {"source": SOURCE, "target": SOURCE}, BOS, 0.1)
        del same, model, step
    gc.collect()
    assert [ref() for ref in held] == [None, None]
