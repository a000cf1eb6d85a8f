from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_transforms_agree, products_in, relative_error

from tfm import Transformer, TransformerConfig, greedy, quantize, start_decoding
from tfm.kernels.precision import linear
from tfm.kernels.projection import side_by_side
from tfm.kernels.quantization import Quantized, quantize_rows
from tfm.training import init_params

CONFIG = TransformerConfig(
    vocab_size=13, d_model=16, d_ff=32, num_heads=2, num_encoder_layers=2, num_decoder_layers=2
)
SOURCE = jnp.array([[5, 6, 7, 2, 0, 0], [3, 4, 12, 5, 6, 2]])


def quantized(w):
    return Quantized(*quantize_rows(w.T))


def rounded(x):
    """Each row in 255 steps between ±max|x|, in float64: the definition, written out."""
    step = np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True) / 127
    return np.round(np.asarray(x, np.float64) / step) * step


def test_a_product_is_that_of_the_rounded_operands(rng):
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in [(2, 3, 40), (40, 6)])
    expected = rounded(x) @ rounded(w.T).T
    assert_close(linear(jnp.asarray(x), quantized(w)), expected, 1e-5)
    assert 0.001 < relative_error(expected, x @ w) < 0.02


def test_no_element_is_off_by_more_than_half_a_step(rng):
    x = rng.standard_normal((50, 30)).astype(np.float32) * 10.0 ** rng.integers(-5, 5, (50, 1))
    values, scale = quantize_rows(jnp.asarray(x))
    assert values.dtype == jnp.int8 and np.abs(values).max() == 127
    assert (np.abs(values * scale - x) <= np.asarray(scale) / 2 * 1.001).all()


def test_rows_of_zeros_stay_zeros():
    assert (linear(jnp.zeros((2, 4)), quantized(jnp.ones((4, 3)))) == 0).all()
    assert (linear(jnp.ones((2, 4)), quantized(jnp.zeros((4, 3)))) == 0).all()


def test_products_under_jit_and_vmap(rng):
    w = quantized(rng.standard_normal((5, 6)).astype(np.float32))
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    assert_transforms_agree(lambda x: linear(x, w), x)


def test_side_by_side_is_the_product_of_each(rng):
    x = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    matrices = [quantized(jnp.asarray(rng.standard_normal((5, n)), jnp.float32)) for n in (2, 3)]
    together = linear(x, side_by_side(matrices))
    assert_close(together, jnp.concatenate([linear(x, w) for w in matrices], -1), 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"source_vocab_size": 9, "projection_bias": True, "output_bias": True}]
)
def test_every_matrix_of_a_model_is_in_8_bits_and_the_logits_are_close(options):
    config = replace(CONFIG, **options)
    model, source = Transformer(config), SOURCE % (config.source_vocab_size or 13)
    params = init_params(model, jax.random.PRNGKey(0))
    small = quantize(params)
    wide = [x for x in jax.tree.leaves(small) if x.ndim == 2 and x.dtype == jnp.float32]
    tables = 1 if config.source_vocab_size is None else 2
    assert sum(min(x.shape) > 1 for x in wide) == tables  # the embeddings, which are looked up
    logits, close = (model.apply({"params": p}, source, SOURCE) for p in (params, small))
    assert 0 < relative_error(close, logits) < 0.05


def test_decoding_takes_quantized_parameters_and_multiplies_integers():
    model = Transformer(CONFIG)
    params = init_params(model, jax.random.PRNGKey(0))

    def decode(params):
        step, cache = start_decoding(model, params, SOURCE, 1, 5)
        return greedy(step, cache, bos=1, eos=2, max_length=5).log_probs

    small = quantize(params)
    # Encoder 4 a layer, memory 1, decoder 6 a layer, logits 1.
    integers = products_in(decode, small).count(("i8", "i8", "i32"))
    assert integers == 2 * 4 + 2 * 1 + 2 * 6 + 1
    assert relative_error(jax.jit(decode)(small), jax.jit(decode)(params)) < 0.05
