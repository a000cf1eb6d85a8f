"""P of docs/reliability.md: what holds for every shape, mask and dtype that may be asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfm

pytestmark = pytest.mark.slow  # each shape is compiled anew
settings.register_profile("tfm", max_examples=15, deadline=None, derandomize=True)
settings.load_profile("tfm")

SIZES = st.integers(1, 5)
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
SEEDS = st.integers(0, 2**31 - 1)


def normal(seed, shape, dtype=jnp.float32, scale=1.0):
    drawn = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(drawn, dtype)


def tolerance(dtype):
    return 4 * float(jnp.finfo(dtype).eps)


@given(SIZES, SIZES, SIZES, SIZES, DTYPES, SEEDS, st.floats(0, 1))
def test_attention_is_a_mixture_of_the_values_and_its_gradients_are_finite(
    heads, queries, keys, size, dtype, seed, kept
):
    q = normal(seed, (heads, queries, size), dtype, 3)
    k, v = (normal(seed + i, (heads, keys, size), dtype, 3) for i in (1, 2))
    mask = jnp.asarray(np.random.default_rng(seed).random((heads, queries, keys)) < kept)
    weights = tfm.attention_weights(q, k, mask)
    seen = np.asarray(mask.any(-1))
    sums = np.asarray(weights, np.float64).sum(-1)
    np.testing.assert_allclose(sums[seen], 1, atol=keys * tolerance(dtype))
    assert (sums[~seen] == 0).all() and (np.asarray(weights)[~np.asarray(mask)] == 0).all()

    def out(*arrays):
        return tfm.scaled_dot_product_attention(*arrays, mask)

    mixed = out(q, k, v)
    assert mixed.shape == q.shape and jnp.isfinite(mixed).all()
    bound = np.abs(np.asarray(v, np.float64)).max() * (1 + keys * tolerance(dtype))
    assert np.abs(np.asarray(mixed, np.float64)).max() <= bound
    gradients = jax.grad(lambda *a: out(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in gradients)


@given(SIZES, SIZES, SIZES, SIZES, SEEDS)
def test_heads_split_and_merge_back(batch, length, heads, size, seed):
    x = normal(seed, (batch, length, heads * size))
    split = tfm.split_heads(x, heads)
    assert split.shape == (batch, heads, length, size)
    np.testing.assert_array_equal(tfm.merge_heads(split), x)


@given(SIZES, st.integers(2, 9), DTYPES, SEEDS, st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_layer_norm_has_mean_0_and_never_breaks(rows, size, dtype, seed, mean, spread):
    x = normal(seed, (rows, size), jnp.float32, spread) + mean
    x = x.astype(dtype)
    one, zero = jnp.ones(size, dtype), jnp.zeros(size, dtype)
    y = tfm.layer_norm(x, one, zero)
    assert y.shape == x.shape and jnp.isfinite(y).all()
    assert np.abs(np.asarray(y, np.float64)).max() <= (size - 1) ** 0.5 * (1 + tolerance(dtype))
    gradient = jax.grad(lambda x: tfm.layer_norm(x, one, zero).astype(jnp.float32).sum())(x)
    assert jnp.isfinite(gradient).all()


@given(SIZES, st.integers(2, 9), SEEDS, st.floats(0, 0.9), st.floats(0, 50))
def test_the_loss_is_never_below_the_entropy_of_its_target(
    rows, vocabulary, seed, smoothing, scale
):
    logits = normal(seed, (rows, vocabulary), scale=scale)
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, rows), jnp.int32)
    losses = tfm.label_smoothed_cross_entropy(logits, labels, smoothing)
    assert losses.shape == (rows,) and jnp.isfinite(losses).all()
    target = np.full(vocabulary, smoothing / vocabulary)
    target[0] += 1 - smoothing
    entropy = -(target[target > 0] * np.log(target[target > 0])).sum()
    assert (np.asarray(losses) >= entropy - 1e-4).all()
    gradient = jax.grad(lambda x: tfm.label_smoothed_cross_entropy(x, labels, smoothing).sum())(
        logits
    )
    np.testing.assert_allclose(np.asarray(gradient).sum(-1), 0, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 20))
def test_positions_lie_on_circles(length, half):
    table = np.asarray(tfm.sinusoidal_positions(length, 2 * half), np.float64)
    assert table.shape == (length, 2 * half)
    np.testing.assert_allclose((table**2).sum(-1), half, rtol=1e-5)


@given(st.lists(SIZES, min_size=1, max_size=4), SEEDS, st.floats(-6, 6), st.floats(0.01, 10))
def test_clipping_shortens_and_never_turns(shapes, seed, power, threshold):
    tree = [normal(seed + i, (n,), scale=10**power) for i, n in enumerate(shapes)]
    clipped = tfm.clip_by_global_norm(tree, threshold)
    before, after = (float(tfm.global_norm(t)) for t in (tree, clipped))
    assert after <= min(before, threshold) * (1 + 1e-5)
    scaled = [np.asarray(x) * (after / before) for x in tree]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=0), clipped, scaled)


@given(SIZES, SIZES, st.floats(0, 0.99), SEEDS)
def test_dropout_keeps_or_scales(rows, columns, rate, seed):
    x = normal(seed, (rows, columns)) + 10
    y = np.asarray(tfm.dropout(jax.random.PRNGKey(seed), x, rate))
    kept, p = y != 0, min(round(rate * 256), 255) / 256
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - p), rtol=1e-6)


@settings(max_examples=5)
@given(
    heads=SIZES, size=SIZES, encoder=st.integers(1, 2), decoder=st.integers(1, 2),
    lengths=st.tuples(SIZES, SIZES), rows=SIZES, seed=SEEDS,
    placement=st.sampled_from(["post", "pre"]),
    positions=st.sampled_from(["sinusoidal", "learned"]),
)  # fmt: skip
def test_every_model_gives_finite_logits_and_gradients(
    heads, size, encoder, decoder, lengths, rows, seed, placement, positions
):
    config = tfm.TransformerConfig(
        vocab_size=7, d_model=2 * heads * size, d_ff=4, num_heads=heads, dropout_rate=0.1,
        num_encoder_layers=encoder, num_decoder_layers=decoder, norm_placement=placement,
        positions=positions,
    )  # fmt: skip
    model, rng = tfm.Transformer(config), np.random.default_rng(seed)
    # 0 is padding: a row may be padding through and through.
    source, target = (jnp.asarray(rng.integers(0, 7, (rows, n)), jnp.int32) for n in lengths)
    params = jax.jit(model.init)(jax.random.key(0), source, target)["params"]

    def loss(params):
        key = jax.random.PRNGKey(seed)
        logits = model.apply({"params": params}, source, target, dropout_key=key)
        assert logits.shape == (rows, lengths[1], 7)
        return tfm.label_smoothed_cross_entropy(logits, target, 0.1).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
NAMED = (AssertionError, ValueError, TypeError)


@given(st.lists(SHAPES, min_size=3, max_size=3), SHAPES, st.sampled_from([bool, np.float32]))
def test_arrays_that_do_not_fit_are_refused_by_name(shapes, mask_shape, mask_type):
    q, k, v = (jnp.ones(shape) for shape in shapes)
    try:
        out = tfm.scaled_dot_product_attention(q, k, v, jnp.ones(mask_shape, mask_type))
    except NAMED as error:
        assert any(name in str(error) for name in ("query", "key", "value", "mask")), error
    else:
        assert out.shape == (*q.shape[:-1], v.shape[-1]) and not jnp.isnan(out).any()


@given(SHAPES, st.integers(-1, 4))
def test_heads_that_do_not_divide_are_refused_by_name(shape, heads):
    try:
        split = tfm.split_heads(jnp.ones(shape), heads)
    except NAMED as error:
        assert "num_heads" in str(error) or "x" in str(error)
    else:
        np.testing.assert_array_equal(tfm.merge_heads(split), jnp.ones(shape))


@given(st.lists(SHAPES, min_size=5, max_size=5))
def test_a_feed_forward_that_does_not_fit_is_refused_by_name(shapes):
    x, *weights = (jnp.ones(shape) for shape in shapes)
    try:
        y = tfm.feed_forward(x, *weights)
    except NAMED as error:
        assert any(name in str(error) for name in ("x", "w1", "b1", "w2", "b2")), error
    else:
        assert y.shape == x.shape


@given(SIZES, SIZES, SIZES, DTYPES, SEEDS)
def test_the_feed_forward_is_finite_in_every_dtype(rows, d, f, dtype, seed):
    shapes = ((rows, d), (d, f), (f,), (f, d), (d,))
    arrays = [normal(seed + i, shape, dtype) for i, shape in enumerate(shapes)]
    y = tfm.feed_forward(*arrays)
    assert y.shape == (rows, d) and jnp.isfinite(y).all()
    gradients = jax.grad(
        lambda *a: tfm.feed_forward(*a).astype(jnp.float32).sum(), argnums=range(5)
    )(*arrays)
    assert all(jnp.isfinite(g).all() for g in gradients)


@given(SIZES, SIZES, st.integers(0, 3))
def test_masks_allow_what_they_say(length, keys, segments):
    rng = np.random.default_rng(length * 31 + keys)
    query_ids, key_ids = (rng.integers(0, segments + 1, n) for n in (length, keys))
    expected = (query_ids[:, None] == key_ids) & (query_ids[:, None] > 0)
    mask = np.asarray(tfm.segment_mask(jnp.asarray(query_ids), jnp.asarray(key_ids)))
    np.testing.assert_array_equal(mask.reshape(length, keys), expected)
    causal = np.asarray(tfm.causal_mask(length)).reshape(length, length)
    np.testing.assert_array_equal(causal, np.tril(np.ones((length, length), bool)))


@settings(max_examples=5)
@given(rows=SIZES, width=SIZES, length=SIZES, vocabulary=st.integers(2, 6), seed=SEEDS)
def test_decoding_gives_sequences_with_their_own_scores(rows, width, length, vocabulary, seed):
    table = normal(seed, (vocabulary, vocabulary))

    def step(tokens, index, cache):
        return table[tokens], cache

    cache = jnp.zeros((rows, width))
    found = tfm.beam_search(step, cache, bos=0, eos=1, max_length=length, alpha=0.6)
    log_probs = np.asarray(jax.nn.log_softmax(table), np.float64)
    assert found.tokens.shape == (rows, width, length)
    for tokens, count, total in zip(
        *(np.asarray(x).reshape(rows * width, -1) for x in found[:3]), strict=True
    ):
        path = [0, *tokens[: int(count[0])]]
        expected = sum(log_probs[a, b] for a, b in zip(path, path[1:], strict=False))
        if np.isfinite(total[0]):  # a beam wider than the space has hypotheses that do not exist
            assert abs(total[0] - expected) < 1e-4
        assert (tokens[int(count[0]) :] == 0).all()
