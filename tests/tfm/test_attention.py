import re
from functools import partial

import jax
import jax.export
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
    products_in,
    relative_error,
)

from tfm import (
    attention_weights,
    causal_mask,
    merge_heads,
    multi_head_attention,
    scaled_dot_product_attention,
    split_heads,
)
from tfm.kernels import attention as kernels_attention

# One compilation serves all tests with the same shapes; an eager call compiles each operation.
weights_of = jax.jit(attention_weights)
attend = jax.jit(scaled_dot_product_attention)
attend_with_heads = jax.jit(multi_head_attention, static_argnames=("num_heads", "compute_dtype"))


def queries_keys_values(rng, leading=(2, 3), length=4, keys=5, d_k=8):
    """query [..., L, d_k], key [..., K, d_k], value [..., K, d_k]."""
    lengths = (length, keys, keys)
    return tuple(rng.standard_normal((*leading, n, d_k)) for n in lengths)


def random_mask(rng, *shape):
    """Two keys in three are allowed; the first query of each example may attend to nothing."""
    mask = rng.random(shape) < 2 / 3
    mask[..., 0, :] = False
    return mask


# Scaled dot-product attention


def test_weights_of_a_worked_example():
    # q·k = 2 and 0, d_k = 4: the scores are 2/√4 = 1 and 0.
    query = jnp.array([[2.0, 0.0, 0.0, 0.0]])
    key = jnp.array([[1.0, 5.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]])
    e = np.e
    assert_close(weights_of(query, key), [[e / (e + 1), 1 / (e + 1)]], 1e-6)


