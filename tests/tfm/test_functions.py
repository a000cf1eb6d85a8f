"""Functions and modules of a user's in the place of ours."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.parallel import mesh as meshes
from tfm.parallel.mesh import MeshConfig

CONFIG = tfm.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=2, num_decoder_layers=3,
    dropout_rate=0.0,
)  # fmt: skip
TOKENS = jnp.array([[3, 4, 5, 2, 0], [6, 3, 2, 0, 0]])
ONES, PLACES = jnp.ones((4, 5), jnp.int32), jnp.tile(jnp.arange(5), (4, 1))
BATCH = {
    "source": jnp.tile(TOKENS, (2, 1)), "source_segment_ids": ONES, "source_positions": PLACES,
    "target": jnp.tile(TOKENS[::-1], (2, 1)), "target_segment_ids": ONES,
    "target_positions": PLACES,
}  # fmt: skip


@pytest.fixture(autouse=True)
def strict():
    """Not here: a user's functions may let NumPy add axes."""


@pytest.fixture(scope="module")
def params():
    return tfm.Transformer(CONFIG).init(jax.random.key(0), TOKENS, TOKENS)["params"]


def logits(params, functions=tfm.Functions()):  # noqa: B008 (immutable)
    return tfm.Transformer(CONFIG, functions).apply({"params": params}, TOKENS, TOKENS)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("attention_weights", 2 + 2 * 3),  # encoder; decoder and cross
        ("feed_forward", 2 + 3),
        ("layer_norm", 2 * 2 + 3 * 3),
        ("sinusoidal_positions", 2),
    ],
)
def test_the_model_calls_the_function_that_it_is_given_wherever_it_is_due(params, name, calls):
    called = []

    def counting(*arguments, **options):
        called.append(name)
        return getattr(tfm, name)(*arguments, **options)

    counted = logits(params, tfm.Functions(**{name: counting}))
    np.testing.assert_array_equal(counted, logits(params))
    assert len(called) == calls


def test_without_the_feed_forward_network_is_with_its_second_matrix_at_0(params):
    def nothing(x, *weights, **options):
        return jnp.zeros_like(x)

    def silenced(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key in ("w2", "b2") else leaf

    expected = logits(jax.tree_util.tree_map_with_path(silenced, params))
    np.testing.assert_allclose(logits(params, tfm.Functions(feed_forward=nothing)), expected)


def test_behind_two_stars_comes_what_the_config_sets_apart_alone(params):
    """A function of before implementations had a name takes `compute_dtype` alone."""
    told = []

    def mine(query, key, mask, **options):
        told.append(options)
        return tfm.attention_weights(query, key, mask)

    for implementation in ("auto", "formula"):
        config = dataclasses.replace(CONFIG, implementation=implementation)
        model = tfm.Transformer(config, tfm.Functions(attention_weights=mine))
        jax.eval_shape(lambda p, m=model: m.apply({"params": p}, TOKENS, TOKENS), params)
    assert told[0] == {"compute_dtype": "float32"}
    assert told[-1] == {"compute_dtype": "float32", "implementation": "formula"}


def test_a_replaced_function_is_used_in_decoding_too(params):
    def uniform(query, key, mask, **options):
        return tfm.attention_weights(0 * query, key, mask, **options)

    model = tfm.Transformer(CONFIG, tfm.Functions(attention_weights=uniform))
    labels = jnp.array([[3, 4, 5, 6, 2]] * 2)
    inputs = tfm.shift_right(labels, bos=1)
    expected = model.apply({"params": params}, TOKENS, inputs)
    step, cache = tfm.start_decoding(model, params, TOKENS, num_hypotheses=1, max_length=5)
    for i in range(5):
        stepped, cache = step(inputs[:, i : i + 1], i, cache)
        np.testing.assert_allclose(stepped[:, 0], expected[:, i], rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, logits(params)[:, :5], atol=1e-3)


def test_parameters_do_not_depend_on_the_functions(params):
    def identity(x, *weights, **options):
        return x

    model = tfm.Transformer(CONFIG, tfm.Functions(layer_norm=identity))
    other = model.init(jax.random.key(0), TOKENS, TOKENS)["params"]
    assert jax.tree.structure(other) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, other, params)


