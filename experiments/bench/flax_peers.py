"""Attention as Flax and JAX bring it; each in its own layout, [rows, length, heads, features]."""

from pathlib import Path

import flax.linen
import flax.nnx
import jax

from experiments.bench.contenders import Contender
from experiments.bench.ours import attention_contender
from experiments.bench.workloads import Attention

_ATTEND = {
    "flax linen": flax.linen.dot_product_attention,
    "flax nnx": flax.nnx.dot_product_attention,
    "jax.nn": jax.nn.dot_product_attention,
}


def build(name: str, work: Attention, weights: Path) -> Contender:
    return attention_contender(work, _ATTEND[name], layout="BLHD")
