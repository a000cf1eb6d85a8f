import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm

CONFIG = tfm.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=2, num_decoder_layers=3,
    dropout_rate=0.0,
)  # fmt: skip
TOKENS = jnp.array([[3, 4, 5, 2, 0], [6, 3, 2, 0, 0]])


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
