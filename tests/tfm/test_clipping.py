import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from checks import assert_close, assert_gradients_right, assert_refuses

from tfm import clip_by_global_norm, global_norm

# One compilation serves all tests with the same shapes; an eager call compiles each operation.
clip = jax.jit(clip_by_global_norm)


@jax.jit
def clip_by_optax(tree):
    clipped, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    return clipped


def gradients(rng, size=1.0):
    """A tree whose norm is `size`."""
    tree = {"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal(5), rng.standard_normal()]}
    norm = np.linalg.norm(flat(tree))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf * size / norm), tree)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def assert_trees_close(actual, expected, tolerance=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert_close(one, other, tolerance)


def test_the_norm_is_that_of_the_whole_tree():
    # The norm is sqrt(9 + 16) = 5, so everything shrinks to a half.
    clipped = clip({"a": jnp.array([3.0]), "b": jnp.array([[0.0, 4.0]])}, 2.5)
    assert_trees_close(clipped, {"a": jnp.array([1.5]), "b": jnp.array([[0.0, 2.0]])})


@pytest.mark.parametrize("size", [0.5, 0.999, 1.001, 3.0, 1e6])
def test_clipping_equals_the_reference(rng, tolerance, size):
    tree = gradients(rng, size)
    leaves = [np.float64(leaf) for leaf in jax.tree.leaves(tree)]
    expected = references.clip_by_global_norm(leaves, 1.0)
    actual = jax.tree.leaves(clip(tree, 1.0))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.parametrize("size", [0.0, 0.5, 1.0, 3.0, 1e6])
def test_clipping_equals_that_of_optax(rng, size):
    tree = gradients(rng, size)
    assert_trees_close(clip(tree, 1.0), clip_by_optax(tree))


@pytest.mark.gives_nan
@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_a_broken_element_does_the_same_as_in_optax(rng, broken):
    # A NaN makes the whole tree NaN: no part of such a gradient may pass as if it were sound.
    tree = gradients(rng) | {"c": jnp.array([broken, 1.0])}
    assert_trees_close(clip(tree, 1.0), clip_by_optax(tree))


@pytest.mark.parametrize("size", [0.5, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("threshold", [0.1, 1.0, 10.0])
def test_the_length_is_bounded_and_the_direction_stays(rng, size, threshold):
    before = gradients(rng, size)
    after = clip(before, threshold)
    g, clipped = flat(before), flat(after)
    assert np.linalg.norm(clipped) <= threshold * (1 + 1e-6)
    assert g @ clipped / np.linalg.norm(g) / np.linalg.norm(clipped) > 1 - 1e-6
    if size < threshold:
        assert (g == clipped).all()


def test_a_zero_gradient_stays_zero():
    clipped = clip([jnp.zeros(3), jnp.zeros(())], 1.0)
    assert (flat(clipped) == 0).all()


def test_structure_shapes_and_dtypes_stay(x64):
    tree = {
        "a": jnp.ones((2, 3), jnp.bfloat16),
        "b": (jnp.ones(4, jnp.float32), jnp.ones((), jnp.float64)),
    }
    clipped = jax.eval_shape(clip, tree, 0.1)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), clipped) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )


def test_short_types_are_squared_in_float32():
    # 300² is beyond float16, and 1 + 2⁻⁹ beyond the digits of bfloat16.
    assert clip([jnp.array([300.0], jnp.float16)], 1.0)[0].tolist() == [1.0]
    norm = global_norm([jnp.ones(512, jnp.bfloat16), jnp.ones(1, jnp.bfloat16)])
    assert norm.dtype == jnp.float32
    assert float(norm) == pytest.approx(513**0.5)


def test_clipping_gradients(rng, x64):
    for size in (0.5, 3.0):  # on either side of the threshold
        assert_gradients_right(lambda tree: clip_by_global_norm(tree, 1.0), gradients(rng, size))


def test_clipping_under_jit_and_vmap(rng):
    # vmap clips each example apart, where one call clips their norm together.
    trees = [gradients(rng, size) for size in (0.5, 1.0, 3.0, 9.0)]
    clipped = [clip_by_global_norm(tree, 1.0) for tree in trees]
    stacked, expected = (
        jax.tree.map(lambda *x: jnp.stack(x), *group) for group in (trees, clipped)
    )
    assert_trees_close(jax.vmap(clip, in_axes=(0, None))(stacked, 1.0), expected)
    assert_trees_close(clip(trees[2], 1.0), clipped[2])


@pytest.mark.gives_nan
@pytest.mark.parametrize("number", [float, np.float32, np.array, jnp.float32])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, np.nan])
def test_a_threshold_that_is_not_positive_is_refused_whatever_its_type(rng, number, threshold):
    words = ["threshold", str(threshold)]
    arguments = gradients(rng), number(threshold)
    assert_refuses(clip_by_global_norm, *arguments, words=words, error=ValueError)


@pytest.mark.gives_nan
def test_a_traced_threshold_that_is_not_positive_gives_nan(rng):
    assert np.isnan(flat(clip(gradients(rng), -1.0))).all()


def test_numbers_are_leaves():
    clipped = clip_by_global_norm({"a": 3.0, "b": np.array([0.0, 4.0])}, 2.5)
    assert_trees_close(clipped, {"a": jnp.float32(1.5), "b": jnp.array([0.0, 2.0])})
    assert float(global_norm({"a": 3.0, "b": 4.0})) == 5
