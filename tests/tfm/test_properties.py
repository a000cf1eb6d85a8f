"""P of docs/reliability.md: what holds for every shape, mask and dtype that may be asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfm

pytestmark = pytest.mark.slow  # each shape is compiled anew
settings.register_profile("tfm", max_examples=25, deadline=None, derandomize=True)
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


@settings(max_examples=8)
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
