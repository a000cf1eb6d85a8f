"""Floating-point operations of matrix products, which are nearly all that there are.

2·I·O a position for a product by an [I, O] matrix, 4·L·K·D for an attention of L queries and K
keys. The letters are those of `tfm`; `source` and `target` are positions of one row.
"""

from tfm.config import TransformerConfig


def forward_flops(config: TransformerConfig, source: int, target: int) -> int:
    """Those of one forward pass over one row."""
    encoder, decoder, keys = _matrices(config)
    layers = config.num_encoder_layers * source * encoder
    layers += config.num_decoder_layers * (target * decoder + source * keys)
    return layers + attention_flops(config, source, target) + logits_flops(config, target)


def training_flops(config: TransformerConfig, source: int, target: int) -> int:
    """Those of one row of a step: the backward pass has two products for each of the forward."""
    return 3 * forward_flops(config, source, target)


def _matrices(config: TransformerConfig) -> tuple[int, int, int]:
    """Those of a position in the matrices of an encoder layer; of a decoder layer for the target, Q
    and O of the cross-attention among them; and for the source, its K and V."""
    d, f = config.d_model, config.d_ff
    return 2 * (4 * d * d + 2 * d * f), 2 * (6 * d * d + 2 * d * f), 2 * (2 * d * d)


def attention_flops(config: TransformerConfig, source: int, target: int) -> int:
    """Those of QKᵀ and of the weighted sum of V, of one row forward."""
    pairs = config.num_encoder_layers * source * source
    pairs += config.num_decoder_layers * (target + source) * target
    return 4 * pairs * config.d_model


def logits_flops(config: TransformerConfig, target: int) -> int:
    """Those of yW, of one row forward."""
    return 2 * target * config.d_model * config.vocab_size


def decoding_flops(config: TransformerConfig, source: int, steps: float, beam: int) -> float:
    """Those of a search with a cache for one source: the encoder and the cross-attention's K and V
    once, the rest once a step of each hypothesis, whose attention sees what is before it."""
    once = forward_flops(config, source, 0)
    step = config.num_decoder_layers * _matrices(config)[1] + logits_flops(config, 1)
    pairs = config.num_decoder_layers * (steps * (steps + 1) / 2 + steps * source)
    return once + beam * (steps * step + 4 * pairs * config.d_model)
