import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from checks import assert_refuses, assert_transforms_agree

from tfm import attention_weights, causal_mask, padding_mask, segment_mask

# Two sequences packed into a row of six, and a row that holds a single one.
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0]])


def test_a_position_may_attend_to_itself_and_to_earlier_ones():
    assert causal_mask(3).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(3).dtype == bool


@pytest.mark.parametrize("length", [1, 2, 7])
def test_causal_mask_equals_the_reference(length):
    assert (causal_mask(length) == references.causal_mask(length)).all()


def test_padding_mask_allows_real_tokens():
    mask = np.asarray(padding_mask(jnp.array([[7, 3, 0], [5, 0, 0]])))
    assert mask.shape == (2, 1, 1, 3)
    assert mask.dtype == bool
    assert mask[:, 0, 0].astype(int).tolist() == [[1, 1, 0], [1, 0, 0]]


def test_padding_may_have_another_id():
    assert padding_mask(jnp.array([7, 3, 0]), pad_id=3).tolist() == [[[True, False, True]]]


def test_segment_mask_keeps_packed_sequences_apart():
    mask = np.asarray(segment_mask(jnp.array([1, 1, 2, 0]), jnp.array([1, 2, 2, 0])))
    assert mask.shape == (1, 4, 4)
    assert mask.dtype == bool
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],  # padding attends to nothing, not even to padding
    ]


def test_segment_mask_equals_the_reference():
    queries, keys = SEGMENTS, SEGMENTS[:, 1:]
    mask = segment_mask(jnp.asarray(queries), jnp.asarray(keys))
    assert mask.shape == (2, 1, 6, 5)
    assert (np.asarray(mask)[:, 0] == references.segment_mask(queries, keys)).all()


def test_masks_combine_and_fit_attention(rng):
    mask = causal_mask(6)[None, None] & segment_mask(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS))
    x = rng.standard_normal((2, 3, 6, 4))  # [B, H, L, d_k]
    allowed = references.causal_mask(6) & references.segment_mask(SEGMENTS, SEGMENTS)
    weights = np.asarray(jax.jit(attention_weights)(x, x, mask))
    assert ((weights > 0) == allowed[:, None]).all()


def test_masks_under_jit_and_vmap(rng):
    tokens, others = rng.integers(0, 3, (2, 2, 3, 5))
    assert_transforms_agree(padding_mask, tokens)
    assert_transforms_agree(segment_mask, tokens, others[..., :4])


def test_masks_refuse_shapes_that_do_not_fit():
    assert_refuses(padding_mask, jnp.array(1), words=["tokens", "()"])
    row, rows = jnp.ones((2, 4), int), jnp.ones((3, 4), int)
    assert_refuses(segment_mask, jnp.array(1), row, words=["query_segments", "()"])
    assert_refuses(segment_mask, row, jnp.array(1), words=["key_segments", "()"])
    words = ["key_segments", "(3, 4)", "query_segments", "(2, 4)"]
    assert_refuses(segment_mask, row, rows, words=words)
