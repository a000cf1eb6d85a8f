import sys
from dataclasses import replace
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import references
from checks import assert_close, assert_refuses, relative_error
from jax.flatten_util import ravel_pytree

import tfm.model
import tfm.sublayers
from tfm import Transformer, TransformerConfig, multi_head_attention, shift_right
from tfm.training import param_shapes

# Two layers each side: what one layer hands to the next is tested too.
PAPER = TransformerConfig(
    vocab_size=11, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=2, num_decoder_layers=2
)
DEPARTED = replace(
    PAPER,
    source_vocab_size=9,
    norm_placement="pre",
    layer_norm_epsilon=0.1,
    projection_bias=True,
    output_bias=True,
    positions="learned",
    max_learned_positions=6,
)
VARIED = replace(
    PAPER,
    activation="swish",
    final_norm=True,
    tied_output=False,
    scale_embeddings=False,
    sinusoid_layout="halves",
    first_position=2,
)
SOURCE = jnp.array([[3, 5, 2, 8, 4], [6, 1, 7, 0, 0]])
TARGET = jnp.array([[1, 9, 4, 2], [1, 5, 0, 0]])


@partial(jax.jit, static_argnums=0)
def run(config, params, source=SOURCE, target=TARGET, **options):
    """Logits and weights."""
    model = Transformer(config)
    return model.apply({"params": params}, source, target, return_weights=True, **options)


