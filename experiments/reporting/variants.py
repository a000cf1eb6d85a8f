"""The variants command: the differences between well-known Transformers."""

import dataclasses
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tfm.variants import VARIANTS, Variant

Name = Literal["paper", "tensor2tensor", "fairseq", "flax-wmt", "annotated", "marian"]

MEANS = {
    "activation": "FFN(x) = activation(x W₁ + b₁) W₂ + b₂",
    "attention_dropout_rate": "dropout of softmax(QKᵀ/√d_k)",
    "activation_dropout_rate": "dropout of activation(x W₁ + b₁)",
    "norm_placement": "post: LayerNorm(x + Sublayer(x)); pre: x + Sublayer(LayerNorm(x))",
    "layer_norm_epsilon": "ε of (x − μ)/√(σ² + ε)",
    "projection_bias": "biases of W^Q, W^K, W^V, W^O",
    "output_bias": "b of softmax(yW + b)",
    "source_vocab_size": "a vocabulary and a matrix of the source's own; None: shared",
    "tied_output": "W is the target's embedding matrix, transposed",
    "sinusoid_layout": "interleaved: sin, cos, sin, …; halves: sin, …, cos, …; "
    "tensor2tensor: halves, i/10000^{k/(d_model/2 − 1)}",
    "first_position": "the number of the first position",
    "smoothed_over": "all: ε/V each; others: ε/(V−1); others_but_padding: ε/(V−2)",
    "alpha": "exponent α of the length penalty lp(n)",
    "penalty": "paper: lp(n) = ((5 + n)/6)^α; power: n^α",
    "apart": "what these settings cannot say",
}
"""A description of each setting that differs between variants."""


@dataclasses.dataclass(frozen=True)
class VariantsConfig:
    """Say what differs between two of the models that bear the paper's name."""

    one: Name = "paper"
    """The first of the two."""
    other: Name | None = None
    """The second. None: all of them, each beside the first."""


def settings(variant: Variant) -> dict[str, Any]:
    """All settings by name, those of the model included."""
    flat = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    model = flat.pop("model")
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model)} | flat


def differing(variants: list[Variant]) -> dict[str, list[Any]]:
    """The settings that differ: name -> the value of each variant."""
    rows = [settings(variant) for variant in variants]
    values = {name: [row[name] for row in rows] for name in rows[0] if name != "read"}
    return {
        name: per_variant
        for name, per_variant in values.items()
        if any(v != per_variant[0] for v in per_variant)
    }


def explained(names: list[str]) -> Group:
    """For each setting that differs: its description, and the variants with each value."""
    lines: list[RenderableType] = []
    for name, values in differing([VARIANTS[n] for n in names]).items():
        rows = Table.grid(padding=(0, 2))
        for value in dict.fromkeys(values):
            having = [n for n, own in zip(names, values, strict=True) if own == value]
            rows.add_row(Text(", ".join(having)), Text(str(value) if value != "" else "–"))
        lines += [Text(name, "bold"), _indented(Text(MEANS[name], "dim")), _indented(rows), ""]
    return Group(*lines)


def _indented(shown: RenderableType) -> Padding:
    return Padding(shown, (0, 0, 0, 2), expand=False)


def run(config: VariantsConfig) -> None:
    """Prints the settings that differ, and the source of each variant."""
    others = [config.other] if config.other else [n for n in VARIANTS if n != config.one]
    names = [config.one, *others]
    console = Console(highlight=False)
    console.print(explained(names))
    console.print(Text("read in", "bold"))
    for name in names:
        console.print(_indented(Text(f"{name}: {VARIANTS[name].read}")))
