import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from checks import (
    assert_close,
    assert_default_precision,
    assert_gradients_right,
    assert_refuses,
    assert_transforms_agree,
)

from tfm import embed, output_distribution

IDS = np.array([[3, 0, 3], [4, 3, 1]])  # 3 occurs three times, 2 never


def test_embedding_is_a_row_of_the_table_times_the_root_of_d_model():
    table = jnp.arange(12.0).reshape(3, 4)
    assert embed(jnp.array([2, 0]), table).tolist() == [[16, 18, 20, 22], [0, 2, 4, 6]]


def test_embed_equals_the_reference(rng, tolerance):
    table = rng.standard_normal((5, 6))
    expected = references.embed(IDS, table)
    assert_close(jax.jit(embed)(IDS, table), expected, tolerance)


def test_embed_takes_numpy_arrays(rng):
    table = rng.standard_normal((5, 6)).astype(np.float32)
    assert_close(embed(IDS, table), references.embed(IDS, table), 1e-5)


def test_gradient_of_the_table_equals_that_of_a_dense_product(rng):
    table, weights = rng.standard_normal((5, 6)), rng.standard_normal((2, 3, 6))

    def dense(table):
        return (jax.nn.one_hot(IDS, 5) @ table) * 6**0.5

    def gradient(function):
        return jax.jit(jax.grad(lambda table: (function(table) * weights).sum()))(table)

    sparse = np.asarray(gradient(lambda table: embed(jnp.asarray(IDS), table)))
    assert_close(sparse, gradient(dense), 1e-5)
    assert (sparse[2] == 0).all()


def test_gradient_of_each_example_under_vmap(rng):
    table = jnp.asarray(rng.standard_normal((5, 6)))

    @jax.jit
    def gradient(ids):
        return jax.grad(lambda table: jnp.square(embed(ids, table)).sum())(table)

    assert_close(jax.vmap(gradient)(IDS), [gradient(row) for row in IDS], 1e-5)


def test_embed_gradients(rng, x64):
    # The rule of its own that `embed` has is for reverse mode.
    table = rng.standard_normal((5, 6))
    assert_gradients_right(lambda table: embed(jnp.asarray(IDS), table), table, modes=("rev",))


def test_embed_under_jit_vmap_and_in_each_precision(rng):
    table = rng.standard_normal((5, 6))
    assert_transforms_agree(embed, np.tile(IDS, (2, 1, 1)), table, in_axes=(0, None))
    assert_default_precision(lambda table: embed(jnp.asarray(IDS), table), table)


@pytest.mark.gives_nan
def test_an_id_outside_the_table_gives_nan_and_no_other_row():
    embedded = jax.jit(embed)(jnp.array([-1, 0, 5]), jnp.ones((5, 6)))
    assert np.isnan(embedded).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_id_outside_the_table_is_refused_where_it_can_be_seen(wrong):
    words = ["ids", str(wrong), "[0, 5)"]
    assert_refuses(embed, jnp.array([0, wrong, 4]), jnp.ones((5, 6)), words=words, error=ValueError)


def test_embed_refuses_a_table_that_is_no_matrix():
    assert_refuses(embed, jnp.asarray(IDS), jnp.zeros(6), words=["table", "(6,)"])


# The output distribution


def output_inputs(rng, leading=(2, 3)):
    """y, w, b."""
    return [rng.standard_normal(shape) for shape in [(*leading, 4), (4, 5), (5,)]]


def test_output_distribution_equals_the_reference(rng, tolerance):
    arguments = output_inputs(rng)
    expected = references.output_distribution(*arguments)
    assert_close(jax.jit(output_distribution)(*arguments), expected, tolerance)


def test_probabilities_sum_to_one_even_for_large_logits(rng):
    y, w, b = output_inputs(rng)
    probabilities = np.asarray(jax.jit(output_distribution)(1000 * y, w, b))
    assert (probabilities >= 0).all()
    assert_close(probabilities.sum(-1), np.ones((2, 3)), 1e-6)


def test_output_distribution_gradients(rng, x64):
    assert_gradients_right(output_distribution, *output_inputs(rng))


def test_output_distribution_under_jit_vmap_and_in_each_precision(rng):
    arguments = output_inputs(rng, leading=(2, 3, 4))
    assert_transforms_agree(output_distribution, *arguments, in_axes=(0, None, None))
    assert_default_precision(output_distribution, *arguments)


@pytest.mark.parametrize(
    ("y", "w", "b", "words"),
    [
        ((), (4, 5), (5,), ["y", "()"]),
        ((2, 3), (4, 5), (5,), ["w", "(4, 5)", "y", "(2, 3)"]),
        ((2, 4), (4, 5), (4,), ["b", "(4,)", "w", "(4, 5)"]),
    ],
)
def test_output_distribution_refuses_shapes_that_do_not_fit(y, w, b, words):
    assert_refuses(output_distribution, *map(jnp.zeros, (y, w, b)), words=words)


# What both have in common


@pytest.mark.gives_nan
def test_an_id_outside_the_table_leaves_no_gradient():
    ids = jnp.array([-1, 0, 5, 0])

    @jax.jit
    def total(table, ids):
        rows = embed(ids, table)
        return jnp.where(jnp.isnan(rows), 0, rows).sum()

    gradient = jax.grad(total)(jnp.ones((5, 4)), ids)
    assert gradient.tolist() == [[4.0] * 4] + [[0.0] * 4] * 4  # 2 · √4


def test_of_no_ids_there_are_no_rows_and_no_gradient():
    for shape in ((0,), (0, 3), (2, 0)):
        ids = jnp.zeros(shape, int)
        assert embed(ids, jnp.ones((5, 4))).shape == (*shape, 4)
        gradient = jax.grad(lambda table, ids=ids: embed(ids, table).sum())(jnp.ones((5, 4)))
        assert not gradient.any()
    assert output_distribution(jnp.ones((0, 4)), jnp.ones((4, 5)), jnp.ones(5)).shape == (0, 5)


def test_integers_are_numbers_and_the_weights_have_gradients(rng):
    y, w, b = output_inputs(rng)
    whole = jnp.round(3 * jnp.asarray(y)).astype(int)
    total = lambda w, y: jnp.sin(output_distribution(y, w, b)).sum()  # noqa: E731
    gradients = [jax.grad(total)(jnp.float32(w), y) for y in (whole, jnp.float32(whole))]
    assert_close(*gradients, 1e-6)


def test_lists_are_refused_by_name():
    for arguments, name in [(([0, 1], jnp.ones((5, 4))), "ids"), ((IDS, [[1.0]]), "table")]:
        assert_refuses(embed, *arguments, words=[name, "list"], error=TypeError)


@pytest.mark.filterwarnings("error")
def test_ids_of_numpy_do_not_warn():
    """Their 64 bits, JAX has not."""
    ids, table = np.array([1, 2]), jnp.ones((5, 4))
    assert (embed(ids, table) == jax.jit(lambda table: embed(ids, table))(table)).all()


def test_narrow_ids_reach_large_tables():
    table = jnp.arange(40_000.0)[:, None] * jnp.ones((1, 4))
    assert embed(np.array([7, 200], np.uint8), table)[:, 0].tolist() == [14.0, 400.0]
