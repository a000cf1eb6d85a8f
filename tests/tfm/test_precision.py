import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from checks import (
    assert_close,
    assert_default_precision,
    assert_gradients_right,
    assert_transforms_agree,
    products_in,
    relative_error,
)

from tfm.kernels.precision import blocked_transpose, broadcast_row, linear, matmul
from tfm.normalization import layer_norm

BF16 = jnp.bfloat16


def rounded(x):
    """Each element as the nearest bfloat16 number, in float64."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(BF16), np.float64)


def product(a, b):
    """The reference over leading axes."""
    return np.vectorize(references.matrix_product, signature="(l,i),(i,o)->(l,o)")(a, b)


def test_products_equal_the_reference(rng, tolerance):
    a, b, w = (rng.standard_normal(shape) for shape in [(2, 3, 4, 5), (2, 3, 5, 6), (5, 6)])
    assert_close(matmul(jnp.asarray(a), jnp.asarray(b)), product(a, b), tolerance)
    assert_close(linear(jnp.asarray(a), jnp.asarray(w)), product(a, w), tolerance)


def test_linear_takes_a_single_vector(rng):
    x, w = rng.standard_normal(5), rng.standard_normal((5, 6))
    assert_close(linear(jnp.asarray(x), jnp.asarray(w)), product(x[None], w)[0], 1e-5)


def test_leading_axes_broadcast(rng):
    a, b = rng.standard_normal((2, 1, 4, 5)), rng.standard_normal((3, 5, 6))
    assert_close(matmul(jnp.asarray(a), jnp.asarray(b)), product(a, b), 1e-5)


def test_gradients_of_products(rng, x64):
    a, b, w = (rng.standard_normal(shape) for shape in [(2, 4, 5), (2, 5, 6), (5, 6)])
    assert_gradients_right(matmul, a, b)
    assert_gradients_right(linear, a, w)


def test_products_under_jit_vmap_and_in_each_precision(rng):
    a, b, w = (rng.standard_normal(shape) for shape in [(2, 3, 4, 5), (2, 3, 5, 6), (5, 6)])
    assert_transforms_agree(matmul, a, b)
    assert_transforms_agree(linear, a, w, in_axes=(0, None))
    assert_default_precision(matmul, a, b)
    assert_default_precision(linear, a, w)


def test_the_default_asks_the_device_for_all_digits():
    # On a CPU this changes nothing; a GPU or TPU would round f32 operands to fewer bits.
    text = jax.jit(linear).lower(jnp.ones((2, 3)), jnp.ones((3, 4))).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text


# bfloat16 operands, float32 sums


def test_bfloat16_products_round_the_operands_and_nothing_else(rng):
    a, b = rng.standard_normal((2, 4, 5)), rng.standard_normal((2, 5, 6))
    out = matmul(jnp.asarray(a), jnp.asarray(b), BF16)
    assert out.dtype == jnp.float32
    assert_close(out, product(rounded(a), rounded(b)), 1e-6)
    assert_close(
        linear(jnp.asarray(a), jnp.asarray(b[0]), BF16), product(rounded(a), rounded(b[0])), 1e-6
    )


def test_bfloat16_products_are_summed_in_float32():
    # A sum kept in bfloat16 would stop at 256, where adding 1 no longer changes it.
    assert linear(jnp.ones(4096), jnp.ones((4096, 1)), BF16).tolist() == [4096.0]


def test_the_backward_pass_rounds_the_cotangent_too(rng):
    a, b, g = (rng.standard_normal(shape) for shape in [(2, 4, 5), (2, 5, 6), (2, 4, 6)])
    _, vjp = jax.vjp(lambda a, b: matmul(a, b, BF16), jnp.float32(a), jnp.float32(b))
    grad_a, grad_b = vjp(jnp.float32(g))
    assert (grad_a.dtype, grad_b.dtype) == (jnp.float32, jnp.float32)
    assert_close(grad_a, product(rounded(g), np.swapaxes(rounded(b), 1, 2)), 1e-6)
    assert_close(grad_b, product(np.swapaxes(rounded(a), 1, 2), rounded(g)), 1e-6)


@pytest.mark.parametrize("compute_dtype", [None, BF16])
def test_every_product_of_a_training_step_has_the_chosen_operands(compute_dtype):
    x, w = jnp.ones((4, 5)), jnp.ones((5, 6))

    def loss(x, w):
        return jnp.square(linear(x, w, compute_dtype)).sum()

    operand = "f32" if compute_dtype is None else "bf16"
    products = products_in(jax.grad(loss, argnums=(0, 1)), x, w)
    assert products == [(operand, operand, "f32")] * 3  # forward, and one for each gradient


def test_a_broadcast_operand_gets_the_sum_of_its_gradients(rng):
    x, w, g = (rng.standard_normal(shape) for shape in [(2, 3, 5), (5, 6), (2, 3, 6)])

    def gradient(compute_dtype):
        function = lambda w: (matmul(jnp.float32(x), w, compute_dtype) * g).sum()  # noqa: E731
        return jax.jit(jax.grad(function))(jnp.float32(w))

    assert gradient(BF16).shape == (5, 6)
    assert relative_error(gradient(BF16), gradient(None)) < 0.02


def test_bfloat16_products_under_jit_and_vmap(rng):
    a, b, w = (rng.standard_normal(shape) for shape in [(2, 3, 4, 5), (2, 3, 5, 6), (5, 6)])
    assert_transforms_agree(lambda a, b: matmul(a, b, BF16), a, b)
    assert_transforms_agree(lambda a, w: linear(a, w, BF16), a, w, in_axes=(0, None))


# The same, in the order that is fast

TALL = (1024, 520)  # rows that come in blocks, and enough of them


@pytest.mark.parametrize("shape", [TALL, (1031, 520), (6, 5)])  # the second has no blocks
@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_turned_is_the_transpose(rng, shape, dtype):
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    assert bool((jax.jit(blocked_transpose)(x) == x.T).all())
    assert bool((jax.vmap(blocked_transpose)(jnp.stack([x, -x])) == jnp.stack([x.T, -x.T])).all())


@pytest.mark.parametrize("compute_dtype", [None, BF16])
def test_the_gradient_of_a_tall_product_is_that_of_the_reference(rng, compute_dtype):
    x, w, g = (rng.standard_normal(s) for s in [TALL, (520, 4), (1024, 4)])

    def total(x, w):
        return (linear(x, w, compute_dtype) * jnp.float32(g)).sum()

    lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(jnp.float32(x), jnp.float32(w))
    assert "while" in lowered.as_text()  # its rows are turned in blocks
    grads = lowered.compile()(jnp.float32(x), jnp.float32(w))
    round_ = (lambda z: z) if compute_dtype is None else rounded
    expected = product(round_(g), round_(w).T), product(round_(x).T, round_(g))
    for grad, right in zip(grads, expected, strict=True):
        assert relative_error(grad, right) < 1e-6


def test_the_gradient_of_a_tall_product_runs_where_the_weight_is_a_transpose(rng):
    x, table = jnp.float32(rng.standard_normal(TALL)), jnp.float32(rng.standard_normal((24, 520)))
    gradient = jax.jit(jax.grad(lambda table: linear(x, table.T, BF16).sum()))(table)
    assert relative_error(gradient, np.broadcast_to(rounded(x).sum(0), table.shape)) < 1e-6


def test_a_repeated_row_gets_the_sum_of_its_gradients_in_both_modes(rng, x64):
    row, x = rng.standard_normal(5), rng.standard_normal((3, 4, 5))

    def of(row):
        return jnp.sin(broadcast_row(row, x.shape) * x)

    reverse = jax.grad(lambda row: of(row).sum())(jnp.asarray(row))
    assert_close(reverse, (np.cos(row * x) * x).sum((0, 1)), 1e-12)
    _, forward = jax.jvp(lambda row: of(row).sum(), (row,), (np.ones(5),))
    assert_close(forward, reverse.sum(), 1e-12)


def test_functions_of_rows_have_both_modes_of_derivative(rng, x64):
    x, scale, bias = rng.standard_normal((3, 4)), *rng.standard_normal((2, 4))
    for function, arguments in [(layer_norm, (x, scale, bias)), (linear, (x, x.T))]:
        numbers = tuple(range(len(arguments)))
        modes = [jac(function, argnums=numbers)(*arguments) for jac in (jax.jacfwd, jax.jacrev)]
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), *modes)


def written_products(function, *shapes):
    """The operand and result types of each product in the program."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    types = r"dot_general .*: \(tensor<[\dx]+(\w+)>, tensor<[\dx]+(\w+)>\) -> tensor<[\dx]+(\w+)>"
    return sorted(re.findall(types, jax.jit(function).lower(*arguments).as_text()))


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("backend", ["gpu", "tpu", "cpu"])
def test_accelerators_round_what_they_write(monkeypatch, backend, rounded):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def forward_and_gradients(x, w, cotangent):
        y, pull = jax.vjp(lambda x, w: linear(x, w, BF16, rounded=rounded), x, w)
        assert y.dtype == jnp.float32
        return y, pull(cotangent)

    products = written_products(forward_and_gradients, (4, 8), (8, 16), (4, 16))
    # The gradient of w stays as it is summed.
    written = ["bf16", "bf16", "f32"] if rounded and backend != "cpu" else ["f32"] * 3
    assert products == [("bf16", "bf16", result) for result in written]


def test_the_default_device_says_what_a_program_is_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            (product,) = written_products(lambda x, w: linear(x, w, BF16), (4, 8), (8, 16))
        assert product == ("bf16", "bf16", "f32")


@pytest.mark.parametrize(("backend", "products"), [("gpu", 0), ("cpu", 1)])
def test_only_a_cpu_sums_rows_by_a_product(monkeypatch, backend, products):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    gradient = jax.grad(lambda row: broadcast_row(row, (4, 8)).sum())
    assert len(written_products(gradient, (8,))) == products
    assert_close(gradient(jnp.ones(8)), np.full(8, 4.0), 1e-6)