@pytest.mark.parametrize(("leading", "length", "keys", "d_k"), [((), 1, 1, 1), ((2, 3), 4, 5, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_reference(rng, tolerance, leading, length, keys, d_k, masked):
    query, key, value = queries_keys_values(rng, leading, length, keys, d_k)
    mask = random_mask(rng, *leading, length, keys) if masked else None
    allowed = np.ones((length, keys), bool) if mask is None else mask
    weights, out = weights_of(query, key, mask), attend(query, key, value, mask)
    assert_close(weights, references.attention_weights(query, key, allowed), tolerance)
    assert_close(out, references.attention(query, key, value, allowed), tolerance)


def test_a_mask_broadcasts_over_heads(rng):
    inputs = queries_keys_values(rng)
    mask = random_mask(rng, 2, 1, 4, 5)
    same_for_each_head = np.broadcast_to(mask, (2, 3, 4, 5))
    assert_close(attend(*inputs, mask), attend(*inputs, same_for_each_head), 1e-6)


def test_weights_are_a_distribution_over_the_allowed_keys(rng):
    query, key, _ = queries_keys_values(rng)
    mask = random_mask(rng, 2, 3, 4, 5)
    weights = np.asarray(weights_of(query, key, mask))
    assert (weights >= 0).all()
    assert (weights[~mask] == 0).all()
    assert_close(weights.sum(-1), mask.any(-1).astype(float), 1e-6)


def test_outputs_lie_between_the_values(rng):
    query, key, value = queries_keys_values(rng)
    out = np.asarray(attend(query, key, value))
    assert (out <= value.max(-2, keepdims=True) + 1e-6).all()
    assert (out >= value.min(-2, keepdims=True) - 1e-6).all()


def test_permuting_keys_with_their_values_changes_nothing(rng):
    query, key, value = queries_keys_values(rng)
    order = rng.permutation(5)
    permuted = attend(query, key[..., order, :], value[..., order, :])
    assert_close(permuted, attend(query, key, value), 1e-5)


def test_large_scores_do_not_overflow():
    query = jnp.full((1, 4), 1e4)
    key = jnp.array([[1e4] * 4, [-1e4] * 4])
    assert_close(weights_of(query, key), [[1.0, 0.0]], 0)


def test_a_masked_key_has_no_influence_however_large(rng):
    query, key, value = queries_keys_values(rng)
    mask = np.array([True, True, False, True, True])
    small = attend(query, key, value, mask)
    key[..., 2, :], value[..., 2, :] = 1e6, -1e6
    assert_close(attend(query, key, value, mask), small, 1e-6)


def test_a_fully_masked_row_gives_zeros_and_no_gradient(rng):
    query, key, value = queries_keys_values(rng)
    mask = random_mask(rng, 2, 3, 4, 5)
    mask[0] = False

    def loss(query, key, value):
        out = scaled_dot_product_attention(query, key, value, mask)
        return jnp.square(out - 1).sum(), out

    gradient_and_out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    gradients, out = jax.tree.map(np.asarray, gradient_and_out(query, key, value))
    assert (out[..., 0, :] == 0).all()  # the first query of each example
    assert (out[0] == 0).all()  # an example in which nothing is allowed
    assert (out[1, :, 1:] != 0).any()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).any()
    assert (gradients[0][..., 0, :] == 0).all()


def test_under_a_causal_mask_no_gradient_comes_from_later_keys(rng):
    inputs = queries_keys_values(rng, leading=(), keys=4)
    jacobians = jax.jit(jax.jacrev(scaled_dot_product_attention, argnums=(1, 2)))
    for jacobian in jacobians(*inputs, causal_mask(4)):
        influence = np.abs(jacobian).max((1, 3))  # [L, K]
        assert (influence[np.triu_indices(4, 1)] == 0).all()
        assert (influence[np.tril_indices(4, -1)] > 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradients(rng, x64, masked):
    mask = random_mask(rng, 2, 4, 5) if masked else None
    assert_gradients_right(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask),
        *queries_keys_values(rng, leading=(2,)),
    )


def test_gradients_of_weights_and_of_heads(rng, x64):
    query, key, _ = queries_keys_values(rng, (2,), 3, 4, 5)
    assert_gradients_right(attention_weights, query, key)
    assert_gradients_right(partial(split_heads, num_heads=2), rng.standard_normal((2, 3, 4)))
    assert_gradients_right(merge_heads, rng.standard_normal((2, 3, 4, 2)))


@pytest.mark.parametrize("function", [attention_weights, scaled_dot_product_attention])
def test_attention_under_jit_vmap_and_in_each_precision(rng, function):
    inputs = queries_keys_values(rng)[: 2 if function is attention_weights else 3]
    mask = random_mask(rng, 2, 3, 4, 5)
    assert_transforms_agree(function, *inputs, mask)
    assert_default_precision(function, *inputs)


@pytest.mark.parametrize(
    ("query", "key", "value", "words"),
    [
        ((4,), (5, 8), (5, 8), ["query", "(4,)"]),
        ((4, 8), (8,), (5, 8), ["key", "(8,)"]),
        ((4, 8), (5, 8), (8,), ["value", "(8,)"]),
        ((4, 8), (5, 7), (5, 8), ["key", "(5, 7)", "query", "(4, 8)"]),
        ((4, 8), (5, 8), (6, 8), ["value", "(6, 8)", "key", "(5, 8)"]),
        ((2, 4, 8), (3, 5, 8), (3, 5, 8), ["key", "(3, 5, 8)", "query", "(2, 4, 8)"]),
        ((2, 4, 8), (2, 5, 8), (3, 5, 8), ["value", "(3, 5, 8)", "(2, 5, 8)"]),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(query, key, value, words):
    inputs = map(jnp.zeros, (query, key, value))
    assert_refuses(scaled_dot_product_attention, *inputs, words=words)


@pytest.mark.parametrize("mask", [(4, 6), (3, 5), (3, 4, 5)])
def test_attention_refuses_a_mask_that_does_not_broadcast(rng, mask):
    query, key, _ = map(jnp.asarray, queries_keys_values(rng, leading=(2,)))
    refused = jnp.ones(mask, bool)
    assert_refuses(attention_weights, query, key, refused, words=["mask", str(mask), "(2, 4, 5)"])


def test_attention_refuses_a_mask_that_would_add_queries(rng):
    query, key, _ = map(jnp.asarray, queries_keys_values(rng, leading=(2,), length=1))
    refused = jnp.ones((3, 5), bool)
    assert_refuses(attention_weights, query, key, refused, words=["mask", "(3, 5)", "(2, 1, 5)"])


def test_attention_refuses_a_mask_that_is_not_boolean(rng):
    query, key, _ = map(jnp.asarray, queries_keys_values(rng))
    refused = jnp.zeros((4, 5))
    assert_refuses(
        attention_weights, query, key, refused, words=["mask", "float32"], error=TypeError
    )


# A bias

BIAS_SHAPES = [(4, 5), (1, 1, 4, 5), (1, 3, 4, 5), (2, 1, 1, 5), (2, 3, 4, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_a_bias_is_added_to_the_logits(rng, tolerance, shape):
    query, key, value = queries_keys_values(rng)
    mask, bias = random_mask(rng, 2, 3, 4, 5), rng.standard_normal(shape)
    expected = references.attention_weights(query, key, mask, bias)
    assert_close(attention_weights(query, key, mask, bias=bias), expected, tolerance)
    out = scaled_dot_product_attention(query, key, value, mask, bias=bias)
    assert_close(out, np.matmul(expected, value), tolerance)


def test_a_bias_goes_to_each_head_its_own(rng):
    query_input, key_value_input, *weights = map(jnp.asarray, multi_head_inputs(rng))
    w_q, w_k, w_v, w_o = weights
    bias = jnp.asarray(rng.standard_normal((2, 4, 5)))
    out = multi_head_attention(query_input, key_value_input, *weights, num_heads=2, bias=bias)
    inputs = (query_input, w_q), (key_value_input, w_k), (key_value_input, w_v)
    heads = [split_heads(jnp.matmul(x, w, precision="highest"), 2) for x, w in inputs]
    by_hand = merge_heads(scaled_dot_product_attention(*heads, bias=bias))
    assert_close(out, jnp.matmul(by_hand, w_o, precision="highest"), 1e-4)


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("shape", BIAS_SHAPES)
@pytest.mark.parametrize("chunk", [1, 45, 10**6])
def test_a_bias_has_its_gradient_in_chunks_too(rng, x64, monkeypatch, shape, chunk):
    monkeypatch.setattr("tfm.kernels.attention.CHUNK", chunk)
    inputs, bias = queries_keys_values(rng), rng.standard_normal(shape)
    mask = random_mask(rng, 2, 1, 4, 5)

    def value_and_gradients(implementation):
        def total(*inputs):
            *operands, bias = inputs
            out = scaled_dot_product_attention(
                *operands, mask, bias=bias, implementation=implementation
            )
            return jnp.square(out - 1).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(*inputs, bias)

    chunked, formula = map(value_and_gradients, ("chunked", "formula"))
    jax.tree.map(partial(assert_close, tolerance=1e-12), chunked, formula)
    formula = partial(scaled_dot_product_attention, *inputs, mask, implementation="formula")
    assert_gradients_right(lambda bias: formula(bias=bias), jnp.asarray(bias))


def test_a_bias_of_another_form_is_refused(rng):
    query, key, _ = map(jnp.asarray, queries_keys_values(rng))
    for shape in [(4, 6), (3, 4, 5), (2, 3, 1, 4, 5)]:
        biased = partial(attention_weights, bias=jnp.zeros(shape))
        assert_refuses(biased, query, key, words=["bias", str(shape), "(2, 3, 4, 5)"])
    of_heads = partial(attention_weights, bias=jnp.zeros(3))
    assert_refuses(of_heads, query, key, words=["bias (3,)", "(2, 3, 4, 5)", "[H, 1, 1] if of the"])
    mask = partial(attention_weights, bias=jnp.zeros((4, 5), bool))
    assert_refuses(mask, query, key, words=["bias", "bool is a mask"], error=TypeError)


# The ways to compute it

MASK_SHAPES = [(), (5,), (4, 5), (2, 1, 1, 5), (2, 1, 4, 5), (1, 3, 1, 1), (2, 3, 4, 5)]


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("shape", [None, *MASK_SHAPES])
@pytest.mark.parametrize("chunk", [1, 45, 10**6])  # one head at a time, two, and all
def test_chunks_give_what_the_reference_gives(rng, x64, monkeypatch, shape, chunk):
    monkeypatch.setattr("tfm.kernels.attention.CHUNK", chunk)
    inputs = queries_keys_values(rng)
    mask = None if shape is None else jnp.asarray(rng.random(shape) < 2 / 3)

    def value_and_gradients(implementation):
        def total(*inputs):
            out = scaled_dot_product_attention(*inputs, mask, implementation=implementation)
            return jnp.square(out - 1).sum(), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)

    chunked, reference = map(value_and_gradients, ("chunked", "formula"))
    jax.tree.map(partial(assert_close, tolerance=1e-12), chunked, reference)


def test_long_sequences_take_chunks_by_themselves_and_little_memory():
    operand = jax.ShapeDtypeStruct((8, 8, 1024, 16), jnp.float32)

    def temporary_bytes(**options):
        def total(*inputs):
            return scaled_dot_product_attention(*inputs, **options).sum()

        both = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return both.lower(operand, operand, operand).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 8 * 8 * 1024**2
    assert temporary_bytes(implementation="formula") > logits
    assert temporary_bytes() <= temporary_bytes(implementation="chunked") < logits / 4


def lowered_for_cuda(monkeypatch, function, *shapes):
    """The program that a GPU would get. JAX asks for the version of a cuDNN that is not here."""
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(version, lambda: 91_000)
    monkeypatch.setattr("tfm.kernels.attention._cudnn_is_here", lambda: True)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    calls = [f"__cudnn$fmha{kind}Softmax{way}"
             for kind in ("", "ScaleBias") for way in ("", "Backward")]  # fmt: skip
    checks = list(map(jax.export.DisabledSafetyCheck.custom_call, calls))
    export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
    return export(*arguments).mlir_module()


FITTING = (2, 3, 4, 8)


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("leading", [(2, 3), (3,), (), (2, 2, 3)])
def test_a_gpu_computes_attention_with_cudnn(monkeypatch, leading):
    def total(*inputs):
        mask = causal_mask(4)
        out = scaled_dot_product_attention(*inputs, mask, compute_dtype=jnp.bfloat16)
        assert out.shape == inputs[0].shape and out.dtype == jnp.float32
        return out.sum()

    both = jax.grad(total, argnums=(0, 1, 2))
    program = lowered_for_cuda(monkeypatch, both, *[(*leading, 4, 8)] * 3)
    assert "__cudnn$fmhaScaleBiasSoftmax(" in program
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in program


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(
    ("mask", "bias"),
    [
        (None, None),
        ((4, 4), "1x1x4x4"),
        ((2, 1, 1, 4), "2x1x4x4"),
        ((1, 3, 4, 1), "1x3x4x4"),
        ((2, 3, 4, 4), "2x3x4x4"),
    ],
)
def test_cudnn_reads_a_mask_once_for_all_that_share_it(monkeypatch, mask, bias):
    def both(*inputs):
        allowed = None if mask is None else jnp.ones(mask, bool)
        return scaled_dot_product_attention(*inputs, allowed, compute_dtype=jnp.bfloat16)

    program = lowered_for_cuda(monkeypatch, both, *[FITTING] * 3)
    (operands,) = re.findall(r"__cudnn\$fmha\w*Softmax\(.*: \((.*?)\) ->", program)
    numbers = re.findall(r"tensor<([\dx]+)xbf16>", operands)
    assert numbers[3:4] == ([] if bias is None else [bias])


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_takes_a_bias_where_it_is_asked_for(monkeypatch, masked):
    """By itself a GPU adds it to the logits in f32: cuDNN wants it in 16 bits."""

    def total(*inputs, **options):
        *operands, bias = inputs
        options |= {"compute_dtype": jnp.bfloat16, "bias": bias}
        mask = causal_mask(4) if masked else None
        return scaled_dot_product_attention(*operands, mask, **options).sum()

    both = jax.grad(partial(total, implementation="cudnn"), argnums=(0, 1, 2, 3))
    program = lowered_for_cuda(monkeypatch, both, *[FITTING] * 3, (1, 3, 4, 4))
    (results,) = re.findall(r"__cudnn\$fmhaScaleBiasSoftmaxBackward\(.*-> (.*)", program)
    assert "1x3x4x4xbf16" in results
    assert "fmha" not in lowered_for_cuda(monkeypatch, total, *[FITTING] * 3, (1, 3, 4, 4))


def test_cudnn_sees_no_query_without_a_key(monkeypatch):
    seen = []

    def fused(query, key, value, bias, mask, implementation):
        seen.append(mask)
        return jnp.ones_like(query)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    mask = jnp.array([[True, False, False, True], [False] * 4] * 2)
    out = kernels_attention._cudnn(jnp.bfloat16, *[jnp.ones(FITTING)] * 3, mask, None)
    assert np.array_equal(seen[0][0, 0], mask | jnp.array([[False], [True]] * 2))
    assert np.array_equal(out, np.broadcast_to(np.array([1, 0, 1, 0])[:, None], FITTING))


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(
    ("query", "key", "value", "compute_dtype"),
    [
        (FITTING, FITTING, FITTING, None),
        (FITTING, FITTING, FITTING, jnp.float32),
        ((2, 3, 5, 8), FITTING, FITTING, jnp.bfloat16),
        (FITTING, (2, 3, 5, 8), (2, 3, 5, 8), jnp.bfloat16),
        (FITTING, FITTING, (2, 3, 4, 16), jnp.bfloat16),
        (*[(2, 3, 4, 12)] * 3, jnp.bfloat16),
        (*[(2, 3, 4, 136)] * 3, jnp.bfloat16),
    ],
)
def test_a_gpu_falls_back_where_cudnn_does_not_fit(monkeypatch, query, key, value, compute_dtype):
    attention = partial(scaled_dot_product_attention, compute_dtype=compute_dtype)
    assert "fmha" not in lowered_for_cuda(monkeypatch, attention, query, key, value)
    forced = partial(attention, implementation="cudnn")
    words = ["cudnn", str(query), str(value), "multiple of 8"]
    inputs = map(jnp.zeros, (query, key, value))
    assert_refuses(forced, *inputs, words=words, error=ValueError)


def test_an_unknown_implementation_is_refused(rng):
    words = {"words": ["flash", "formula"], "error": ValueError}
    unknown = partial(scaled_dot_product_attention, implementation="flash")
    assert_refuses(unknown, *[jnp.zeros(FITTING)] * 3, **words)
    several = partial(multi_head_attention, num_heads=2, implementation="flash")
    assert_refuses(several, *map(jnp.asarray, multi_head_inputs(rng)), **words)


# Heads


def test_head_i_holds_features_i_d_k_and_following():
    x = jnp.arange(2 * 6).reshape(2, 6)  # L = 2, D = 6
    heads = split_heads(x, 3)
    assert heads.tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6])
def test_merging_undoes_splitting(rng, num_heads):
    x = rng.standard_normal((2, 3, 4, 6))
    heads = split_heads(x, num_heads)
    assert heads.shape == (2, 3, num_heads, 4, 6 // num_heads)
    assert (merge_heads(heads) == x).all()


def test_heads_under_jit_and_vmap(rng):
    assert_transforms_agree(lambda x: split_heads(x, 2), rng.standard_normal((2, 3, 4, 6)))
    assert_transforms_agree(merge_heads, rng.standard_normal((2, 3, 2, 4, 3)))


def test_heads_that_do_not_divide_d_model_are_refused():
    for num_heads in (4, 0):
        words = [f"num_heads={num_heads}", "d_model=6"]
        assert_refuses(split_heads, jnp.zeros((2, 6)), num_heads, words=words, error=ValueError)
    assert_refuses(split_heads, jnp.zeros(6), 2, words=["x", "(6,)"])
    assert_refuses(merge_heads, jnp.zeros((2, 6)), words=["x", "(2, 6)"])


# Multi-head attention


def multi_head_inputs(rng, leading=(), length=4, keys=5, d_model=6):
    """query_input, key_value_input and the four weights."""
    inputs = [rng.standard_normal((*leading, n, d_model)) for n in (length, keys)]
    weights = [rng.standard_normal((d_model, d_model)) / d_model**0.5 for _ in range(4)]
    return inputs + weights


@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_multi_head_attention_equals_a_loop_over_heads(rng, tolerance, num_heads):
    inputs = multi_head_inputs(rng, leading=(2,))
    mask = random_mask(rng, 2, num_heads, 4, 5)
    assert_close(
        attend_with_heads(*inputs, num_heads=num_heads, mask=mask),
        references.multi_head_attention(*inputs, num_heads, mask),
        tolerance,
    )


def test_one_head_is_one_attention(rng):
    x, memory, w_q, w_k, w_v, w_o = multi_head_inputs(rng)
    one = np.asarray(attend(x @ w_q, memory @ w_k, memory @ w_v)) @ w_o
    assert_close(attend_with_heads(x, memory, w_q, w_k, w_v, w_o, num_heads=1), one, 1e-5)


def test_multi_head_attention_gradients(rng, x64):
    mask = random_mask(rng, 2, 4, 5)
    assert_gradients_right(lambda *x: multi_head_attention(*x, 2, mask), *multi_head_inputs(rng))


def test_multi_head_attention_under_jit_vmap_and_in_each_precision(rng):
    inputs = multi_head_inputs(rng, leading=(2, 3))
    mask = random_mask(rng, 2, 3, 2, 4, 5)
    assert_transforms_agree(
        lambda *x: multi_head_attention(*x[:-1], 2, x[-1]),
        *inputs,
        mask,
        in_axes=(0, 0, None, None, None, None, 0),
    )
    assert_default_precision(lambda *x: multi_head_attention(*x, 2), *inputs)


def test_bfloat16_compute_stays_within_two_percent(rng):
    inputs = multi_head_inputs(rng, (2,), 16, 16, d_model=32)
    exact = attend_with_heads(*inputs, num_heads=4)
    rounded = attend_with_heads(*inputs, num_heads=4, compute_dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, exact) < 0.02


def test_bfloat16_compute_reaches_every_product(rng):
    def attend_in_bfloat16(*inputs):
        return multi_head_attention(*inputs, 2, compute_dtype=jnp.bfloat16)

    # Three projections, the scores, the weighted sum, the last projection.
    products = products_in(attend_in_bfloat16, *multi_head_inputs(rng))
    assert products == [("bf16", "bf16", "f32")] * 6


@pytest.mark.parametrize(
    ("position", "shape", "words"),
    [
        (0, (6,), ["query_input", "(6,)"]),
        (1, (5, 4), ["key_value_input", "(5, 4)", "query_input", "(4, 6)"]),
        (2, (6, 5), ["w_q", "(6, 5)", "query_input", "(4, 6)"]),
        (3, (5, 6), ["w_k", "(5, 6)"]),
        (4, (6,), ["w_v", "(6,)"]),
        (5, (2, 6, 6), ["w_o", "(2, 6, 6)"]),
    ],
)
def test_multi_head_attention_refuses_shapes_that_do_not_fit(rng, position, shape, words):
    inputs = [jnp.asarray(x) for x in multi_head_inputs(rng)]
    inputs[position] = jnp.zeros(shape)
    assert_refuses(multi_head_attention, *inputs, 2, words=words)


def test_multi_head_attention_refuses_heads_that_do_not_divide_d_model(rng):
    inputs = map(jnp.asarray, multi_head_inputs(rng))
    words = ["num_heads=4", "d_model=6"]
    assert_refuses(multi_head_attention, *inputs, 4, words=words, error=ValueError)


# What has no number, no size or no value yet


@pytest.mark.parametrize("implementation", ["auto", "formula", "chunked"])
@pytest.mark.parametrize(("rows", "length", "keys"), [(2, 3, 0), (2, 0, 3), (0, 3, 3), (0, 0, 0)])
def test_empty_axes_give_zeros_or_nothing(implementation, rows, length, keys):
    shapes = [(rows, 2, length, 4), (rows, 2, keys, 4), (rows, 2, keys, 5)]
    arguments = [jnp.ones(shape) for shape in shapes]
    function = partial(scaled_dot_product_attention, implementation=implementation)
    total = lambda *arguments: function(*arguments).sum()  # noqa: E731
    for mask in (None, jnp.ones((length, keys), bool)):
        assert function(*arguments, mask).shape == (rows, 2, length, 5)
        assert not function(*arguments, mask).any()
        gradients = jax.grad(total, argnums=(0, 1, 2))(*arguments, mask)
        assert [g.shape for g in gradients] == shapes
        assert not any(g.any() for g in gradients)
    assert attention_weights(*arguments[:2]).shape == (rows, 2, length, keys)


def test_multi_head_attention_of_no_keys(rng):
    x, *weights = (jnp.asarray(rng.standard_normal(s)) for s in [(2, 3, 6)] + [(6, 6)] * 4)
    assert not multi_head_attention(x, x[:, :0], *weights, num_heads=2).any()
    assert multi_head_attention(x[:0], x[:0], *weights, num_heads=2).shape == (0, 3, 6)


def test_a_mask_of_the_examples_is_not_taken_for_one_of_the_heads(rng):
    # Three examples, three heads: [3, 4, 5] might be either.
    arguments = queries_keys_values(rng, leading=(3, 3))
    mask = random_mask(rng, 3, 4, 5)
    words = ["mask", "(3, 4, 5)", "(3, 3, 4, 5)", "mask[:, None]", "mask[None]"]
    for function in (scaled_dot_product_attention, attention_weights):
        arguments = arguments[: 3 if function is scaled_dot_product_attention else 2]
        assert_refuses(lambda mask: function(*arguments, mask=mask), mask, words=words)  # noqa: B023


@pytest.mark.parametrize("kind", [np.int32, bool])
def test_integers_and_booleans_are_numbers_and_the_others_have_gradients(rng, kind):
    x = jnp.asarray(rng.integers(0, 2, (2, 3, 6)).astype(kind))
    weights = [jnp.float32(rng.standard_normal((6, 6))) for _ in range(4)]

    def total(*weights, x=x):
        return jnp.sin(multi_head_attention(x, x, *weights, num_heads=2)).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(*weights)
    as_floats = partial(total, x=jnp.float32(x))
    expected = jax.grad(as_floats, argnums=(0, 1, 2, 3))(*weights)
    jax.tree.map(partial(assert_close, tolerance=1e-6), gradients, expected)


@pytest.mark.parametrize("implementation", ["formula", "chunked"])
def test_an_integer_operand_of_attention_leaves_the_others_their_gradients(rng, implementation):
    query, key, value = map(jnp.float32, queries_keys_values(rng))
    whole = jnp.round(3 * key).astype(int)

    def total(query, value, key):
        found = scaled_dot_product_attention(query, key, value, implementation=implementation)
        return jnp.sin(found).sum()

    gradients = jax.grad(total, argnums=(0, 1))(query, value, whole)
    expected = jax.grad(total, argnums=(0, 1))(query, value, jnp.float32(whole))
    jax.tree.map(partial(assert_close, tolerance=1e-6), gradients, expected)


@pytest.mark.parametrize("implementation", ["auto", "formula", "chunked"])
def test_a_symbolic_size_takes_the_formula(rng, implementation):
    symbols = jax.export.symbolic_shape("b, l, k")

    def function(query, key, value):
        mask = (jnp.arange(key.shape[-2]) > 0)[None]  # all keys but the first
        how = {"implementation": implementation, "compute_dtype": jnp.bfloat16}
        return scaled_dot_product_attention(query, key, value, mask, **how)

    b, length, keys = symbols
    shapes = [(b, 2, n, 8) for n in (length, keys, keys)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = jax.export.export(jax.jit(function))(*arguments)
    arguments = [jnp.float32(x) for x in queries_keys_values(rng, leading=(3, 2))]
    assert_close(exported.call(*arguments), function(*arguments), 1e-2)


@pytest.mark.parametrize("compute_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["formula", "chunked"])
def test_forward_over_reverse(rng, compute_dtype, implementation):
    x, direction = jnp.float32(rng.standard_normal((2, 2, 3, 6)))
    weights = [jnp.float32(rng.standard_normal((6, 6))) for _ in range(4)]

    def total(x):
        how = {"compute_dtype": compute_dtype, "implementation": implementation}
        mask = jnp.array([[True] * 3, [True, False, True], [False] * 3])  # the last sees nothing
        return jnp.sin(multi_head_attention(x, x, *weights, num_heads=2, mask=mask, **how)).sum()

    gradient = jax.grad(total)
    _, product = jax.jvp(gradient, (x,), (direction,))
    # Reverse over reverse gives the same product of the Hessian.
    expected = jax.grad(lambda x: jnp.vdot(gradient(x), direction))(x)
    assert relative_error(product, expected) < (1e-5 if compute_dtype is None else 0.05)


def test_16_bit_inputs_have_gradients_of_their_own_type(rng):
    arguments = [jnp.asarray(x, jnp.bfloat16) for x in queries_keys_values(rng)]
    for implementation in ("formula", "chunked"):
        attend = partial(scaled_dot_product_attention, implementation=implementation)
        gradients = jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))(*arguments)  # noqa: B023
        assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}


def test_lists_are_refused_by_name(rng):
    query, key, _ = queries_keys_values(rng)
    words = ["key", "list", "jnp.asarray(key)"]
    assert_refuses(attention_weights, query, key.tolist(), words=words, error=TypeError)
