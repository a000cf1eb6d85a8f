"""The Transformer of "Attention Is All You Need" as pure functions.

Everything here is a function of its arguments. Shapes are written in these letters:

    B  batch             L  query positions     D  d_model
    S  source length     K  key positions       F  d_ff
    T  target length     H  heads               V  vocabulary
    N  layers            d_k = D / H
"""

from tfm.attention import (
    attention_weights,
    merge_heads,
    multi_head_attention,
    scaled_dot_product_attention,
    split_heads,
)
from tfm.clipping import clip_by_global_norm, global_norm
from tfm.dropout import dropout
from tfm.embedding import embed, output_distribution, output_logits
from tfm.feed_forward import feed_forward
from tfm.loss import label_smoothed_cross_entropy
from tfm.masks import causal_mask, padding_mask, segment_mask
from tfm.normalization import layer_norm
from tfm.positions import sinusoidal_positions