def random_parameters(config, seed=0):
    """Nothing at its initial value: no bias is zero, no scale is one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32),
        param_shapes(config),
    )


DROPPING = [sys.modules[f"tfm.{name}"] for name in ("feed_forward", "layers", "model", "sublayers")]


def identity(x):
    return x


def reference_attention(p, config, x, y, mask, drop):
    """Attention of x over y. `drop` acts on the weights, and must be a multiplication."""
    d_model = config.d_model
    zeros = {name: np.zeros(d_model) for name in ("b_q", "b_k", "b_v", "b_o")}
    p = zeros | p
    d_k = d_model // config.num_heads
    heads = []
    for i in range(config.num_heads):
        own = slice(i * d_k, (i + 1) * d_k)
        query, key, value = (
            references.matrix_product(inputs, p[f"w_{name}"][:, own]) + p[f"b_{name}"][own]
            for inputs, name in ((x, "q"), (y, "k"), (y, "v"))
        )
        heads.append(drop(references.attention(query, key, value, mask)))
    return references.matrix_product(np.concatenate(heads, axis=1), p["w_o"]) + p["b_o"]


def reference_embedding(p, config, side, tokens):
    table = p.get("source_embedding", p["embedding"]) if side == "source" else p["embedding"]
    x = references.embed(tokens, table) if config.scale_embeddings else table[tokens]
    for i in range(len(tokens)):
        position = config.first_position + i
        if config.positions == "learned":
            x[i] += p[f"{side}_positions"][position]
        else:
            layout = config.sinusoid_layout
            x[i] += references.sinusoidal_position(position, config.d_model, layout)
    return x


def reference_transformer(
    params, config, source, target, drop=identity, drop_weights=identity, drop_hidden=identity
):
    """Figure 1 for one pair of sequences, in float64, written with `references` only."""
    p = jax.tree.map(np.float64, params)

    def norm(p, x):
        return references.layer_norm(x, p["scale"], p["bias"], config.layer_norm_epsilon)

    def sublayer(p, name, x, function):
        if config.norm_placement == "pre":
            return x + drop(function(p[name], norm(p[f"{name}_norm"], x)))
        return norm(p[f"{name}_norm"], x + drop(function(p[name], x)))

    def attention(p, x, y, mask):
        return reference_attention(p, config, x, y, mask, drop_weights)

    def feed_forward(p, x):
        arrays = p["w1"], p["b1"], p["w2"], p["b2"]
        activation = getattr(references, config.activation)
        return references.activated_feed_forward(x, *arrays, activation, drop_hidden)

    real_source, real_target = np.int64(source != 0), np.int64(target != 0)
    mask = references.segment_mask(real_source, real_source)
    x = drop(reference_embedding(p, config, "source", source))
    for i in range(config.num_encoder_layers):
        layer = p[f"encoder_{i}"]
        x = sublayer(layer, "attention", x, lambda p, x: attention(p, x, x, mask))
        x = sublayer(layer, "feed_forward", x, feed_forward)
    encoded = norm(p["encoder_norm"], x) if "encoder_norm" in p else x

    causal = references.causal_mask(len(target))
    mask = references.segment_mask(real_target, real_target) & causal
    cross_mask = references.segment_mask(real_target, real_source)
    x = drop(reference_embedding(p, config, "target", target))
    for i in range(config.num_decoder_layers):
        layer = p[f"decoder_{i}"]
        x = sublayer(layer, "self_attention", x, lambda p, x: attention(p, x, x, mask))
        x = sublayer(layer, "cross_attention", x, lambda p, x: attention(p, x, encoded, cross_mask))
        x = sublayer(layer, "feed_forward", x, feed_forward)
    x = norm(p["decoder_norm"], x) if "decoder_norm" in p else x
    w = p["embedding"].T if config.tied_output else p["output"]
    return references.matrix_product(x, w) + p.get("output_bias", 0)


def assert_equals_reference(logits, params, config, **drops):
    for row in range(len(SOURCE)):
        source, target = np.asarray(SOURCE[row]), np.asarray(TARGET[row])
        expected = reference_transformer(params, config, source, target, **drops)
        assert_close(logits[row], expected, 1e-5)


@pytest.mark.parametrize(
    "config",
    [PAPER, DEPARTED, VARIED, replace(DEPARTED, first_position=1, activation="gelu")],
    ids=["the paper's", "departures", "others'", "learned from 1 on"],
)
def test_the_model_equals_the_reference(config):
    params = random_parameters(config)
    assert_equals_reference(run(config, params)[0], params, config)


@pytest.mark.usefixtures("traced_anew")
def test_dropout_acts_at_the_papers_places_and_nowhere_else(monkeypatch):
    # A multiplication stands in for dropout, in the model and in the reference.
    def multiply(key, x, rate):
        return x * (1 + rate)

    for module in DROPPING:
        monkeypatch.setattr(module, "dropout", multiply)
    config = replace(
        PAPER, dropout_rate=0.5, attention_dropout_rate=0.25, activation_dropout_rate=0.125
    )
    params = random_parameters(config)
    logits, _ = run(config, params, dropout_key=jax.random.key(0))
    rates = {"drop": 0.5, "drop_weights": 0.25, "drop_hidden": 0.125}
    drops = {name: partial(np.multiply, 1 + rate) for name, rate in rates.items()}
    assert_equals_reference(logits, params, config, **drops)


def test_every_place_of_dropout_draws_with_its_own_key(monkeypatch):
    keys, rates = [], {"attention_dropout_rate": 0.1, "activation_dropout_rate": 0.1}
    config = replace(PAPER, **rates)

    def record(key, x, rate):
        keys.append(key)
        return x

    for module in DROPPING:
        monkeypatch.setattr(module, "dropout", record)

    with jax.disable_jit():
        params, key = random_parameters(PAPER), jax.random.PRNGKey(0)
        Transformer(config).apply({"params": params}, SOURCE, TARGET, dropout_key=key)
    drawn = np.stack(keys)
    # Two embeddings; two encoder layers of 2 sub-layers, 1 attention and 1 activation, two decoder
    # layers of 3, 2 and 1.
    assert len({tuple(key) for key in drawn.tolist()}) == len(drawn) == 2 + 2 * 4 + 2 * 6


def test_dropout_depends_on_the_key_alone():
    params = random_parameters(PAPER)
    quiet, still_quiet = run(PAPER, params)[0], run(PAPER, params)[0]  # no key, whatever the rate
    one, again, other = (
        run(PAPER, params, dropout_key=jax.random.PRNGKey(seed))[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(quiet, still_quiet)
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=0.1)
    assert not np.allclose(one, quiet, atol=0.1)


@pytest.mark.parametrize("options", [{}, {"projection_bias": True}])
def test_attention_module_equals_the_function(rng, options):
    module = tfm.sublayers.MultiHeadAttention(replace(PAPER, **options))
    x, y = rng.standard_normal((3, 4, 8)), rng.standard_normal((3, 6, 8))
    mask = jnp.asarray(rng.random((3, 1, 4, 6)) < 0.7)

    def attend(module, x, y):
        return module.attend(module.query(x), *module.key_value(y), mask)[0]

    shapes = jax.eval_shape(partial(module.init, method=attend), jax.random.key(0), x, y)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), shapes["params"])
    params |= {name: jnp.zeros(8) for name in params if name.startswith("b_")}
    weights = [params[name] for name in ("w_q", "w_k", "w_v", "w_o")]
    actual = jax.jit(partial(module.apply, method=attend))({"params": params}, x, y)
    expected = jax.jit(multi_head_attention, static_argnums=6)(x, y, *weights, 2, mask)
    assert_close(actual, expected, 1e-5)


def test_one_matrix_is_both_embeddings_and_the_output():
    def tables(config):
        shapes = jax.tree_util.tree_leaves_with_path(param_shapes(config))
        sizes = (config.vocab_size, config.source_vocab_size)
        return {path[0].key: leaf.shape for path, leaf in shapes if set(leaf.shape) & set(sizes)}

    assert tables(PAPER) == {"embedding": (11, 8)}
    assert tables(replace(PAPER, source_vocab_size=9)) == {
        "embedding": (11, 8),
        "source_embedding": (9, 8),
    }


def test_attention_weights_have_their_shapes_and_sum_to_1_or_0():
    _, weights = run(PAPER, random_parameters(PAPER))
    expected = {"encoder": (2, 2, 2, 5, 5), "decoder": (2, 2, 2, 4, 4), "cross": (2, 2, 2, 4, 5)}
    assert {name: array.shape for name, array in weights.items()} == expected
    # Of the second pair, two source and two target positions are padding: not attended to. Its
    # queries have nothing to attend to.
    real = {"encoder": SOURCE != 0, "decoder": TARGET != 0, "cross": TARGET != 0}
    for name, queries in real.items():
        # A real query's row sums to 1, and a padding's to 0.
        wanted = np.broadcast_to(queries[:, None], weights[name].shape[:-1])
        assert_close(weights[name].sum(-1), wanted, 1e-6)
    assert (np.asarray(weights["cross"])[:, 1, :, :, 3:] == 0).all()
    assert (np.triu(weights["decoder"], 1) == 0).all()


def test_logits_come_alone_unless_weights_are_asked_for():
    params = random_parameters(PAPER)
    alone = jax.eval_shape(Transformer(PAPER).apply, {"params": params}, SOURCE, TARGET)
    assert alone.shape == (2, 4, 11)


def silence(params, kind, layer, head):
    """Zeroes the rows of w_o that belong to one head."""
    side = "encoder" if kind == "encoder" else "decoder"
    module = {"encoder": "attention", "decoder": "self_attention", "cross": "cross_attention"}[kind]
    attention = params[f"{side}_{layer}"][module]
    w_o = attention["w_o"].at[head * 4 : (head + 1) * 4].set(0)
    changed = params[f"{side}_{layer}"] | {module: attention | {"w_o": w_o}}
    return params | {f"{side}_{layer}": changed}


def test_a_head_mask_silences_a_head():
    params = random_parameters(PAPER)
    ones = {kind: jnp.ones((2, 2)) for kind in ("encoder", "decoder", "cross")}
    untouched, _ = run(PAPER, params)
    assert_close(run(PAPER, params, head_masks=ones)[0], untouched, 1e-6)
    for kind, layer, head in [("encoder", 0, 1), ("decoder", 1, 0), ("cross", 1, 1)]:
        masks = ones | {kind: ones[kind].at[layer, head].set(0)}
        silenced, _ = run(PAPER, params, head_masks=masks)
        assert_close(silenced, run(PAPER, silence(params, kind, layer, head))[0], 1e-5)
        assert not np.allclose(silenced, untouched, atol=1e-3)


def test_initialisers_have_their_names_variances():
    # Variance of w1 [D, F]: xavier 2/(D + F), lecun 1/D, he 2/D; of embeddings 1/D.
    d, f = 64, 192
    variances = {"xavier_uniform": 2 / (d + f), "lecun_normal": 1 / d, "he_normal": 2 / d}
    for name, variance in variances.items():
        w1 = tfm.sublayers.INITIALIZERS[name](jax.random.key(0), (d, f))
        assert np.var(w1) == pytest.approx(variance, rel=0.1)


def test_initial_parameters_follow_the_config():
    config = replace(
        PAPER,
        vocab_size=100,
        d_model=32,
        d_ff=96,
        num_encoder_layers=1,
        num_decoder_layers=1,
        initializer="he_normal",
    )
    params = jax.jit(Transformer(config).init)(jax.random.key(0), SOURCE, TARGET)["params"]
    assert np.var(params["embedding"]) == pytest.approx(1 / 32, rel=0.1)
    layer = params["encoder_0"]
    assert np.var(layer["feed_forward"]["w1"]) == pytest.approx(2 / 32, rel=0.1)
    assert np.var(layer["attention"]["w_q"]) == pytest.approx(2 / 32, rel=0.15)
    assert not np.array_equal(layer["attention"]["w_q"], layer["attention"]["w_k"])
    assert (layer["attention_norm"]["scale"] == 1).all()
    assert (layer["attention_norm"]["bias"] == 0).all()
    assert (layer["feed_forward"]["b1"] == 0).all()


def derive(source, target, config=PAPER, **options):
    """Traces the model; nothing is computed."""
    variables = {"params": param_shapes(config)}
    return jax.eval_shape(Transformer(config).apply, variables, source, target, **options)


def test_any_leading_axes():
    assert derive(SOURCE[0], TARGET[0]).shape == (4, 11)
    assert derive(SOURCE[None], TARGET[None]).shape == (1, 2, 4, 11)


def test_a_sequence_longer_than_the_learned_positions_is_refused():
    long = jnp.ones((2, 7), jnp.int32)  # there are 6
    derive(long[:, :6], long[:, :6], DEPARTED)
    assert_refuses(derive, long, TARGET, DEPARTED, words=["source", "7", "6"])
    assert_refuses(derive, SOURCE, long, DEPARTED, words=["target", "7", "6"])


def test_batches_that_do_not_fit_are_refused_with_both_shapes():
    words = ["target", "(3, 4)", "source", "(2, 5)"]
    assert_refuses(derive, SOURCE, jnp.ones((3, 4), jnp.int32), words=words)


def test_an_id_outside_the_vocabulary_is_refused_before_anything_compiles():
    source, shapes = SOURCE.at[0, 0].set(99), {"params": random_parameters(PAPER)}
    words = ["source", "99", f"[0, {PAPER.vocab_size})"]
    assert_refuses(Transformer(PAPER).apply, shapes, source, TARGET, words=words, error=ValueError)


def test_labels_are_shifted_right_within_each_packed_sequence():
    labels = jnp.array([[5, 6, 2, 7, 2, 0, 0], [8, 2, 9, 9, 9, 9, 2]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 0, 1, 2, 3, 4]])
    shifted = np.asarray(shift_right(labels, 1, positions))
    assert shifted[0, :5].tolist() == [1, 5, 6, 1, 7]
    assert shifted[1].tolist() == [1, 8, 1, 9, 9, 9, 9]
    assert shift_right(labels, 1)[0].tolist() == [1, 5, 6, 2, 7, 2, 0]
    assert shift_right(np.array([5, 6], np.uint8), 300).tolist() == [300, 5]


@pytest.mark.parametrize("config", [PAPER, DEPARTED], ids=["paper", "departed"])
@pytest.mark.parametrize(
    "changes", [{"scan_layers": True}, {"rematerialize": "layers"}], ids=["scanned", "anew"]
)
def test_how_the_layers_are_run_changes_nothing(config, changes):
    """Logits, weights, and with dropout and head masks; the parameters are the same tree."""
    config = replace(config, dropout_rate=0.5)
    other = replace(config, **changes)
    params = random_parameters(config)
    assert param_shapes(other) == param_shapes(config)
    masks = {"cross": jnp.array([[1.0, 0.0], [0.5, 1.0]])}
    options = {"dropout_key": jax.random.PRNGKey(3), "head_masks": masks}
    for given in ({}, options):
        expected = run(config, params, **given)
        jax.tree.map(partial(assert_close, tolerance=1e-5), run(other, params, **given), expected)


@pytest.mark.slow
def test_layers_scanned_and_computed_anew_take_less_memory():
    """Of four layers a side, the training step's temporaries: less than half."""
    options = {"d_model": 32, "d_ff": 128, "num_encoder_layers": 4, "num_decoder_layers": 4}
    tokens = jax.ShapeDtypeStruct((16, 96), jnp.int32)

    def temporaries(**changes):
        model = Transformer(replace(PAPER, **options, **changes))

        def loss(params, source, target):
            return model.apply({"params": params}, source, target).sum()

        arguments = param_shapes(model.config), tokens, tokens
        compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(scan_layers=True, rematerialize="layers") < temporaries() / 2


