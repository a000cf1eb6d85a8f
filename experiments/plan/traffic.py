"""The matrix products of a step, and the communication between its devices."""

import dataclasses
from typing import NamedTuple

from experiments.plan.flops import attention_flops, forward_flops, logits_flops
from experiments.plan.work import WORD, Work, parameters
from tfm.parallel.sharding import LOGICAL_AXIS_RULES

BATCH = LOGICAL_AXIS_RULES["batch"]
ROWS = ("scale", "bias", "b1", "b2")
"""Parameters whose gradient is a product of 8 rows, of which one is needed: see `broadcast_row`."""


class Products(NamedTuple):
    """Floating-point operations of the matrix products of a step, on all devices together."""

    forward: int
    backward: int
    recomputed: int
    rows: int

    @property
    def step(self) -> int:
        return sum(self)


def products(work: Work) -> Products:
    """The products of a step.

    Backward: two for each forward one. Recomputed: those of the layers again, with
    rematerialize=layers. Rows: the gradients of γ, β, b₁ and b₂, 2·8 per position and feature.
    """
    c = dataclasses.replace(work.model, vocab_size=work.vocabulary)
    forward = work.rows * forward_flops(c, work.source, work.target)
    logits = work.rows * logits_flops(c, work.target)
    recomputed = forward - logits if c.rematerialize == "layers" else 0
    d, f = c.d_model, c.d_ff
    encoder, decoder = (16 * (2 * n * d + f + d) for n in (2, 3))
    positions = work.source * c.num_encoder_layers * encoder
    positions += work.target * c.num_decoder_layers * decoder
    if c.has_final_norm:
        positions += (work.source + work.target) * 16 * 2 * d
    return Products(forward, 2 * forward, recomputed, work.rows * positions)


def attention_share(work: Work) -> float:
    """The share of QKᵀ and the weighted sums of V in the products of the forward pass."""
    c = dataclasses.replace(work.model, vocab_size=work.vocabulary)
    return attention_flops(c, work.source, work.target) / forward_flops(
        c, work.source, work.target
    )  # fmt: skip


class Collective(NamedTuple):
    """Arrays that devices along some axes of the mesh gather or sum."""

    kind: str
    """As XLA names it: all-reduce or all-gather."""
    axes: tuple[str, ...]
    what: str
    formula: str
    bytes: int
    """The bytes of the results on one device, in a step."""
    overlaps: bool = False
    """Whether it can overlap with the backward pass."""

    def sent(self, work: Work) -> float:
        """Bytes that a device sends in a ring: (p−1)/p of a gathered array, 2(p−1)/p of a sum."""
        parts = 1
        for axis in self.axes:
            parts *= work.mesh.sizes[axis]
        return (2 if self.kind == "all-reduce" else 1) * (parts - 1) / parts * self.bytes


def _of_gradients(work: Work) -> list[Collective]:
    """The sums of gradients over the shards of the batch."""
    mesh, c = work.mesh, work.model
    params = parameters(c)
    times = WORD * work.accumulation
    tables = ("embedding", "source_embedding")
    matrices = [p for p in params if p.gathered and p.name not in tables]
    if c.tied_output:
        matrices += [p for p in params if p.name == "embedding"]
    whole = times * sum(p.elements(mesh, gathered=True) for p in matrices)
    divided = times * sum(p.elements(mesh) for p in matrices)
    # The tables of target and source, or the shared one twice: their sums are not combined.
    own = c.source_vocab_size is not None
    looked_up = [p for p in params if p.name in tables]
    lookups = times * sum(p.elements(mesh, gathered=True) for p in looked_up) * (1 if own else 2)
    rows = times * 8 * sum(p.elements(mesh) for p in params if p.name in ROWS)
    biases = times * sum(
        p.elements(mesh) for p in params if not p.gathered and p.name not in ROWS
    )  # fmt: skip
    return [
        Collective("all-reduce", ("fsdp",), "gradients of matrices", "4·M/t", whole, True),
        Collective("all-reduce", ("data",), "gradients of matrices", "4·M/(f·t)", divided, True),
        Collective("all-reduce", BATCH, "gradients of lookups", "4·2·V·D/t", lookups, True),
        Collective("all-reduce", BATCH, "gradients of γ, β, b₁, b₂", "4·8·rows", rows, True),
        Collective("all-reduce", BATCH, "gradients of other biases", "4·biases/t", biases, True),
    ]


def _of_activations(work: Work) -> list[Collective]:
    """The sums over the shards of heads, hidden features and vocabulary."""
    c, d = work.model, work.model.d_model
    rows = work.rows // work.mesh.parts("batch")
    source, target = rows * work.source, rows * work.target
    passes = 2 if c.rematerialize == "layers" else 1
    n_e, n_d = c.num_encoder_layers, c.num_decoder_layers
    forward = passes * (2 * n_e * source + 3 * n_d * target)
    # Into Q, K, V and W₁ of each sub-layer; cross-attention has K and V of the source.
    backward = 2 * n_e * source + n_d * (3 * target + source)
    rest = source + target + target
    formula = "4·D·(2·N_e·n_s + 3·N_d·n_t)"
    again = ", twice" if passes == 2 else ""
    return [
        Collective("all-reduce", ("tensor",), "sub-layers, forward", formula + again,
                   WORD * d * forward),
        Collective("all-reduce", ("tensor",), "sub-layers, backward",
                   "4·D·(2·N_e·n_s + N_d·(3·n_t + n_s))", WORD * d * backward),
        Collective("all-reduce", ("tensor",), "lookups; into the logits", "4·D·(n_s + 2·n_t)",
                   WORD * d * rest),
        Collective("all-reduce", ("tensor",), "max, Σ exp, Σ, label's logit", "4·4·n_t",
                   WORD * 4 * target),
    ]  # fmt: skip


def collectives(work: Work) -> list[Collective]:
    """The collectives of a step, without scalars and without axes of one device.

    On a GPU or TPU XLA may use a reduce-scatter for the sums over `fsdp`, which sends half the
    bytes.
    """
    mesh = work.mesh
    passes = 2 if work.model.rematerialize == "layers" else 1
    layers = [p for p in parameters(work.model) if p.gathered]
    tables = [p for p in layers if not p.name.startswith("w")]
    gathered = sum(p.elements(mesh, gathered=True) for p in tables)
    gathered += passes * sum(p.elements(mesh, gathered=True) for p in layers if p not in tables)
    planned = [
        Collective("all-gather", ("fsdp",), "parameters at use",
                   "4·M/t" + (", layers twice" if passes == 2 else ""),
                   WORD * work.accumulation * gathered, True),
        *_of_gradients(work),
        *_of_activations(work),
    ]  # fmt: skip
    kept = []
    for c in planned:
        axes = tuple(axis for axis in c.axes if mesh.sizes[axis] > 1)
        if axes and c.bytes:
            kept.append(c._replace(axes=axes))
    return kept
