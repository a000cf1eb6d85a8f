"""Derivatives of the whole model, in every mode that JAX has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import relative_error

import tfm

CONFIG = tfm.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
)
BATCH = {
    "source": jnp.array([[3, 4, 5, 2, 0], [6, 3, 2, 0, 0]]),
    "target": jnp.array([[3, 4, 2], [5, 2, 0]]),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}


def loss_of(**changes):
    model = tfm.Transformer(dataclasses.replace(CONFIG, **changes))
    return jax.jit(lambda p: tfm.summed_loss(model, p, BATCH, 1, 0.1, jax.random.key(2))[0])


@pytest.fixture(scope="module")
def point():
    """Parameters, and a direction from there."""
    params = tfm.Transformer(CONFIG).init(jax.random.key(0), *BATCH.values())["params"]
    rng = np.random.default_rng(0)
    return params, jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float32", {"scan_layers": True, "rematerialize": "layers"}),
    ],
    ids=str,
)
def test_the_formulas_have_forward_mode(point, dtype, changes):
    params, direction = point
    loss = loss_of(implementation="formula", compute_dtype=dtype, **changes)
    gradient = jax.jit(jax.grad(loss))
    expected = inner(gradient(params), direction)
    _, forward = jax.jvp(loss, (params,), (direction,))
    assert relative_error(forward, expected) < TOLERANCE[dtype]
    _, linear = jax.linearize(loss, params)
    assert relative_error(linear(direction), expected) < TOLERANCE[dtype]
    along = jax.vmap(lambda scale: jax.jvp(
        loss, (params,), (jax.tree.map(lambda x: scale * x, direction),))[1])  # fmt: skip
    slopes = along(jnp.array([1.0, -2.0]))
    assert relative_error(slopes, np.array([1, -2]) * expected) < TOLERANCE[dtype]
    _, product = jax.jvp(gradient, (params,), (direction,))
    # Reverse over reverse gives the same product of the Hessian.
    same = jax.grad(lambda p: inner(gradient(p), direction))(params)
    assert relative_error(flat(product), flat(same)) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", ["auto", "chunked"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_hessian_s_product_goes_through_the_kernels(point, implementation, dtype):
    params, direction = point
    loss, formula = (
        loss_of(implementation=name, compute_dtype=dtype) for name in (implementation, "formula")
    )
    product, expected = (jax.jvp(jax.grad(f), (params,), (direction,))[1] for f in (loss, formula))
    assert relative_error(flat(product), flat(expected)) < TOLERANCE[dtype]


def test_gradients_of_each_example_are_those_of_it_alone(point, request):
    params, _ = point
    # Of the kernels where they are compiled as users compile them: XLA's older emitter, which the
    # quick tests use on JAX 0.10, aborts at their batched products.
    optimized = request.config.getoption("optimized")
    config = dataclasses.replace(CONFIG, implementation="auto" if optimized else "formula")
    model = tfm.Transformer(config)

    def loss(params, source, target):
        batch = {"source": source[None], "target": target[None]}
        return tfm.summed_loss(model, params, batch, 1, 0.1)[0]

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, *BATCH.values())
    for i in range(2):
        alone = jax.jit(jax.grad(loss))(params, *(x[i] for x in BATCH.values()))
        assert relative_error(flat(jax.tree.map(lambda x: x[i], each)), flat(alone)) < 1e-5  # noqa: B023


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, {"compute_dtype": "bfloat16"}],
                         ids=str)  # fmt: skip
def test_a_kernel_without_forward_mode_says_what_to_set(point, changes):
    params, direction = point
    loss = loss_of(**changes).__wrapped__
    with pytest.raises(TypeError, match=r"jax.jvp .*implementation='formula'") as caught:
        jax.jvp(loss, (params,), (direction,))
    assert "\n" not in str(caught.value).split("\n-----")[0]
