"""The FLOPs by formula beside those of the products that the model is traced to.

Beside XLA's own count: test_compiled.py.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from experiments.plan.flops import decoding_flops, forward_flops, training_flops
from tfm import BASE, Transformer, TransformerConfig
from tfm.training import param_shapes, summed_loss


def used_product_flops(function, *arguments) -> int:
    """Of the products that the results depend on; XLA drops the others too."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return product_flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def product_flops(jaxpr) -> int:
    """2·(size of the result)·(length of the contraction), over every dot_general within.

    But for the sums of rows, which `precision.broadcast_row` has as products with [8, rows] ones.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            result = equation.outvars[0].aval.shape
            if len(left) == 2 and 8 in (left[0], equation.invars[1].aval.shape[0]):
                continue
            total += 2 * math.prod(result) * math.prod(left[i] for i in contracted)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("source", [None, 7])
def test_the_flops_are_those_of_the_products_that_are_traced(source):
    config = TransformerConfig(
        vocab_size=11, source_vocab_size=source, d_model=24, d_ff=12, num_heads=2,
        num_encoder_layers=2, num_decoder_layers=3,
    )  # fmt: skip
    model, rows = Transformer(config), 2
    params = param_shapes(config)
    batch = {}
    for side, length in (("source", 5), ("target", 3)):
        for name in ("", "_segment_ids", "_positions"):
            batch[side + name] = jnp.ones((rows, length), jnp.int32)

    def loss(params):
        return summed_loss(model, params, batch, 1, 0.1)[0]

    forward = rows * forward_flops(config, 5, 3)
    assert used_product_flops(loss, params) == forward
    assert used_product_flops(jax.grad(loss), params) == rows * training_flops(config, 5, 3)


def test_decoding_takes_a_forward_pass_less_the_half_of_attention_that_is_masked():
    source, t, beam = 32, 64, 4
    whole = forward_flops(BASE, source, 0)
    each = forward_flops(BASE, source, t) - whole
    spared = 4 * BASE.d_model * BASE.num_decoder_layers * (t * t - t * (t + 1) / 2)
    assert decoding_flops(BASE, source, t, beam) == whole + beam * (each - spared)
