"""What a step holds besides its arguments: activations that the backward pass takes up, gradients.

The letters are those of `tfm`: R rows on a device, S and T positions, n = R·S or R·T of them, D, F
and V features, H heads, t = mesh.tensor. A number is 4 bytes.
"""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.plan.work import WORD, Parameter, Work, parameter_bytes, parameters


class Habits(NamedTuple):
    """How a compiler holds what could be held in more than one way."""

    platform: str
    weights: int
    """Copies of softmax(QKᵀ/√d_k) that are kept, where it is kept at all."""
    draw: int
    """Bytes that are kept of each element that is dropped out."""
    copies: bool
    """Whether arguments that a step overwrites are copied first."""
    whole: bool
    """Whether gradients wait for their sum over `fsdp`, of which a device keeps its own part."""


# As measured. XLA for the CPU keeps exp(z − max) beside the weights made of it, and both words of
# each random draw in the place of the mask. Where a step writes over an argument that another part
# of it still reads, it copies that first. It puts many small sums into one all-reduce, which waits
# for all of them.
CPU = Habits("cpu", weights=2, draw=2, copies=True, whole=True)
# Not measured: what the derivatives need, and no more.
GPU, TPU = (Habits(name, weights=1, draw=1, copies=False, whole=False) for name in ("cuda", "tpu"))


class Stage(NamedTuple):
    """A part of the model, in bytes on one device."""

    name: str
    enters: int
    """What goes into it and has to stay, whatever is computed anew."""
    kept: int
    """What it keeps for the backward pass."""
    gathered: int
    """Its parameters as products have them, where they are not in that form already."""
    gradients: int
    """The gradients of its parameters."""


def _attention(work: Work, habits: Habits, length: int, keys: int) -> int:
    """Bytes of what lies between the projections of one attention: weights, and their sums."""
    c, rows = work.model, work.rows_at_once
    heads = rows * c.num_heads // work.tensor
    kept = WORD * heads * length  # Σ exp, or its logarithm
    if work.keeps_weights(length, keys, habits.platform):
        kept += WORD * habits.weights * heads * length * keys
    if c.attention_dropout_rate:
        kept += (WORD + habits.draw) * heads * length * keys
    return kept


def _sublayer(work: Work, habits: Habits, n: int) -> int:
    """Bytes of x + Dropout(Sublayer(x)), of its normalisation, and of three statistics a row."""
    d = work.model.d_model
    draws = habits.draw * n * d if work.model.dropout_rate else 0
    return WORD * n * (2 * d + 3) + draws


def _feed_forward(work: Work, habits: Habits, n: int) -> int:
    """Bytes of the hidden features before and after the activation, and of their dropout."""
    hidden = n * work.model.d_ff // work.tensor
    draws = habits.draw if work.model.activation_dropout_rate else 0
    return (2 * WORD + draws) * hidden


def encoder_layer(work: Work, habits: Habits) -> int:
    """4(2·2 n(D + 1.5) + 4 nD/t + 2 nF/t) + draws 2 nD + weights R·H/t·S²; Q, K, V and the merged
    heads are the 4."""
    n = work.rows_at_once * work.source
    projected = WORD * 4 * n * work.model.d_model // work.tensor
    return (
        2 * _sublayer(work, habits, n)
        + projected
        + _attention(work, habits, work.source, work.source)
        + _feed_forward(work, habits, n)
    )


def decoder_layer(work: Work, habits: Habits) -> int:
    """The same with three sub-layers: the cross-attention has Q and the heads of the target's
    length, K and V of the source's."""
    d, t = work.model.d_model, work.tensor
    source, n = (work.rows_at_once * length for length in (work.source, work.target))
    projected = WORD * (4 * n + 2 * n + 2 * source) * d // t
    return (
        3 * _sublayer(work, habits, n)
        + projected
        + _attention(work, habits, work.target, work.target)
        + _attention(work, habits, work.target, work.source)
        + _feed_forward(work, habits, n)
    )


def logits_bytes(work: Work) -> int:
    """4·n·V/t: the logits of a device's target positions."""
    return WORD * work.rows_at_once * work.target * work.vocabulary // work.tensor


