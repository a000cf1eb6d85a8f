"""The Transformer of "Attention Is All You Need" as pure functions.

Everything here is a function of its arguments. Shapes are written in these letters:

    B  batch             L  query positions     D  d_model
    S  source length     K  key positions       F  d_ff
    T  target length     H  heads               V  vocabulary
    N  layers            d_k = D / H
"""

from tfm import jax_versions  # first: it refuses a JAX that gives wrong numbers
from tfm.activations import activation_names, activations
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
from tfm.functions import Functions
from tfm.kernels.quantization import quantize
from tfm.loss import label_smoothed_cross_entropy
from tfm.masks import causal_mask, padding_mask, segment_mask, shift_right
from tfm.model import Transformer
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

__version__ = "0.1.0"

# In the paper's order, which is that of the API reference.
__all__ = [
    # §3 the model of Figure 1
    "TransformerConfig",
    "BASE",
    "BIG",
    "Transformer",
    "Functions",
    "activations",
    "activation_names",
    "shift_right",
    # §3.1 layer normalization
    "layer_norm",
    # §3.2 attention
    "attention_weights",
    "scaled_dot_product_attention",
    "split_heads",
    "merge_heads",
    "multi_head_attention",
    "causal_mask",
    "padding_mask",
    "segment_mask",
    # §3.3 feed-forward networks
    "feed_forward",
    # §3.4 embeddings and the output
    "embed",
    "output_logits",
    "output_distribution",
    # §3.5 positions
    "sinusoidal_positions",
    # §5.3 optimizer
    "paper_schedule",
    "cosine_schedule",
    "global_norm",
    "clip_by_global_norm",
    "make_optimizer",
    "TrainState",
    "init_state",
    "make_train_step",
    "skip_nonfinite",
    # §5.4 regularization
    "dropout",
    "label_smoothed_cross_entropy",
    "summed_loss",
    # §6.1 decoding
    "start_decoding",
    "greedy",
    "beam_search",
    "sample",
    "average",
    "quantize",
]
