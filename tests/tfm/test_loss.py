import math
from functools import partial

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

from tfm import label_smoothed_cross_entropy
from tfm.kernels import label_smoothing

# One compilation serves all tests with the same shapes; an eager call compiles each operation.
loss_of = jax.jit(label_smoothed_cross_entropy, static_argnames="smoothing")


def inputs(rng, leading=(2, 3), size=7):
    """logits and labels."""
    return rng.standard_normal((*leading, size)), rng.integers(0, size, leading)


def test_a_worked_example():
    # p = (1/4, 3/4), q = (1 - 0.2) * (1, 0) + 0.2 / 2 = (0.9, 0.1).
    logits = np.log([1.0, 3.0])
    expected = -(0.9 * math.log(1 / 4) + 0.1 * math.log(3 / 4))
    assert_close(loss_of(logits, 0, smoothing=0.2), expected, 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [2, 7])
def test_loss_equals_the_reference(rng, tolerance, size, smoothing):
    logits, labels = inputs(rng, size=size)
    loss = loss_of(logits, labels, smoothing=smoothing)
    expected = references.label_smoothed_cross_entropy(logits, labels, smoothing)
    assert loss.shape == (2, 3)
    assert_close(loss, expected, tolerance)


@pytest.mark.parametrize("label", [2, 6])
def test_the_others_share_the_smoothing(rng, label):
    logits = rng.standard_normal(7)
    for over, first in (("others", 0), ("others_but_padding", 1)):
        sharing = [v for v in range(first, 7) if v != label]
        expected = references.smoothed_over(logits, label, 0.1, sharing)
        assert_close(
            label_smoothed_cross_entropy(logits, jnp.asarray(label), 0.1, over), expected, 1e-6
        )


def test_the_papers_smoothing_is_the_default(rng):
    logits, labels = inputs(rng)
    assert_close(loss_of(logits, labels), loss_of(logits, labels, smoothing=0.1), 0)


def test_the_gradient_is_the_difference_of_the_distributions(rng):
    logits, labels = inputs(rng)

    def total(logits):
        return label_smoothed_cross_entropy(logits, labels, 0.1).sum()

    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = 0.9 * np.eye(7)[labels] + 0.1 / 7
    assert_close(jax.jit(jax.grad(total))(logits), p - q, 1e-6)


def test_a_constant_added_to_the_logits_changes_nothing(rng):
    logits, labels = inputs(rng)
    assert_close(loss_of(logits + 50, labels), loss_of(logits, labels), 1e-4)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0], [1e4, 0.0]])
    assert loss_of(logits, np.array([0, 1]), smoothing=0.0).tolist() == [0.0, 1e4]


def test_more_words_than_logits_are_refused():
    loss = partial(label_smoothed_cross_entropy, vocab_size=8)
    words = ["vocab_size=8", "5"]
    assert_refuses(loss, jnp.zeros((3, 5)), jnp.array([4, 5, 6]), words=words, error=ValueError)


@pytest.mark.gives_nan
def test_a_label_outside_the_vocabulary_gives_nan_or_is_refused():
    assert np.isnan(loss_of(np.zeros(3), 3))
    words = ["labels", "3", "[0, 3)"]
    assert_refuses(
        label_smoothed_cross_entropy, jnp.zeros(3), jnp.array(3), words=words, error=ValueError
    )


def test_loss_gradients(rng, x64):
    logits, labels = inputs(rng)
    assert_gradients_right(
        lambda logits: label_smoothed_cross_entropy(logits, jnp.asarray(labels)), logits
    )


def test_loss_under_jit_vmap_and_in_each_precision(rng):
    logits, labels = inputs(rng, leading=(2, 3, 4))
    assert_transforms_agree(label_smoothed_cross_entropy, logits, labels)
    assert_default_precision(
        lambda logits: label_smoothed_cross_entropy(logits, jnp.asarray(labels)), logits
    )


def test_bfloat16_logits_are_summed_in_float32(rng):
    logits = rng.standard_normal(5000).astype(jnp.bfloat16)
    expected = references.label_smoothed_cross_entropy(np.float64(logits), 3, 0.1)
    assert_close(loss_of(logits, 3), expected, 1e-5)


def test_loss_refuses_what_does_not_fit():
    labels = jnp.zeros((3,), int)
    words = ["labels", "(3,)", "logits", "(2, 5)"]
    assert_refuses(label_smoothed_cross_entropy, jnp.zeros((2, 5)), labels, words=words)
    words = ["logits", "()"]
    assert_refuses(label_smoothed_cross_entropy, jnp.zeros(()), labels, words=words)
    words, arguments = ["over", "'nobody'"], (jnp.zeros((3, 5)), labels, 0.1, "nobody")
    assert_refuses(label_smoothed_cross_entropy, *arguments, words=words, error=ValueError)
    for smoothing in (-0.1, 1.1):
        words = ["smoothing", str(smoothing)]
        arguments = (jnp.zeros((3, 5)), labels, smoothing)
        assert_refuses(label_smoothed_cross_entropy, *arguments, words=words, error=ValueError)