def loss_bytes(work: Work) -> int:
    """The logits' gradients as they are summed: of exp, of the label's own, and of those beyond the
    vocabulary, where it is padded."""
    return (3 if work.vocabulary > work.model.vocab_size else 2) * logits_bytes(work)


def _gathered(work: Work, found: Iterable[Parameter]) -> int:
    """Bytes of the parameters in the form that products take, which are held until the backward.

    Over `fsdp` all of them; without it W^Q, W^K and W^V, which are laid side by side.
    """
    if work.mesh.fsdp == 1:
        found = [p for p in found if p.name in ("w_q", "w_k", "w_v")]
    return WORD * sum(p.elements(work.mesh, gathered=True) for p in found if p.gathered)


def stages(work: Work, habits: Habits) -> list[Stage]:
    """The model's parts in the order of the forward pass."""
    c, d, mesh = work.model, work.model.d_model, work.mesh
    named = {p.name: p for p in parameters(c)}
    found: list[Stage] = []

    def size(chosen: Iterable[Parameter], gathered: bool = habits.whole) -> int:
        return WORD * sum(p.elements(mesh, gathered=gathered) for p in chosen)

    for side, length, layers, kept, table in (
        ("encoder", work.source, c.num_encoder_layers, encoder_layer, "source_embedding"),
        ("decoder", work.target, c.num_decoder_layers, decoder_layer, "embedding"),
    ):
        x = WORD * work.rows_at_once * length * d
        draws = habits.draw * x // WORD if c.dropout_rate else 0
        # Each lookup has a gradient as large as the table, of which fsdp takes parts afterwards.
        looked_up = size([named.get(table, named["embedding"])], gathered=True)
        # A table that makes the logits too is held until they are done with.
        held = table in named and not (c.tied_output and table == "embedding")
        own = [named[table]] if held else []
        found.append(
            Stage(f"{side} embedding", x, x + draws, _gathered(work, own), looked_up)
        )  # fmt: skip
        weights = parameters(c, f"{side}_0")
        stage = Stage(side, x, kept(work, habits), _gathered(work, weights), size(weights))
        found += [stage] * layers
        if c.has_final_norm:
            found.append(Stage(f"{side} norm", x, 2 * x, 0, 2 * WORD * d))
    rest = [named["embedding" if c.tied_output else "output"]]
    return [*found, Stage("loss", 0, loss_bytes(work), _gathered(work, rest), size(rest))]


def activation_bytes(work: Work, habits: Habits) -> int:
    """Bytes of all that the forward pass keeps, logits apart."""
    anew = work.model.rematerialize == "layers"
    return sum(
        s.enters if anew and s.name in ("encoder", "decoder") else s.kept
        for s in stages(work, habits)[:-1]
    )  # fmt: skip


def temporary_bytes(work: Work, habits: Habits) -> int:
    """The most that a step holds at once besides its arguments, on one device.

    The backward pass goes through the stages from the last to the first: what it has passed has
    gradients in the place of activations. The largest sum on the way is what is needed:

        maxᵢ (Σ_{j<i} held by j + kept by i + Σ_{j>i} gradients of j)

    where a layer that is computed anew holds what goes into it, and any other all that it keeps.
    """
    model = stages(work, habits)
    anew = work.model.rematerialize == "layers"
    most = before = 0
    held = []
    for stage in model:
        layer = anew and stage.name in ("encoder", "decoder")
        held.append(stage.enters if layer else stage.kept + stage.gathered)
    for i, stage in enumerate(model):
        after = sum(s.gradients for s in model[i + 1 :])
        most = max(most, before + stage.kept + stage.gathered + after)
        before += held[i]
    most = max(most, sum(s.gradients for s in model))
    if work.accumulation > 1:
        most += parameter_bytes(work)  # the sum of the micro-batches' gradients so far
    return most + (copied_bytes(work) if habits.copies else 0)


def copied_bytes(work: Work) -> int:
    """Bytes that XLA for the CPU copies: both moments; over a mesh the target's table twice.

    Some of the activations then lie where the moments were, which is not counted: the sum is too
    large, by up to a quarter, where a device has few rows.
    """
    table = next(p for p in parameters(work.model) if p.name == "embedding")
    tables = 2 * WORD * table.elements(work.mesh, gathered=True) if work.devices > 1 else 0
    return 2 * parameter_bytes(work) + tables
