"""The workloads by id, the same for every contender, with the target ratios."""

import dataclasses

from tfm.config import TransformerConfig

Goals = dict[str, float]
"""peer -> the ratio to reach: its seconds over ours"""

_BASE = TransformerConfig(vocab_size=8_000)
_SMALL = TransformerConfig(
    vocab_size=42, source_vocab_size=30, d_model=128, d_ff=512, num_heads=4,
    num_encoder_layers=3, num_decoder_layers=3,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training:
    """One optimizer step: forward, label-smoothed loss, backward, clipping, Adam."""

    id: str
    config: TransformerConfig
    rows: int
    length: int
    """Tokens in each row of the source, and of the target; no padding."""
    peers: Goals

    @property
    def dtype(self) -> str:
        return self.config.compute_dtype

    @property
    def what(self) -> str:
        c = self.config
        return (
            f"training step, d {c.d_model}, {c.num_encoder_layers}+{c.num_decoder_layers} layers, "
            f"vocabulary {c.vocab_size:,}, {self.rows}×{self.length}, {c.compute_dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Stream:
    """Optimizer steps over examples of real lengths, the input pipeline with them.

    All contenders have the same examples, with the lengths of CMUdict's words and pronunciations.
    Each makes its own batches of about rows × source slots. The time is per 1,000 real tokens of
    source and target.
    """

    id: str
    config: TransformerConfig
    rows: int
    source: int
    target: int
    peers: Goals
    examples: int = 20_000

    @property
    def dtype(self) -> str:
        return self.config.compute_dtype

    @property
    def what(self) -> str:
        c = self.config
        return (
            f"1,000 real tokens in training steps, d {c.d_model}, {c.num_encoder_layers}+"
            f"{c.num_decoder_layers} layers, vocabulary {c.vocab_size:,}, CMUdict's lengths, about "
            f"{self.rows}×{self.source} slots, {c.compute_dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(QKᵀ/√d_k)V of 32 rows and 8 heads of 64 features, in f32."""

    id: str
    length: int
    backward: bool
    peers: Goals
    rows: int = 32
    heads: int = 8
    features: int = 64
    dtype: str = "float32"

    @property
    def what(self) -> str:
        passes = "forward and backward" if self.backward else "forward"
        return f"attention, {passes}, {self.rows}×{self.length}×{self.heads}×{self.features}"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Sources of random tokens decoded to `target` tokens each, none ending before; or `stopping`
    where a hypothesis's end symbol comes, at a length of its source's own."""

    id: str
    config: TransformerConfig
    rows: int
    beam: int
    peers: Goals
    source: int = 32
    target: int = 64
    stopping: bool = False
    int8: bool = False
    """The matrices in 8 bits, and the rows that they are multiplied by, each as it comes."""

    @property
    def dtype(self) -> str:
        return "int8" if self.int8 else self.config.compute_dtype

    @property
    def what(self) -> str:
        c, search = self.config, "greedy" if self.beam == 1 else f"beam {self.beam}"
        return (
            f"{search} decoding, d {c.d_model}, {c.num_encoder_layers}+{c.num_decoder_layers} "
            f"layers, vocabulary {c.vocab_size:,}, {self.rows} sources of {self.source} tokens to "
            f"{'at most ' if self.stopping else ''}{self.target}, {self.dtype}"
        )


Workload = Training | Stream | Attention | Decoding


def _torch(goal: float) -> Goals:
    return {"torch eager": goal, "torch compile": goal}


_ATTENTION = dict.fromkeys(("torch SDPA", "flax linen", "flax nnx", "jax.nn"), 1.2)
_BASE_16, _SMALL_16 = (
    dataclasses.replace(config, compute_dtype="bfloat16") for config in (_BASE, _SMALL)
)

WORKLOADS: dict[str, Workload] = {
    work.id: work
    for work in (
        Training("T1", _BASE, 32, 48, _torch(2.2)),
        Training("T2", _BASE_16, 32, 48, _torch(1.3)),
        Stream("T3", _BASE, 32, 48, 43, _torch(2.2)),
        Training("T4-f32", _SMALL, 85, 24, _torch(2.5)),
        Training("T4-bf16", _SMALL_16, 85, 24, _torch(1.5)),
        *(
            Attention(f"A1-{length}-{name}", length, backward, _ATTENTION)
            for length in (64, 256, 1024)
            for name, backward in (("forward", False), ("both", True))
        ),
        Decoding("D1-b1", _BASE, 1, 1, {"ctranslate2": 1.1, "transformers": 5}),
        Decoding("D1-b32", _BASE, 32, 1, {"ctranslate2": 2.0, "transformers": 5}),
        Decoding("D2", _BASE, 32, 4, {"ctranslate2": 2.0, "transformers": 5}),
        Decoding("D2-stopping", _BASE, 32, 4, {"ctranslate2": 2.0, "transformers": 5},
                 stopping=True),
        Decoding("D3", _BASE, 32, 4, {"ctranslate2": 1.3}, int8=True),
    )
}  # fmt: skip
