"""What holds of the model whatever its parameters are."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, relative_error

from tfm import Transformer, TransformerConfig, summed_loss
from tfm.training import param_shapes

CONFIG = TransformerConfig(
    vocab_size=12,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)
ROWS, LENGTH = 3, 9


@partial(jax.jit, static_argnums=0)
def run(config, params, batch):
    model = Transformer(config)
    return model.apply({"params": params}, **batch, return_weights=True)


def logits(params, batch):
    return np.asarray(run(CONFIG, params, batch)[0])


def parameters(config=CONFIG):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32),
        param_shapes(config),
    )


def pack(*rows):
    """Each row is a list of (source, target) pairs, packed one after another into LENGTH slots."""
    empty = np.zeros((ROWS, LENGTH), np.int32)
    batch = {
        f"{side}{name}": empty.copy()
        for side in ("source", "target")
        for name in ("", "_segment_ids", "_positions")
    }
    for row, pairs in enumerate(rows):
        start = {"source": 0, "target": 0}
        for segment, pair in enumerate(pairs, start=1):
            for side, tokens in zip(("source", "target"), pair, strict=True):
                slots = slice(start[side], start[side] + len(tokens))
                batch[side][row, slots] = tokens
                batch[f"{side}_segment_ids"][row, slots] = segment
                batch[f"{side}_positions"][row, slots] = range(len(tokens))
                start[side] = slots.stop
    return batch


ONE = ([3, 7, 5, 2], [1, 4, 4, 9, 6])
TWO = ([8, 2, 6], [1, 10, 3])
THREE = ([5, 11], [1, 7, 2, 3])


SHORTEST = ([3], [1])
LONGEST_SOURCE = ([3, 7, 5, 8, 2, 6, 4, 9, 5], [1])
LONGEST_TARGET = ([3], [1, 4, 4, 9, 6, 2, 7, 3, 5])


@pytest.mark.parametrize("pair", [ONE, SHORTEST, LONGEST_SOURCE, LONGEST_TARGET])
def test_padding_does_not_change_a_sequence(pair):
    source, target = np.int32([pair[0]]), np.int32([pair[1]])
    bare, _ = run(CONFIG, parameters(), {"source": source, "target": target})
    padded = logits(parameters(), pack([pair]))[0, : target.size]
    assert_close(padded, bare[0], 1e-5)


def test_padding_is_where_the_token_is_0_unless_segments_say_otherwise():
    batch = pack([ONE], [TWO], [THREE])
    bare, _ = run(CONFIG, parameters(), {side: batch[side] for side in ("source", "target")})
    real = batch["target"] != 0
    assert_close(bare[real], logits(parameters(), batch)[real], 1e-5)


def test_packing_does_not_change_a_sequence():
    apart = logits(parameters(), pack([ONE], [TWO], [THREE]))
    packed = logits(parameters(), pack([TWO, ONE], [], [THREE, TWO]))
    assert_close(packed[0, :3], apart[1, :3], 1e-5)
    assert_close(packed[0, 3:8], apart[0, :5], 1e-5)
    assert_close(packed[2, :4], apart[2, :4], 1e-5)
    assert_close(packed[2, 4:7], apart[1, :3], 1e-5)


def test_what_stands_in_padding_does_not_matter():
    batch = pack([ONE], [TWO, THREE], [THREE])
    changed = dict(batch)
    for side in ("source", "target"):
        padding = batch[f"{side}_segment_ids"] == 0
        changed[side] = np.where(padding, 7, batch[side])
    before, after = (logits(parameters(), b) for b in (batch, changed))
    real = batch["target_segment_ids"] != 0
    np.testing.assert_array_equal(after[real], before[real])


def test_later_tokens_do_not_matter():
    before = logits(parameters(), pack([ONE]))[0]
    for position in range(1, 5):
        target = list(ONE[1])
        target[position] = 11
        after = logits(parameters(), pack([(ONE[0], target)]))[0]
        np.testing.assert_array_equal(after[:position], before[:position])
        assert not np.allclose(after[position], before[position], atol=1e-3)


def test_rows_do_not_influence_each_other():
    before = logits(parameters(), pack([ONE], [TWO], [THREE]))
    after = logits(parameters(), pack([TWO, TWO], [TWO], [ONE]))
    np.testing.assert_array_equal(after[1], before[1])


def test_the_jacobian_is_zero_exactly_where_nothing_may_flow():
    # With learned positions and a row of the table of its own for every slot, the derivative of
    # the logits by that row is the derivative by that slot's input.
    slots = ROWS * LENGTH
    config = replace(CONFIG, positions="learned", max_learned_positions=slots)
    batch = pack([ONE, TWO], [THREE], [TWO, THREE])
    own = np.arange(slots, dtype=np.int32).reshape(ROWS, LENGTH)
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    batch |= {"source_positions": own, "target_positions": own}
    params = parameters(config)

    @jax.jit
    def jacobians(tables):
        def some_logit(tables):
            # A weighted sum over the vocabulary: one number for each slot of the target.
            all_logits, _ = run(config, params | tables, batch)
            return (all_logits @ jnp.arange(1.0, 13.0)).reshape(-1)

        return jax.jacrev(some_logit)(tables)

    tables = {name: params[name] for name in ("source_positions", "target_positions")}
    flows = {name: (j != 0).any(-1) for name, j in jacobians(tables).items()}

    row = np.arange(slots) // LENGTH
    source, target = (np.ravel(batch[f"{side}_segment_ids"]) for side in ("source", "target"))
    same_row = row[:, None] == row[None, :]
    may_cross = same_row & (target[:, None] == source[None, :]) & (source != 0)
    may_self = same_row & (target[:, None] == target[None, :]) & (target != 0)
    may_self &= np.arange(slots)[:, None] >= np.arange(slots)[None, :]
    may_self |= np.eye(slots, dtype=bool)  # the residual path, of padding too
    np.testing.assert_array_equal(flows["source_positions"], may_cross)
    np.testing.assert_array_equal(flows["target_positions"], may_self)


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, params, batch):
    def loss(params):
        total, tokens = summed_loss(Transformer(config), params, batch, bos=1, smoothing=0.1)
        return total / jnp.maximum(tokens, 1)

    return jax.value_and_grad(loss)(params)


def test_fully_masked_rows_give_zeros_and_finite_gradients():
    # One row has a source that is all padding, and one is all padding.
    batch = pack([ONE], [([], [4, 5, 2])], [])
    all_logits, weights = run(CONFIG, parameters(), batch)
    assert np.isfinite(all_logits).all()
    assert (np.asarray(weights["cross"])[:, 1:] == 0).all()
    assert (np.asarray(weights["encoder"])[:, 1:] == 0).all()
    for tree in (loss_and_gradient(CONFIG, parameters(), b) for b in (batch, pack([], [], []))):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_bfloat16_stays_within_2_percent_of_float32():
    rounding = replace(CONFIG, compute_dtype="bfloat16")
    batch = pack([ONE, TWO], [THREE, ONE], [TWO, THREE])
    exact, rounded = (run(c, parameters(), batch)[0] for c in (CONFIG, rounding))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < relative_error(rounded, exact) < 0.02  # it rounds, but not much

    exact, rounded = (loss_and_gradient(c, parameters(), batch)[1] for c in (CONFIG, rounding))
    exact, rounded = (jax.tree.leaves(tree) for tree in (exact, rounded))
    assert all(leaf.dtype == jnp.float32 for leaf in rounded)
    exact, rounded = (np.concatenate([np.ravel(x) for x in tree]) for tree in (exact, rounded))
    assert 1e-4 < relative_error(rounded, exact) < 0.02
