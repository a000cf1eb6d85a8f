"""The memory of a step besides its arguments: activations for the backward pass, and gradients.

The letters are those of `tfm`: R rows on a device, S and T positions, n = R·S or R·T of them, D, F
and V features, H heads, t = mesh.tensor. A number is 4 bytes.
"""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.plan.work import WORD, Parameter, Work, parameter_bytes, parameters


class Habits(NamedTuple):
    """The choices of a compiler that affect memory."""

    platform: str
    weights: int
    """Stored copies of softmax(QKᵀ/√d_k), where it is stored at all."""
    draw: int
    """Stored bytes per element of a dropout mask."""
    copies: bool
    """Whether arguments that a step overwrites are copied first."""
    whole: bool
    """Whether whole gradients are stored until their sum over `fsdp` is divided."""


# Measured. XLA for the CPU stores exp(z − max) beside the attention weights, and both words of each
# random number in the place of the dropout mask. An argument that is overwritten while another part
# of the step still reads it is copied first. Many small sums share one all-reduce, which waits for
# all of them.
CPU = Habits("cpu", weights=2, draw=2, copies=True, whole=True)
# Not measured: only what the derivatives need.
GPU, TPU = (Habits(name, weights=1, draw=1, copies=False, whole=False) for name in ("cuda", "tpu"))


class Stage(NamedTuple):
    """The bytes of a part of the model on one device."""

    name: str
    enters: int
    """Its inputs, which are stored even where it is recomputed."""
    kept: int
    """What it stores for the backward pass."""
    gathered: int
    """Its parameters in the form for products, where that is a copy."""
    gradients: int
    """The gradients of its parameters."""


def _attention(work: Work, habits: Habits, length: int, keys: int) -> int:
    """Bytes of one attention between its projections: weights, and sums over them."""
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
    """4(2·2 n(D + 1.5) + 4 nD/t + 2 nF/t) + draws 2 nD + weights R·H/t·S².

    The 4 nD/t are Q, K, V and the merged heads.
    """
    n = work.rows_at_once * work.source
    projected = WORD * 4 * n * work.model.d_model // work.tensor
    return (
        2 * _sublayer(work, habits, n)
        + projected
        + _attention(work, habits, work.source, work.source)
        + _feed_forward(work, habits, n)
    )


def decoder_layer(work: Work, habits: Habits) -> int:
    """As `encoder_layer`, with three sub-layers. In the cross-attention Q and the merged heads have
    the target's length, K and V the source's."""
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
    """Bytes of the logits' gradients: of exp, of the label's logit, and of the padding rows where
    the vocabulary is padded."""
    return (3 if work.vocabulary > work.model.vocab_size else 2) * logits_bytes(work)


def _gathered(work: Work, chosen: Iterable[Parameter]) -> int:
    """Bytes of parameters in the form for products, which are stored until the backward pass.

    With `fsdp` these are all parameters; without it W^Q, W^K and W^V, which are concatenated.
    """
    if work.mesh.fsdp == 1:
        chosen = [p for p in chosen if p.name in ("w_q", "w_k", "w_v")]
    return WORD * sum(p.elements(work.mesh, gathered=True) for p in chosen if p.gathered)


def stages(work: Work, habits: Habits) -> list[Stage]:
    """The model's parts in the order of the forward pass."""
    c, d, mesh = work.model, work.model.d_model, work.mesh
    named = {p.name: p for p in parameters(c)}
    result: list[Stage] = []

    def size(chosen: Iterable[Parameter], gathered: bool = habits.whole) -> int:
        return WORD * sum(p.elements(mesh, gathered=gathered) for p in chosen)

    for side, length, layers, kept, table in (
        ("encoder", work.source, c.num_encoder_layers, encoder_layer, "source_embedding"),
        ("decoder", work.target, c.num_decoder_layers, decoder_layer, "embedding"),
    ):
        x = WORD * work.rows_at_once * length * d
        draws = habits.draw * x // WORD if c.dropout_rate else 0
        # Each lookup has a gradient as large as the table, which fsdp divides afterwards.
        looked_up = size([named.get(table, named["embedding"])], gathered=True)
        # A table that is also the output matrix is stored until the logits are done.
        held = table in named and not (c.tied_output and table == "embedding")
        own = [named[table]] if held else []
        result.append(
            Stage(f"{side} embedding", x, x + draws, _gathered(work, own), looked_up)
        )  # fmt: skip
        weights = parameters(c, f"{side}_0")
        stage = Stage(side, x, kept(work, habits), _gathered(work, weights), size(weights))
        result += [stage] * layers
        if c.has_final_norm:
            result.append(Stage(f"{side} norm", x, 2 * x, 0, 2 * WORD * d))
    rest = [named["embedding" if c.tied_output else "output"]]
    return [*result, Stage("loss", 0, loss_bytes(work), _gathered(work, rest), size(rest))]


def activation_bytes(work: Work, habits: Habits) -> int:
    """Bytes of all that the forward pass stores, without the logits."""
    recomputes = work.model.rematerialize == "layers"
    return sum(
        s.enters if recomputes and s.name in ("encoder", "decoder") else s.kept
        for s in stages(work, habits)[:-1]
    )  # fmt: skip


def temporary_bytes(work: Work, habits: Habits) -> int:
    """The peak bytes of a step besides its arguments, on one device.

    The backward pass runs through the stages from last to first, and replaces the activations of
    each by gradients. The peak is the largest sum on the way:

        maxᵢ (Σ_{j<i} held by j + kept by i + Σ_{j>i} gradients of j)

    where a recomputed layer holds only its inputs, and any other stage all that it stores.
    """
    model = stages(work, habits)
    recomputes = work.model.rematerialize == "layers"
    most = before = 0
    held = []
    for stage in model:
        layer = recomputes and stage.name in ("encoder", "decoder")
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
    """Bytes that XLA for the CPU copies: both moments, and on a mesh the target's table twice.

    It then reuses the moments' memory for some activations, which is not counted: the sum is up to
    a quarter too large where a device has few rows.
    """
    table = next(p for p in parameters(work.model) if p.name == "embedding")
    tables = 2 * WORD * table.elements(work.mesh, gathered=True) if work.devices > 1 else 0
    return 2 * parameter_bytes(work) + tables
