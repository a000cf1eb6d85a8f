"""The planned step, its parameters and batch, and their bytes."""

import dataclasses
import functools
import math
from collections import Counter
from typing import NamedTuple

import jax

from tfm.config import TransformerConfig
from tfm.kernels.attention import CHUNK
from tfm.parallel.mesh import MeshConfig, check_divides
from tfm.parallel.sharding import PARAM_LOGICAL_AXES
from tfm.training import param_shapes

WORD = 4
"""Bytes of a parameter, a token and an activation: all have 32 bits.

This holds for `compute_dtype=bfloat16` too, where operands are rounded but products are accumulated
in f32. A CPU stores them so; a GPU or TPU stores the sums between layers in 16 bits."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One optimizer step of `rows` packed rows, over a mesh whose `data` is decided.

    Raises:
      ValueError: a mesh that does not divide the model or a micro-batch's rows, accumulation that
        does not divide the rows, or float64.
    """

    model: TransformerConfig
    mesh: MeshConfig
    rows: int
    source: int
    """Source positions of a row."""
    target: int
    """Target positions of a row."""
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "source", "target", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.model.compute_dtype == "float64":
            raise ValueError("compute_dtype=float64 is for checks: there is no plan of it")
        if self.rows % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide rows={self.rows}")
        check_divides(self.model, self.mesh, self.rows, self.accumulation)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.sizes.values())

    @property
    def tensor(self) -> int:
        return self.mesh.tensor

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.rows // self.accumulation // self.mesh.parts("batch")

    @property
    def vocabulary(self) -> int:
        """Rows of the target's table."""
        return self.model.padded(self.model.vocab_size)

    @property
    def target_tokens(self) -> int:
        """Target positions of a step, padding included."""
        return self.rows * self.target

    def keeps_weights(self, length: int, keys: int, platform: str) -> bool:
        """Whether `kernels.attention` stores all of softmax(QKᵀ/√d_k) for these sizes.

        platform: 'cpu', 'cuda' or 'tpu'.
        """
        c = self.model
        if c.implementation != "auto" or c.attention_dropout_rate:
            return c.implementation == "formula" or c.attention_dropout_rate > 0
        if platform == "cpu":
            whole = self.rows // self.accumulation * c.num_heads * length * keys
            return whole <= CHUNK
        d_k = c.d_model // c.num_heads
        fits = length % 2 == keys % 2 == 0 and d_k <= 128 and d_k % 8 == 0
        return not (platform == "cuda" and c.compute_dtype == "bfloat16" and fits)


class Parameter(NamedTuple):
    """The parameters that share a name and shape."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def meanings(self) -> tuple[str | None, ...]:
        return PARAM_LOGICAL_AXES.get(self.name, (None,) * len(self.shape))

    @property
    def gathered(self) -> bool:
        """Whether `fsdp` divides it, so that it is gathered where it is used."""
        return "embed" in self.meanings

    def elements(self, mesh: MeshConfig, *, gathered: bool = False) -> int:
        """Their elements on one device; `gathered`: in the form for products."""
        used = [None if gathered and m == "embed" else m for m in self.meanings]
        one = math.prod(n // mesh.parts(m) for n, m in zip(self.shape, used, strict=True))
        return one * self.count


_shapes = functools.cache(param_shapes)


@functools.cache
def parameters(config: TransformerConfig, part: str = "") -> tuple[Parameter, ...]:
    """The parameters of the model, or of one part of it: `encoder_0`, `decoder_0`."""
    tree = _shapes(dataclasses.replace(config, scan_layers=False))  # which only stacks layers
    leaves = jax.tree.leaves_with_path(tree[part] if part else tree)
    counts = Counter((path[-1].key, leaf.shape) for path, leaf in leaves)
    return tuple(Parameter(name, shape, count) for (name, shape), count in counts.items())


COUNTERS = (4 + 4 + 4) + 8
"""Bytes of the step's number, Adam's and the schedule's (int32 each), and of the key (2 uint32)."""


def parameter_bytes(work: Work) -> int:
    """Bytes of the parameters on one device."""
    return WORD * sum(p.elements(work.mesh) for p in parameters(work.model))


def batch_bytes(work: Work) -> int:
    """Bytes of a batch on one device: tokens, segment ids and positions of both sides."""
    rows = work.rows // work.mesh.parts("batch")
    return WORD * 3 * rows * (work.source + work.target)


def argument_bytes(work: Work) -> int:
    """Bytes of a step's arguments on one device: parameters, two moments, counters, batch."""
    return 3 * parameter_bytes(work) + COUNTERS + batch_bytes(work)
