"""Which Transformer is this? The models that bear the paper's name, as far as they differ."""

from dataclasses import dataclass
from typing import Any

from tfm.config import BASE, TransformerConfig
from tfm.decoding import Penalty
from tfm.loss import SmoothedOver


@dataclass(frozen=True)
class Variant:
    """A model of the base size with what its library sets by default around it."""

    model: TransformerConfig = BASE
    smoothing: float = 0.1
    """Label smoothing ε."""
    smoothed_over: SmoothedOver = "all"
    """The words that share ε: see `tfm.label_smoothed_cross_entropy`."""
    alpha: float = 0.6
    """Exponent of the length penalty; 0 means none."""
    penalty: Penalty = "paper"
    """Form of the length penalty: see `tfm.beam_search`."""
    read: str = ""
    """Where these settings stand."""
    apart: str = ""
    """What differs beyond what these settings can say."""


_PRE: dict[str, Any] = {
    "norm_placement": "pre",
    "attention_dropout_rate": 0.1,
    "activation_dropout_rate": 0.1,
}
_TORCH: dict[str, Any] = {"projection_bias": True, "layer_norm_epsilon": 1e-5}


VARIANTS = {
    "paper": Variant(read="Vaswani et al. 2017, base model"),
    "tensor2tensor": Variant(
        TransformerConfig(**_PRE, sinusoid_layout="tensor2tensor"),
        smoothed_over="others",
        read="hparams transformer_base (the third version)",
        apart="Adam's β₂ is 0.997, the peak of the learning rate is reached after 8,000 steps",
    ),
    "fairseq": Variant(
        TransformerConfig(**_TORCH, sinusoid_layout="tensor2tensor", first_position=2),
        smoothed_over="others",
        alpha=1.0,
        penalty="power",
        read="arch transformer_wmt_en_de with --share-all-embeddings",
        apart="W^Q, W^K and W^V begin smaller by √2",
    ),
    "flax-wmt": Variant(
        TransformerConfig(**_PRE, sinusoid_layout="tensor2tensor"),
        smoothed_over="others",
        read="flax, examples/wmt, configs/default.py",
        apart="one table E·√d_model with logits divided by √d_model: the same function, but Adam "
        "moves it in other steps",
    ),
    "annotated": Variant(
        TransformerConfig(
            **_PRE,
            source_vocab_size=37_000,
            tied_output=False,
            projection_bias=True,
            output_bias=True,
        ),
        smoothed_over="others_but_padding",
        alpha=0.0,
        read="The Annotated Transformer (2022)",
        apart="LayerNorm divides by s + ε, s the deviation with n − 1; it decodes greedily",
    ),
    "marian": Variant(
        TransformerConfig(**_TORCH, activation="swish", output_bias=True, sinusoid_layout="halves"),
        alpha=1.0,
        penalty="power",
        read="OPUS-MT models as transformers' MarianMTModel holds them",
        apart="Marian itself has tensor2tensor's wave lengths",
    ),
}
"""By name; `paper` is the default everywhere."""