def exported(config, params, rows, source, target):
    """Logits of a model that is exported with symbolic sizes."""
    b, s, t = jax.export.symbolic_shape("b, s, t")
    tokens = [jax.ShapeDtypeStruct((b, length), jnp.int32) for length in (s, t)]
    model = Transformer(config)
    apply = jax.jit(lambda params, *tokens: model.apply({"params": params}, *tokens))
    return jax.export.export(apply)(params, *tokens).call(params, source[:rows], target[:rows])


@pytest.mark.parametrize(
    "config", [PAPER, VARIED, DEPARTED], ids=["the paper's", "varied", "every departure"]
)
def test_a_model_exported_with_symbolic_sizes_is_the_model(config):
    params = random_parameters(config)
    for rows in (1, 2):
        logits = exported(config, params, rows, SOURCE, TARGET)
        assert_close(logits, run(config, params)[0][:rows], 1e-5)


@pytest.mark.parametrize("config", [PAPER, DEPARTED], ids=["the paper's", "every departure"])
@pytest.mark.parametrize(("rows", "source", "target"), [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 0, 0)])
def test_of_nothing_there_are_no_logits_and_no_nan(config, rows, source, target):
    params = random_parameters(config)
    logits, weights = run(config, params, SOURCE[:rows, :source], TARGET[:rows, :target])
    assert logits.shape == (rows, target, 11)
    assert np.isfinite(logits).all()
    assert weights["cross"].shape == (2, rows, 2, target, source)


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, {"compute_dtype": "bfloat16"}])
def test_forward_over_reverse(changes):
    config = replace(PAPER, num_encoder_layers=1, num_decoder_layers=1, **changes)
    params, direction = random_parameters(config), random_parameters(config, seed=1)

    def total(params):
        return jax.nn.log_softmax(run(config, params)[0])[..., 3].sum()

    @jax.jit
    def products(params, direction):
        gradient = jax.grad(total)
        _, product = jax.jvp(gradient, (params,), (direction,))
        along = lambda p: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(p), direction))))  # noqa: E731
        return product, jax.grad(along)(params)

    product, expected = products(params, direction)
    bound = 0.1 if config.compute_dtype == "bfloat16" else 1e-3
    assert relative_error(ravel_pytree(product)[0], ravel_pytree(expected)[0]) < bound


@pytest.mark.gives_nan
@pytest.mark.parametrize("config", [VARIED, replace(DEPARTED, first_position=1)])
def test_a_position_below_0_gives_nan_and_no_other_position(config):
    positions = jnp.array([[0, 1, -1, 2, 3]] * 2)
    logits = run(config, random_parameters(config), source_positions=positions)[0]
    assert np.isnan(logits).all()  # all targets attend to that source
