"""Floating-point operations of the matrix products, which are nearly all operations.

A product by an [I, O] matrix takes 2·I·O per position; an attention of L queries and K keys takes
4·L·K·D. The letters are those of `tfm`; `source` and `target` are the positions of one row.
"""

from tfm.config import TransformerConfig


def forward_flops(config: TransformerConfig, source: int, target: int) -> int:
    """FLOPs of the forward pass of one row."""
    encoder, decoder, keys = _matrices(config)
    layers = config.num_encoder_layers * source * encoder
    layers += config.num_decoder_layers * (target * decoder + source * keys)
    return layers + attention_flops(config, source, target) + logits_flops(config, target)


def training_flops(config: TransformerConfig, source: int, target: int) -> int:
    """FLOPs of one row in a step: the backward pass has two products for each forward one."""
    return 3 * forward_flops(config, source, target)


def _matrices(config: TransformerConfig) -> tuple[int, int, int]:
    """FLOPs per position of the matrices in an encoder layer, in a decoder layer for the target
    (with Q and O of the cross-attention), and for the source (its K and V)."""
    d, f = config.d_model, config.d_ff
    return 2 * (4 * d * d + 2 * d * f), 2 * (6 * d * d + 2 * d * f), 2 * (2 * d * d)


def attention_flops(config: TransformerConfig, source: int, target: int) -> int:
    """FLOPs of QKᵀ and of the weighted sums of V, in the forward pass of one row."""
    pairs = config.num_encoder_layers * source * source
    pairs += config.num_decoder_layers * (target + source) * target
    return 4 * pairs * config.d_model


def logits_flops(config: TransformerConfig, target: int) -> int:
    """FLOPs of yW, in the forward pass of one row."""
    return 2 * target * config.d_model * config.vocab_size


def decoding_flops(config: TransformerConfig, source: int, steps: float, beam: int) -> float:
    """FLOPs of decoding one source with a cache.

    The encoder and the K and V of the cross-attention run once. The rest runs once per step and
    hypothesis, with an attention over the positions so far.
    """
    once = forward_flops(config, source, 0)
    step = config.num_decoder_layers * _matrices(config)[1] + logits_flops(config, 1)
    pairs = config.num_decoder_layers * (steps * (steps + 1) / 2 + steps * source)
    return once + beam * (steps * step + 4 * pairs * config.d_model)
