"""The sizes of the measured work: for a GPU, and tiny ones for a CPU."""

import dataclasses

from tfm.config import BASE, BIG, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of every part; the defaults fill one card of 40 to 140 GB."""

    product: int = 8192
    """n of the n×n by n×n product that is the ceiling of FLOP/s."""
    copied: int = 2**31
    """Bytes of the array that is copied."""
    least_runs: int = 10
    """Timed runs of which the median is taken."""
    models: tuple[tuple[str, TransformerConfig], ...] = (("BASE", BASE), ("BIG", BIG))
    """That are trained."""
    length: int = 128
    """Tokens in each row of the source, and of the target; no padding."""
    most_rows: int = 512
    """Rows of a training step at most: 65,536 target tokens, beyond which a step gains nothing."""
    agreeing: TransformerConfig = dataclasses.replace(BASE, vocab_size=8000)
    """Of the comparison with the CPU, which has to compute it too."""
    agreeing_rows: int = 8
    agreeing_length: int = 64
    attention_tokens: int = 16_384
    """rows · length of attention alone."""
    attention_lengths: tuple[int, ...] = (512, 2048, 8192)
    heads: int = 16
    features: int = 64
    decoding: TransformerConfig = BASE
    sources: tuple[int, ...] = (32, 256)
    source_length: int = 32
    target_length: int = 64
    updates: int = 80 * 512
    """Rows that the canaries add into tables of few rows."""
    segments: int = 12_123
    """Of the canary of jax 39959, and its batch."""
    segment_batch: int = 1024


FULL = Sizes()

_MODEL = TransformerConfig(
    vocab_size=40, d_model=32, d_ff=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
)
TINY = Sizes(
    product=64, copied=2**16, least_runs=2, models=(("BASE", _MODEL),), length=8, most_rows=4,
    agreeing=_MODEL, agreeing_rows=4, agreeing_length=8, attention_tokens=32,
    attention_lengths=(8, 16), heads=2, features=8, decoding=_MODEL, sources=(2,), source_length=4,
    target_length=6, updates=64, segments=16, segment_batch=8,
)  # fmt: skip
