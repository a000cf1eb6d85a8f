"""The model's numbers: what the paper fixes, and every departure from it as a named option."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tfm.kernels.implementation import Implementation, resolve
from tfm.positions import SinusoidLayout
from tfm.renaming import renamed

_AT_LEAST_1 = (
    "vocab_size",
    "source_vocab_size",
    "vocab_multiple",
    "d_model",
    "d_ff",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "max_learned_positions",
)


@dataclass(frozen=True)
class TransformerConfig:
    """The hyper-parameters of a Transformer; the defaults are the paper's base model (Table 3).

    Raises:
      ValueError: a combination that is not a model; the message names the fields and numbers.
    """

    vocab_size: int = 37_000
    """Symbols of the target, and of the source too where the two share one vocabulary."""
    source_vocab_size: int | None = None
    """Symbols of a separate source vocabulary. None shares the target's, and with it one matrix
    for both embeddings and the output (three-way tying)."""
    vocab_multiple: int = 1
    """Embeddings and output have rows for a multiple of it, so that a mesh can divide them: what is
    beyond the vocabulary is never predicted."""
    d_model: int = 512
    """Features of every position between the layers."""
    d_ff: int = 2048
    """Hidden features of the feed-forward networks."""
    num_heads: int = 8
    """Attention heads h; each works on d_model / h features."""
    num_encoder_layers: int = 6
    """Layers of the encoder."""
    num_decoder_layers: int = 6
    """Layers of the decoder."""
    dropout_rate: float = 0.1
    """Dropout on each sub-layer's output and on the sum of embedding and position."""
    attention_dropout_rate: float = 0.0
    """Dropout on the attention weights (not in the paper)."""
    activation: Literal["relu", "swish", "gelu"] = "relu"
    """Between the two products of the feed-forward networks; relu is the paper's."""
    activation_dropout_rate: float = 0.0
    """Dropout after it (not in the paper)."""
    norm_placement: Literal["post", "pre"] = "post"
    """post: LayerNorm(x + Sublayer(x)), the paper's. pre: x + Sublayer(LayerNorm(x))."""
    final_norm: bool | None = None
    """A normalisation after the last layer of encoder and of decoder. None: with pre, which needs
    it, and not with post (`torch.nn.Transformer` has it with both)."""
    layer_norm_epsilon: float = 1e-6
    """ε inside the root of the layer normalisation."""
    projection_bias: bool = False
    """Biases in the four attention projections (not in the paper)."""
    output_bias: bool = False
    """A bias b in softmax(yW + b)."""
    tied_output: bool = True
    """W is the target's embedding matrix, transposed. False: a matrix `output` of its own."""
    scale_embeddings: bool = True
    """√d_model on the embeddings."""
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    """How positions are encoded; learned is the paper's Table 3 row E."""
    sinusoid_layout: SinusoidLayout = "interleaved"
    """Order and wave lengths of the sinusoids: see `tfm.sinusoidal_positions`."""
    first_position: int = 0
    """The number of a sequence's first position (fairseq: 2)."""
    max_learned_positions: int = 512
    """Rows of each learned position table."""
    initializer: Literal["xavier_uniform", "lecun_normal", "he_normal"] = "xavier_uniform"
    """Initialiser of the weight matrices. Embeddings are normal with deviation 1/√d_model."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "float32"
    """Operands of the matrix products. bfloat16 still sums in f32 and keeps f32 parameters, and a
    GPU or TPU rounds the sums between layers too; float64 is for checks, under `jax_enable_x64`.
    auto: what suits the devices, see `for_platform`."""
    implementation: Implementation = "auto"
    """How everything is computed, to the same result. auto: as it is fast on the device. formula:
    as it stands in the paper, by plain operations. chunked, cudnn: attention in that way, see
    `tfm.scaled_dot_product_attention`."""
    scan_layers: bool = False
    """The layers as one loop of the program, to the same result: it is compiled in the time of one
    layer, and holds the layers' parameters twice."""
    rematerialize: Literal["nothing", "layers"] = "nothing"
    """What the backward pass computes anew, to the same result: layers keeps only what goes into
    each layer, which takes a third more products and far less memory. XLA for the CPU undoes it
    unless scan_layers is set."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "implementation", resolve(self.implementation))
        for name, annotation in get_type_hints(type(self)).items():
            allowed = get_args(annotation) if get_origin(annotation) is Literal else None
            if allowed and getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        for name in _AT_LEAST_1:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.first_position < 0:
            raise ValueError(f"first_position={self.first_position} must be at least 0")
        for name in ("dropout_rate", "attention_dropout_rate", "activation_dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 < self.layer_norm_epsilon < math.inf:
            raise ValueError(
                f"layer_norm_epsilon={self.layer_norm_epsilon} must be positive and finite"
            )
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} is odd: sinusoidal positions need pairs of sin and cos"
            )

    @property
    def attention(self) -> Implementation:
        """The former name of `implementation`."""
        message = "TransformerConfig.attention is called implementation now"
        warnings.warn(message, FutureWarning, stacklevel=2)
        return self.implementation

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(current_fields(state))  # of a pickle from before

    def for_platform(self, platform: str) -> "TransformerConfig":
        """The config with `compute_dtype="auto"` decided: bfloat16 on a "gpu" or "tpu", whose
        matrix units are made for it, float32 elsewhere."""
        if self.compute_dtype != "auto":
            return self
        if platform in ("gpu", "tpu"):
            return replace(self, compute_dtype="bfloat16")
        return replace(self, compute_dtype="float32")

    @property
    def has_final_norm(self) -> bool:
        """Whether encoder and decoder end in a normalisation."""
        return self.norm_placement == "pre" if self.final_norm is None else self.final_norm

    def padded(self, vocab_size: int) -> int:
        """The rows of a table for `vocab_size` symbols."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    def parameter_count(self) -> int:
        """The number of parameters, by formula; what `vocab_multiple` adds is none.

        Encoder layer: 4D² + (2DF + F + D) + 2·2D. Decoder layer: 8D² + (2DF + F + D) + 3·2D.
        One V·D matrix where the vocabulary is shared and the output is tied.
        """
        d, f = self.d_model, self.d_ff
        attention = 4 * d * d + (4 * d if self.projection_bias else 0)
        feed_forward, norm = 2 * d * f + f + d, 2 * d
        encoder = self.num_encoder_layers * (attention + feed_forward + 2 * norm)
        decoder = self.num_decoder_layers * (2 * attention + feed_forward + 3 * norm)
        final_norms = 2 * norm if self.has_final_norm else 0
        target = self.vocab_size if self.tied_output else 2 * self.vocab_size
        embeddings = (target + (self.source_vocab_size or 0)) * d
        positions = 2 * self.max_learned_positions * d if self.positions == "learned" else 0
        bias = self.vocab_size if self.output_bias else 0
        return encoder + decoder + final_norms + embeddings + positions + bias


TransformerConfig.__init__ = renamed(attention="implementation")(  # type: ignore[method-assign]
    TransformerConfig.__init__
)


def current_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's fields as a file has them, those of former names under their present ones."""
    fields = dict(fields)
    if "attention" in fields:
        implementation = fields.pop("attention")
        fields["implementation"] = "formula" if implementation == "reference" else implementation
    return fields


BASE = TransformerConfig()
"""The paper's base model, for English-German (37,000 shared byte pairs)."""

BIG = TransformerConfig(d_model=1024, d_ff=4096, num_heads=16, dropout_rate=0.3)
"""The paper's big model, for English-German."""
