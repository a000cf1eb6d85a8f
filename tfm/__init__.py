"""The Transformer of "Attention Is All You Need" as pure functions.

Everything here is a function of its arguments. Shapes are written in these letters:

    B  batch             L  query positions     D  d_model
    S  source length     K  key positions       F  d_ff
    T  target length     H  heads               V  vocabulary
    N  layers            d_k = D / H
"""

from tfm import jax_versions  # first: it refuses a JAX that gives wrong numbers
from tfm.attention import (
    attention_weights,
    merge_heads,
    multi_head_attention,
    scaled_dot_product_attention,
    split_heads,
)
from tfm.averaging import average
from tfm.clipping import clip_by_global_norm, global_norm
from tfm.config import BASE, BIG, TransformerConfig
from tfm.decoding import beam_search, greedy, sample, start_decoding
from tfm.dropout import dropout
from tfm.embedding import embed, output_distribution, output_logits
from tfm.feed_forward import feed_forward
from tfm.kernels.quantization import quantize
from tfm.layers import Functions
from tfm.loss import label_smoothed_cross_entropy
from tfm.masks import causal_mask, padding_mask, segment_mask
from tfm.model import Transformer, shift_right
from tfm.normalization import layer_norm
from tfm.positions import sinusoidal_positions
from tfm.training import (
    TrainState,
    cosine_schedule,
    init_state,
    make_optimizer,
    make_train_step,
    paper_schedule,
    skip_nonfinite,
    summed_loss,
)

__all__ = [
    "BASE",
    "BIG",
    "Functions",
    "TrainState",
    "Transformer",
    "TransformerConfig",
    "attention_weights",
    "average",
    "beam_search",
    "causal_mask",
    "clip_by_global_norm",
    "cosine_schedule",
    "dropout",
    "embed",
    "feed_forward",
    "global_norm",
    "greedy",
    "init_state",
    "label_smoothed_cross_entropy",
    "layer_norm",
    "make_optimizer",
    "make_train_step",
    "merge_heads",
    "multi_head_attention",
    "output_distribution",
    "output_logits",
    "padding_mask",
    "paper_schedule",
    "quantize",
    "sample",
    "scaled_dot_product_attention",
    "segment_mask",
    "shift_right",
    "sinusoidal_positions",
    "skip_nonfinite",
    "split_heads",
    "start_decoding",
    "summed_loss",
]
