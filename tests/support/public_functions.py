"""The public functions of `tfm`, each with arguments to call it with."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import tfm
from tfm.kernels.precision import linear

CONFIG = tfm.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
)
MODEL = tfm.Transformer(CONFIG)
REMAT = tfm.Transformer(dataclasses.replace(CONFIG, rematerialize="layers"))
SEVERAL = {"num_encoder_layers": 2, "num_decoder_layers": 2, "scan_layers": True}
SCANNED = tfm.Transformer(dataclasses.replace(CONFIG, **SEVERAL))
BOTH = tfm.Transformer(dataclasses.replace(SCANNED.config, rematerialize="layers"))
MODELS = {"layers": MODEL, "scanned": SCANNED, "remat": REMAT, "both": BOTH}
KEY = jax.random.PRNGKey(0)  # a raw one, which several calls may use
X = jnp.ones((2, 6, 8))
HEADS = jnp.ones((2, 2, 6, 4))
LONG = jnp.ones((2, 8, 512, 4))  # auto computes it in chunks
TALL = jnp.ones((1024, 520))  # its product has a gradient in blocks
MASK = np.tri(6, dtype=bool)
W, B = jnp.ones((8, 8)), jnp.ones(8)
W1, B1, W2 = jnp.ones((8, 12)), jnp.ones(12), jnp.ones((12, 8))
IDS = jnp.array([[3, 4, 5, 2, 0, 0], [1, 2, 3, 4, 5, 6]])
BATCH = {"source": IDS, "target": IDS}
TREE = {"a": X, "b": [B]}

bf16 = {"compute_dtype": jnp.bfloat16}
FUNCTIONS = {
    "attention_weights": (tfm.attention_weights, HEADS, HEADS, MASK),
    "attention": (tfm.scaled_dot_product_attention, HEADS, HEADS, HEADS, MASK),
    "long attention": (tfm.scaled_dot_product_attention, LONG, LONG, LONG),
    "multi_head_attention": (partial(tfm.multi_head_attention, num_heads=2), X, X, W, W, W, W),
    "multi_head_attention in bf16": (
        partial(tfm.multi_head_attention, num_heads=2, **bf16), X, X, W, W, W, W,
    ),
    "split_heads": (partial(tfm.split_heads, num_heads=2), X),
    "merge_heads": (tfm.merge_heads, HEADS),
    "feed_forward": (tfm.feed_forward, X, W1, B1, W2, B),
    "feed_forward in bf16": (partial(tfm.feed_forward, **bf16), X, W1, B1, W2, B),
    "feed_forward with dropout": (
        partial(tfm.feed_forward, dropout_key=KEY, dropout_rate=0.1), X, W1, B1, W2, B,
    ),
    "feed_forward of many rows": (
        tfm.feed_forward, TALL, jnp.ones((520, 4)), jnp.ones(4), jnp.ones((4, 520)), jnp.ones(520),
    ),
    "layer_norm": (tfm.layer_norm, X, B, B),
    "dropout": (lambda x: tfm.dropout(jax.random.key(0), x, 0.1), X),
    "embed": (lambda table: tfm.embed(IDS, table), jnp.ones((11, 8))),
    "output_logits": (tfm.output_logits, X, W, B),
    "output_distribution": (tfm.output_distribution, X, W, B),
    "loss": (lambda z: tfm.label_smoothed_cross_entropy(z, IDS), jnp.ones((2, 6, 11))),
    "global_norm": (tfm.global_norm, TREE),
    "clip_by_global_norm": (lambda tree: tfm.clip_by_global_norm(tree, 0.1), TREE),
    "linear of many rows": (linear, TALL, jnp.ones((520, 4))),
    "clip_by_global_norm of numbers": (lambda x: tfm.clip_by_global_norm({"a": x}, 0.1), 3.0),
    "numpy": (lambda table: tfm.embed(np.asarray(IDS), table), np.ones((11, 8), np.float32)),
    "average": (lambda tree: tfm.average([tree, tree]), TREE),
}  # fmt: skip
UNDIFFERENTIATED = {
    "sinusoidal_positions of a length": (tfm.sinusoidal_positions, 6, 8),
    "sinusoidal_positions": (tfm.sinusoidal_positions, IDS, 8),
    "causal_mask": (tfm.causal_mask, 6),
    "padding_mask": (tfm.padding_mask, IDS),
    "segment_mask": (tfm.segment_mask, IDS, IDS),
    "shift_right": (tfm.shift_right, IDS, 1),
}


def gradient_of(case):
    """The gradient of a case's sum by all its arguments but the mask; and these."""
    function, *arguments = case

    def total(*arguments):
        return sum(leaf.sum() for leaf in jax.tree.leaves(function(*arguments)))

    every = tuple(range(sum(x is not MASK for x in arguments)))
    return jax.grad(total, argnums=every), *arguments