# Positions, as a user adds them


def no_positions(positions, d_model):
    return 0 * tfm.sinusoidal_positions(positions, d_model)


def distances(query_positions, key_positions):
    """[..., 1, L, K]"""
    return query_positions[..., None, :, None] - key_positions[..., None, None, :]


def alibi(query, key, mask, *, query_positions, key_positions, kind, **options):
    """Press et al. 2022, in self-attention."""
    slopes = 2.0 ** -jnp.arange(1, query.shape[-3] + 1)[:, None, None]
    far = jnp.abs(distances(query_positions, key_positions))
    bias = None if kind == "cross" else -slopes * far
    return tfm.attention_weights(query, key, mask, bias=bias, **options)


def rotate(x, positions):
    """Su et al. 2021: x [..., H, L, d_k] turned by its positions [..., L]."""
    d_k = x.shape[-1]
    angles = positions[..., None, :, None] / 100.0 ** (jnp.arange(d_k // 2) / (d_k // 2))
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)


def rotary(query, key, mask, *, query_positions, key_positions, kind, **options):
    if kind != "cross":
        query, key = rotate(query, query_positions), rotate(key, key_positions)
    return tfm.attention_weights(query, key, mask, **options)


class LearnedBias(nn.Module):
    """Shaw et al. 2018, as T5 has it: a number for each head and distance."""

    config: tfm.TransformerConfig

    @nn.compact
    def __call__(self, query, key, mask, *, query_positions, key_positions, **options):
        table = self.param("relative", nn.initializers.normal(), (query.shape[-3], 9))
        far = jnp.clip(distances(query_positions, key_positions)[..., 0, :, :], -4, 4)
        bias = jnp.moveaxis(table[:, far + 4], 0, -3)
        return tfm.attention_weights(query, key, mask, bias=bias, **options)


SEARCHES = {
    "greedy": tfm.greedy,
    "beam": tfm.beam_search,
    "sample": partial(tfm.sample, key=jax.random.key(3)),
}
EOS, STEPS = 2, 6


def packed_by_twos(rows, is_real):
    """[2N, L] -> packed rows [N, 2L], their segment ids and positions."""
    n, length = rows.shape
    segments = jnp.where(is_real, 1 + jnp.arange(n)[:, None] % 2, 0)
    positions = jnp.broadcast_to(jnp.arange(length), rows.shape)
    return [x.reshape(n // 2, 2 * length) for x in (rows, segments, positions)]


def scores(model, params, source, target, is_real, is_packed):
    """ln P of each target [N, T] after its source [N, S]."""
    shifted = tfm.shift_right(target, bos=1)
    options = {"target_segment_ids": is_real.astype(int)}
    if is_packed:
        source, source_segments, source_positions = packed_by_twos(source, source != 0)
        shifted, segments, positions = packed_by_twos(shifted, is_real)
        options = {
            "source_segment_ids": source_segments, "source_positions": source_positions,
            "target_segment_ids": segments, "target_positions": positions,
        }  # fmt: skip
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, source, shifted, **options))
    log_probs = log_probs.reshape(*target.shape, -1)
    chosen = jnp.take_along_axis(log_probs, target[..., None], -1)[..., 0]
    return jnp.where(is_real, chosen, 0).sum(-1)


@pytest.mark.parametrize("weights", [alibi, rotary, LearnedBias], ids=lambda f: f.__name__)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_positions_in_attention_are_the_same_in_decoding(weights, search, is_packed):
    functions = tfm.Functions(attention_weights=weights, sinusoidal_positions=no_positions)
    model = tfm.Transformer(CONFIG, functions)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + jnp.float32(rng.standard_normal(x.shape)),
        model.init(jax.random.key(0), TOKENS, TOKENS)["params"],
    )
    step, cache = tfm.start_decoding(model, params, TOKENS, num_hypotheses=3, max_length=STEPS)
    found = SEARCHES[search](step, cache, bos=1, eos=EOS, max_length=STEPS)
    tokens, lengths = found.tokens.reshape(-1, STEPS), found.lengths.reshape(-1, 1)
    given = jnp.repeat(TOKENS, 3, 0), tokens, jnp.arange(STEPS) < lengths, is_packed
    expected = scores(model, params, *given)
    np.testing.assert_allclose(found.log_probs.ravel(), expected, atol=1e-5, rtol=1e-5)
    without = tfm.Transformer(CONFIG, tfm.Functions(sinusoidal_positions=no_positions))
    assert (
        np.abs(scores(without, params, *given) - expected).max() > 1e-4
    )  # ten times what is allowed