@pytest.mark.gives_nan
@pytest.mark.parametrize("label", [-100, -1, 7])
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_a_traced_label_outside_gives_nan_and_no_gradient(rng, transform, label):
    logits, labels = inputs(rng)
    labels = jnp.asarray(labels).at[0, 1].set(label)
    losses = transform(label_smoothed_cross_entropy)(logits, labels)
    assert np.isnan(losses).tolist() == [[False, True, False], [False] * 3]

    @jax.jit
    def sum_of_the_others(logits, labels):
        losses = label_smoothed_cross_entropy(logits, labels)
        return jnp.where((labels >= 0) & (labels < 7), losses, 0).sum()

    gradient = jax.grad(sum_of_the_others)(logits, labels)
    inside = sum_of_the_others(logits, labels.at[0, 1].set(0)) - losses[0, 0]
    assert np.isfinite(inside)
    assert not gradient[0, 1].any()
    expected = jax.grad(sum_of_the_others)(logits, labels.at[0, 1].set(0)).at[0, 1].set(0)
    assert_close(gradient, expected, 1e-6)


@pytest.mark.gives_nan
def test_a_padded_word_is_no_label():
    logits = np.array([0.0, 0, 0, -np.inf])
    loss = jax.jit(lambda label: label_smoothed_cross_entropy(logits, label, vocab_size=3))
    assert np.isfinite(loss(2))
    assert np.isnan(loss(3))
    words, call = (
        ["labels", "3", "[0, 3)"],
        lambda: label_smoothed_cross_entropy(logits, jnp.array(3), vocab_size=3),
    )
    assert_refuses(call, words=words, error=ValueError)


@pytest.mark.parametrize("over", ["all", "others", "others_but_padding"])
@pytest.mark.parametrize("traced", [False, True])
def test_a_forbidden_word_costs_nothing_where_it_has_no_share(over, traced):
    logits, allowed = jnp.array([0.5, 2.0, -jnp.inf, 1.0, 0.3]), [0, 1, 3, 4]

    def loss(logits, smoothing, label):
        return label_smoothed_cross_entropy(logits, jnp.asarray(label), smoothing, over)

    call = jax.jit(loss, static_argnums=() if traced else (1,))
    expected = np.log(np.exp(np.float64(logits)[allowed]).sum()) - 2.0
    assert_close(call(logits, 0.0, 1), expected, 1e-6)
    probabilities = np.exp(np.float64(logits)) / np.exp(np.float64(logits)[allowed]).sum()
    gradient = jax.grad(call)(logits, 0.0, 1)
    assert_close(gradient, probabilities - np.eye(5)[1], 1e-6)
    # The forbidden word itself as the label, or with a share of ε: p = 0, so −log p is ∞.
    assert call(logits, 0.0, 2) == np.inf
    assert call(logits, 0.1, 1) == np.inf
    assert call(logits, 0.1, 2) == np.inf


def test_all_of_the_smoothing_leaves_the_label_no_weight():
    logits = jnp.array([0.5, -jnp.inf, 1.0])
    loss = label_smoothed_cross_entropy(logits, jnp.array(1), 1.0, "others")
    assert_close(loss, np.log(np.exp(0.5) + np.e) - 0.75, 1e-6)


def test_a_smoothing_may_be_traced_and_has_a_derivative(rng, x64):
    logits, labels = inputs(rng)
    total = lambda smoothing: loss_traced(logits, labels, smoothing).sum()  # noqa: E731
    assert_gradients_right(total, 0.1)
    assert_close(total(0.1), label_smoothed_cross_entropy(logits, jnp.asarray(labels)).sum(), 1e-12)


loss_traced = jax.jit(label_smoothed_cross_entropy)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
@pytest.mark.parametrize("over", ["all", "others"])
def test_narrow_labels_reach_large_vocabularies(rng, dtype, over):
    logits, labels = rng.standard_normal((3, 40_000)), np.array([0, 7, 100])
    found = label_smoothed_cross_entropy(logits, labels.astype(dtype), over=over)
    assert_close(found, label_smoothed_cross_entropy(logits, labels, over=over), 1e-6)


@pytest.mark.gives_nan
@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_a_traced_smoothing_outside_zero_to_one_gives_nan(rng, smoothing):
    assert np.isnan(loss_traced(*inputs(rng), smoothing)).all()


@pytest.mark.parametrize("over", ["all", "others", "others_but_padding"])
@pytest.mark.parametrize("vocab_size", [7, 9])
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_accelerators_sum_what_a_cpu_gathers(rng, x64, over, vocab_size, smoothing):
    logits, labels = rng.standard_normal((5, 9)), np.array([[0], [1], [2], [5], [6]])
    logits[:, vocab_size:] = -np.inf
    if smoothing == 0:
        logits[:, 3] = -np.inf  # a forbidden word
    ways = (label_smoothing.by_gather, label_smoothing.in_one_sum)

    def both(way):
        def total(logits, smoothing):
            return way(logits, labels, smoothing, over, vocab_size).sum()

        arguments = jnp.asarray(logits), jnp.asarray(smoothing)
        value, (by_logits, by_smoothing) = jax.value_and_grad(total, argnums=(0, 1))(*arguments)
        return value, by_logits, *([by_smoothing] if smoothing else ())

    for summed, gathered in zip(*map(both, ways), strict=True):
        assert_close(summed, gathered, 1e-12)


@pytest.mark.parametrize(("over", "words"), [("others", 1), ("others_but_padding", 2)])
def test_a_vocabulary_of_no_others_is_refused(over, words):
    logits, labels = jnp.zeros((3, words)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match=f"{over}.* at least {words + 1}, not {words}"):
        label_smoothed_cross_entropy(logits, labels, over=over)
