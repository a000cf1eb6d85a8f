import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import references
from checks import assert_close, assert_refuses, assert_transforms_agree

from tfm import sinusoidal_positions

# Sequence starts, the seam of a table split at 512, the promised 10^5, and the last position.
POSITIONS = [0, 1, 2, 511, 512, 513, 4_095, 99_999, 100_000, 131_071, 262_143]


def reference(positions, d_model):
    return np.stack([references.sinusoidal_position(int(i), d_model) for i in positions])


def test_sines_and_cosines_alternate():
    sin, cos = math.sin, math.cos
    expected = [[0, 1, 0, 1], [sin(1), cos(1), sin(0.01), cos(0.01)]]
    assert_close(sinusoidal_positions(2, 4), expected, 1e-7)
    assert_close(sinusoidal_positions(jnp.arange(2), 4), expected, 1e-7)


@pytest.mark.parametrize("d_model", [2, 6, 128])
def test_a_length_gives_the_table_of_the_paper(tolerance, d_model):
    table = sinusoidal_positions(50, d_model)
    assert table.dtype == (jnp.float32 if tolerance > 1e-6 else jnp.float64)
    assert_close(table, reference(range(50), d_model), tolerance)


@pytest.mark.parametrize("layout", ["halves", "tensor2tensor"])
def test_other_layouts(layout):
    expected = [references.sinusoidal_position(i, 6, layout) for i in range(50)]
    assert_close(sinusoidal_positions(50, 6, layout), expected, 1e-6)
    assert_close(sinusoidal_positions(jnp.arange(50), 6, layout), expected, 1e-6)


def test_an_unknown_layout_is_refused():
    words = ["layout", "'spiral'"]
    assert_refuses(sinusoidal_positions, 3, 4, "spiral", words=words, error=ValueError)


def test_position_one_hundred_thousand_is_right_in_a_long_table():
    last = np.asarray(sinusoidal_positions(100_001, 16))[-1]
    np.testing.assert_allclose(last, references.sinusoidal_position(100_000, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_array_of_positions_is_right_up_to_the_last(transform):
    encode = transform(lambda positions: sinusoidal_positions(positions, 512))
    encoding = encode(jnp.array(POSITIONS))
    assert encoding.dtype == jnp.float32
    np.testing.assert_allclose(encoding, reference(POSITIONS, 512), rtol=0, atol=1e-6)


def test_an_array_of_positions_in_float64(x64):
    encoding = sinusoidal_positions(jnp.array(POSITIONS), 512)
    assert encoding.dtype == jnp.float64
    # An angle of 10^5 itself has a rounding error of 10^5 * 2^-53 in float64.
    np.testing.assert_allclose(encoding, reference(POSITIONS, 512), rtol=0, atol=1e-9)


def test_packed_positions_are_rows_of_the_table():
    packed = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    encoding = jax.jit(sinusoidal_positions, static_argnums=1)(packed, 8)
    assert encoding.shape == (2, 6, 8)
    assert_close(encoding, np.asarray(sinusoidal_positions(6, 8))[packed], 1e-6)


def test_a_shift_is_one_rotation_at_every_position():
    d_model, shift = 8, 7
    table = np.asarray(sinusoidal_positions(100, d_model), np.float64)
    for k in range(d_model // 2):
        angle = shift / 10000 ** (2 * k / d_model)
        rotation = np.array(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        pair = table[:, 2 * k : 2 * k + 2]
        assert_close(pair[:-shift] @ rotation.T, pair[shift:], 1e-6)


def test_positions_under_jit_and_vmap(rng):
    positions = rng.integers(0, 1000, (2, 3, 5))
    assert_transforms_agree(lambda positions: sinusoidal_positions(positions, 6), positions)


@pytest.mark.gives_nan
def test_beyond_the_exact_range_there_is_no_number():
    encoding = sinusoidal_positions(jnp.array([-1, 262_144]), 4)
    assert np.isnan(encoding).all()


@pytest.mark.parametrize("positions", [3, jnp.arange(3)], ids=["length", "array"])
def test_an_odd_d_model_is_refused(positions):
    words = ["d_model=5", "odd"]
    assert_refuses(sinusoidal_positions, positions, 5, words=words, error=ValueError)


def test_positions_that_are_not_integers_are_refused():
    words = ["positions", "float32"]
    assert_refuses(sinusoidal_positions, jnp.array([0.5]), 4, words=words, error=TypeError)


@pytest.mark.parametrize("length", [np.array(3), jnp.int32(3)], ids=["numpy", "jax"])
def test_a_scalar_array_may_be_a_length_or_a_position_and_is_refused(length):
    words = ["int(length)", "positions[None]"]
    assert_refuses(sinusoidal_positions, length, 4, words=words, error=TypeError)
    traced = jax.jit(lambda length: sinusoidal_positions(length, 4))
    assert_refuses(traced, length, words=words, error=TypeError)
    assert_refuses(jax.vmap(traced), jnp.arange(3), words=words, error=TypeError)


def test_a_numpy_integer_is_a_length():
    assert_close(sinusoidal_positions(np.int64(3), 4), sinusoidal_positions(3, 4), 0)


def test_a_symbolic_length_is_a_length():
    def encode(x):
        return x + sinusoidal_positions(x.shape[0], x.shape[1])

    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 16"), jnp.float32)
    exported = jax.export.export(jax.jit(encode))(rows)
    for length in (1, 7):
        assert_close(exported.call(jnp.zeros((length, 16))), reference(range(length), 16), 1e-6)


@pytest.mark.gives_nan
def test_a_large_position_of_64_bits_is_not_a_small_one(x64):
    assert np.isnan(sinusoidal_positions(jnp.array([2**32 + 5]), 4)).all()


def test_narrow_positions():
    assert_close(sinusoidal_positions(np.array([200], np.uint8), 4), reference([200], 4), 1e-6)