def test_the_heads_of_alibi_see_the_nearest(params):
    """Of keys that are all alike, with the slope 1/2 of the first head."""
    query, mask = jnp.zeros((1, 1, 3, 8)), tfm.causal_mask(3)
    at = jnp.arange(3)[None]
    weights = alibi(query, query, mask, query_positions=at, key_positions=at, kind="decoder")
    e = np.exp(-0.5)
    expected = [[1, 0, 0], [e / (1 + e), 1 / (1 + e), 0], np.array([e**2, e, 1]) / (1 + e + e**2)]
    np.testing.assert_allclose(weights[0, 0], np.array(expected), rtol=1e-6)


# Modules with parameters of their own


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019: no mean, no bias."""

    config: tfm.TransformerConfig
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale


class GatedFeedForward(nn.Module):
    """Shazeer 2020: (swish(x W) ⊙ x V) W₂."""

    config: tfm.TransformerConfig

    @nn.compact
    def __call__(self, x):
        inner = lambda name: nn.Dense(self.config.d_ff, use_bias=False, name=name)  # noqa: E731
        gated = nn.silu(inner("gate")(x)) * inner("up")(x)
        return nn.Dense(self.config.d_model, use_bias=False, name="down")(gated)


OWN = tfm.Functions(
    layer_norm=partial(RMSNorm, epsilon=1e-5),
    feed_forward=GatedFeedForward,
    attention_weights=LearnedBias,
)


def test_a_module_has_its_parameters_where_ours_were():
    model = tfm.Transformer(CONFIG, OWN)
    params = model.init(jax.random.key(0), TOKENS, TOKENS)["params"]
    layer = params["decoder_2"]
    assert set(layer["cross_attention_norm"]) == {"scale"}
    assert set(layer["feed_forward"]) == {"gate", "up", "down"}
    assert set(layer["self_attention"]) == {"w_q", "w_k", "w_v", "w_o", "relative"}


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, {"rematerialize": "layers"},
                                     {"norm_placement": "pre"}], ids=str)  # fmt: skip
def test_modules_of_a_user_s_are_trained(changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = tfm.Transformer(config, OWN)
    optimizer = tfm.make_optimizer(lambda step: 1e-2, 1.0)
    state = tfm.init_state(model, optimizer, jax.random.PRNGKey(0))
    before = state.params
    step = jax.jit(tfm.make_train_step(model, optimizer, bos=1))
    losses = []
    for _ in range(8):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, state.params)
    assert all(jax.tree.leaves(moved)), moved


def test_modules_of_a_user_s_are_divided_by_name_or_not_at_all():
    """On a mesh the losses are those of one device."""
    config = dataclasses.replace(CONFIG, d_model=16, d_ff=16, num_heads=2)
    model, optimizer = tfm.Transformer(config, OWN), tfm.make_optimizer(lambda step: 1e-2, 1.0)
    state = tfm.init_state(model, optimizer, jax.random.PRNGKey(0))
    step = tfm.make_train_step(model, optimizer, bos=1)
    alone, metrics = jax.jit(step)(state, BATCH)
    divided = meshes.make_mesh(MeshConfig(2, 2, 2))
    shardings = meshes.state_shardings(divided, state)
    relative = shardings.params["encoder_0"]["attention"]["relative"]
    assert relative.spec == jax.sharding.PartitionSpec() or not any(relative.spec)
    with jax.set_mesh(divided):
        placed = jax.device_put(state, shardings)
        batch = jax.device_put(BATCH, meshes.batch_sharding(divided))
        together, seen = jax.jit(step, out_shardings=(shardings, None))(placed, batch)
    np.testing.assert_allclose(seen["loss"], metrics["loss"], rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    jax.tree.map(close, jax.device_get(together.params), jax.device_get(alone.params))


# What does not fit


class Wide(nn.Module):
    config: tfm.TransformerConfig

    def __call__(self, x):
        return jnp.concatenate([x, x], -1)


class Keyed(nn.Module):
    config: tfm.TransformerConfig

    def __call__(self, x, y):
        return x


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"layer_norm": lambda x: x}, ["encoder_0/attention_norm", "layer_norm", "too many pos"]),
        ({"layer_norm": lambda x, *_: x[..., :3]}, ["encoder_0/attention_norm", "3)", "8)"]),
        ({"feed_forward": lambda *_: 1}, ["encoder_0/feed_forward", "returned int"]),
        ({"feed_forward": lambda x, *_: x > 0}, ["encoder_0/feed_forward", "bool"]),
        ({"attention_weights": lambda q, k, m: q}, ["encoder_0/attention", "(2, 2, 5, 5)"]),
        ({"layer_norm": Wide}, ["encoder_0/attention_norm", "Wide", "16)", "8)"]),
        ({"feed_forward": Keyed}, ["encoder_0/feed_forward", "Keyed", "'y'"]),
        (
            {"sinusoidal_positions": lambda n, d: jnp.zeros((d, n))},
            ["the model", "(8, 5)", "given 5, 8"],
        ),
    ],
)
def test_a_replacement_that_does_not_fit_is_named_with_its_layer(params, functions, words):
    with pytest.raises(TypeError) as caught:
        logits(params, tfm.Functions(**functions))
    assert all(word in str(caught.value) for word in words), caught.value


class WithoutConfig(nn.Module):
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("rms", "layer_norm.*not str"),
        (Wide(tfm.TransformerConfig()), "must be the class Wide, not a module made of it"),
        (WithoutConfig, "WithoutConfig.*must have a field config"),
        (nn.RMSNorm, "RMSNorm.*must have a field config.*a ready module in one of yours"),
        (partial(nn.LayerNorm, epsilon=1e-5), "LayerNorm.*must have a field config"),
    ],
)
def test_what_is_no_function_is_refused(given, told):
    with pytest.raises(TypeError, match=told):
        tfm.Functions(layer_norm=given)


def test_the_class_in_the_place_of_functions_is_refused(params):
    with pytest.raises(TypeError, match=r"must be a tfm.Functions\(…\), not Functions"):
        logits(params, tfm.Functions)


def test_a_misspelled_position_lists_what_may_be_named(params):
    def mine(query, key, mask, *, query_position):
        return tfm.attention_weights(query, key, mask)

    told = "'query_position'.*it may name kind, query_positions, key_positions"
    with pytest.raises(TypeError, match=told):
        logits(params, tfm.Functions(attention_weights=mine))


def test_an_error_inside_a_replacement_names_its_layer(params):
    with pytest.raises(ZeroDivisionError) as caught:
        logits(params, tfm.Functions(feed_forward=lambda x, *_: 1 / 0))
    assert "encoder_0/feed_forward: Functions.feed_forward=" in caught.value.__notes__[0]
