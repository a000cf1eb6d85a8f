import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from experiments.bench.inputs import attention_inputs, examples, tokens
from experiments.bench.workloads import WORKLOADS, Attention, Stream, Training, forward_flops
from tfm import Transformer, TransformerConfig
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
    assert used_product_flops(jax.grad(loss), params) == 3 * forward


def test_workloads_are_what_their_ids_say():
    assert list(WORKLOADS) == [work.id for work in WORKLOADS.values()]
    base = WORKLOADS["T1"].config
    assert (base.d_model, base.num_encoder_layers, base.vocab_size) == (512, 6, 8000)
    assert WORKLOADS["T2"].dtype == WORKLOADS["T4-bf16"].dtype == "bfloat16"
    assert all(work.what and work.peers for work in WORKLOADS.values())


def test_a_stream_has_the_lengths_of_real_words():
    work = Stream("x", TransformerConfig(vocab_size=9), 4, 20, 18, peers={}, examples=300)
    made = examples(work)
    assert len(made) == 300
    lengths = np.array([[len(e["source"]), len(e["target"])] for e in made])
    assert (lengths >= 2).all() and (lengths <= [20, 18]).all()
    assert 7 < lengths[:, 0].mean() < 10 and lengths[:, 0].std() > 1.5
    assert all(ids.min() >= 3 and ids.max() < 9 for e in made for ids in e.values())
    for one, other in zip(made, examples(work), strict=True):
        np.testing.assert_array_equal(one["target"], other["target"])


def test_decoding_says_what_it_multiplies_and_when_it_stops():
    assert "int8" in WORKLOADS["D3"].what and WORKLOADS["D3"].dtype == "int8"
    assert "at most 64" in WORKLOADS["D2-stopping"].what
    assert "float32" in WORKLOADS["D2"].what


def test_every_contender_gets_the_same_data():
    work = Training("x", TransformerConfig(vocab_size=9), rows=3, length=4, peers={})
    for one, other in zip(tokens(work), tokens(work), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == (3, 4) and one.min() >= 3 and one.max() < 9
    attention = Attention("x", 5, backward=False, peers={}, rows=2, heads=3, features=4)
    for one, other in zip(*(attention_inputs(attention, n) for n in ("BHLD", "BLHD")), strict=True):
        assert one.shape == (2, 3, 5, 4)
        np.testing.assert_array_equal(one, other.swapaxes(1, 2))
