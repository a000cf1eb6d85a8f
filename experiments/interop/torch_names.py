"""The names of tensors in a state dict: in `torch.nn.Transformer`, and around it."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.interop.files import BridgeError, Tensors, named_few

Layout = Literal["interleaved", "halves", "tensor2tensor"]


@dataclasses.dataclass(frozen=True)
class TorchOptions:
    """What a state dict does not say."""

    num_heads: int = 8
    """Attention heads (nhead)."""
    activation: Literal["relu", "gelu"] = "relu"
    """Of the feed-forward networks."""
    norm_first: bool = False
    """Pre-norm layers."""
    layer_norm_epsilon: float = 1e-5
    """ε of the layer normalisations; torch's default."""
    scale_embeddings: bool = True
    """Whether embeddings are multiplied by √d_model."""
    sinusoid_layout: Layout | None = None
    """Layout of sinusoids that the file has no table of. None: it must have a table."""
    pad: int = 0
    """Id of padding in the file (becomes 0; the ids below it go up by one)."""
    bos: int = 1
    """Id that starts the decoder."""
    eos: int = 2
    """Id of the end symbol."""
    unk: int = 3
    """Id of unknown symbols."""
    source_pad: int | None = None
    """Of a source vocabulary with other ids; None: as in the target's. Likewise the next two."""
    source_eos: int | None = None
    """Id of the end symbol in the source vocabulary."""
    source_unk: int | None = None
    """Id of unknown symbols in the source vocabulary."""
    source_embedding: str | None = None
    """Name of the source's embedding matrix. None: found by the usual names; so the next ones."""
    target_embedding: str | None = None
    """Name of the target's embedding matrix."""
    output: str | None = None
    """Name of the output layer's matrix (its bias has the same name with `bias`)."""
    source_positions: str | None = None
    """Name of the source's (or the shared) table of positions."""
    target_positions: str | None = None
    """Name of the target's table of positions."""


class Dialect(NamedTuple):
    """The names of a layer's parts in one code base."""

    attentions: dict[str, str]
    projections: dict[str, str]  # q, k, v, o; q alone where the three are packed
    norms: dict[str, str]
    feed_forward: tuple[str, str]


NN = Dialect(
    {"attention": "self_attn", "self_attention": "self_attn", "cross_attention": "multihead_attn"},
    {"qkv": "in_proj_", "o": "out_proj."},
    {"attention": "norm1", "self_attention": "norm1", "cross_attention": "norm2",
     "encoder": "norm2", "decoder": "norm3"},
    ("linear1", "linear2"),
)  # fmt: skip
"""torch.nn.Transformer, whose attention packs the matrices of queries, keys and values."""
TUTORIAL = Dialect(
    {"attention": "self_attention", "self_attention": "self_attention",
     "cross_attention": "encoder_attention"},
    {letter: f"fc_{letter}." for letter in "qkvo"},
    {"attention": "self_attn_layer_norm", "self_attention": "self_attn_layer_norm",
     "cross_attention": "enc_attn_layer_norm", "encoder": "ff_layer_norm",
     "decoder": "ff_layer_norm"},
    ("positionwise_feedforward.fc_1", "positionwise_feedforward.fc_2"),
)  # fmt: skip
"""The names of a sequence-to-sequence tutorial that many small models follow."""


def without_wrappers(tensors: Tensors) -> Tensors:
    """Removes the prefixes that data parallelism and compilation add to every name."""
    for wrapper in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): array for name, array in tensors.items()}
    return tensors


class Body(NamedTuple):
    """Encoder and decoder of a state dict: names, number of layers, options."""

    dialect: Dialect
    prefix: str
    layers: dict[str, int]  # of 'encoder' and 'decoder'
    d_model: int
    biases: bool  # in the attention
    final_norms: bool

    def holds(self, name: str) -> bool:
        """Whether a name belongs to encoder or decoder."""
        inside = rf"{re.escape(self.prefix)}(encoder|decoder)\.(layers\.\d|norm\.(weight|bias)$)"
        return re.match(inside, name) is not None


def find_body(path: Path, tensors: Tensors) -> Body:
    """Finds encoder and decoder; BridgeError where they are missing or incomplete."""
    for dialect in (NN, TUTORIAL):
        first, q = dialect.attentions["attention"], next(iter(dialect.projections.values()))
        ending = f"encoder.layers.0.{first}.{q}weight"
        names = [name for name in tensors if name.endswith(ending)]
        if len(names) > 1:
            raise BridgeError(f"{path}: several encoders: {named_few(names)}")
        if names:
            break
    else:
        raise BridgeError(
            f"{path}: no encoder.layers.0.self_attn.in_proj_weight in it, so no state dict of a "
            f"torch.nn.Transformer; it has {named_few(sorted(tensors)) or 'nothing'}"
        )
    prefix = names[0].removesuffix(ending)
    layers = {}
    for side in ("encoder", "decoder"):
        pattern = re.compile(rf"{re.escape(prefix)}{side}\.layers\.(\d+)\.")
        numbers = {int(m[1]) for m in map(pattern.match, tensors) if m}
        layers[side] = len(numbers)
        if not numbers or numbers != set(range(len(numbers))):
            raise BridgeError(f"{path}: {prefix}{side}.layers has the numbers {sorted(numbers)}")
    norms = [f"{prefix}{side}.norm.weight" in tensors for side in layers]
    if norms[0] != norms[1]:
        only = "encoder" if norms[0] else "decoder"
        raise BridgeError(f"{path}: a final norm in the {only} alone is not supported")
    biases = names[0].removesuffix("weight") + "bias" in tensors
    return Body(dialect, prefix, layers, tensors[names[0]].shape[-1], biases, norms[0])


def with_biases(tensors: Tensors, body: Body) -> Tensors:
    """Adds zeros for the biases that `bias=False` leaves out and our model always has."""
    attentions = tuple(f".{name}." for name in body.dialect.attentions.values())
    made = {}
    for name, array in tensors.items():
        attends = any(part in name for part in attentions)
        bias = name.removesuffix("weight") + "bias"
        if body.holds(name) and name.endswith(".weight") and not attends and bias not in tensors:
            made[bias] = np.zeros(array.shape[0], np.float32)
    return tensors | made


class Around(NamedTuple):
    """The names of the tensors outside the layers, and the position tables [n, D]."""

    source: str
    target: str
    output: str | None  # None: tied
    output_bias: str | None
    tables: tuple[str, ...]  # the position tables of source and target, or none
    positions: Tensors
    again: tuple[str, ...]  # further names of the same matrices


_POSITIONS = re.compile(r"pos|(^|[._])pe($|[._])")
SIDES = {
    "source": re.compile(r"(^|[._])(src|source|enc|encoder|input)([._]|$)|^(src|enc)"),
    "target": re.compile(r"(^|[._])(tgt|trg|target|dec|decoder)([._]|$)|^(tgt|trg|dec)"),
}


def find_around(path: Path, tensors: Tensors, body: Body, options: TorchOptions) -> Around:
    """Finds the tensors outside the layers.

    Raises BridgeError, naming the candidates and the flag that selects one, where names are
    ambiguous.
    """
    given = {f: getattr(options, f) for f in ("source_embedding", "target_embedding", "output",
                                              "source_positions", "target_positions")}  # fmt: skip
    if absent := [name for name in given.values() if name and name not in tensors]:
        raise BridgeError(f"{path}: {named_few(absent)}: no such tensor")
    left = {
        name: array.shape for name, array in tensors.items()
        if not body.holds(name) and name not in given.values()
    }  # fmt: skip
    placed = {n: s for n, s in left.items() if _POSITIONS.search(n) and s[-1:] == (body.d_model,)}
    matrices = {
        n: s for n, s in left.items() if n not in placed and len(s) == 2 and s[1] == body.d_model
    }
    embeddings = {n: s for n, s in matrices.items() if "emb" in n.lower()}
    outputs = {n: s for n, s in matrices.items() if n not in embeddings}
    source, target = (
        given[f"{side}_embedding"] or _pick(path, embeddings, f"{side} embedding", side)
        for side in SIDES
    )
    output = given["output"]
    if output is None and outputs:
        output = _pick(path, outputs, "output")
    tables = ()
    if placed or given["source_positions"]:
        tables = tuple(
            given[f"{side}_positions"] or given["source_positions"]
            or _pick(path, placed, f"{side} positions", side)
            for side in SIDES
        )  # fmt: skip
    positions = {name: _table(path, name, tensors[name], body.d_model) for name in tables}
    bias = output and output.removesuffix("weight") + "bias"
    around = Around(
        source, target, output, bias if bias in tensors else None, tables, positions, ()
    )
    return _merged(tensors, around, options)


def _pick(
    path: Path, candidates: dict[str, tuple[int, ...]], what: str, side: str | None = None
) -> str:
    """The only candidate, or the only one whose name belongs to that side."""
    names = list(candidates)
    if len(names) > 1 and side is not None:
        names = [name for name in names if SIDES[side].search(name)]
    if len(names) == 1:
        return names[0]
    shown = named_few([f"{name} {list(shape)}" for name, shape in candidates.items()])
    raise BridgeError(
        f"{path}: cannot tell which tensor is the {what} ({shown or 'no candidate'}): name it with "
        f"--torch.{what.replace(' ', '-')}"
    )


def _table(path: Path, name: str, array: np.ndarray, d_model: int) -> np.ndarray:
    """[1, n, D] or [n, 1, D] -> [n, D]."""
    if array.shape[-1:] != (d_model,) or sum(size > 1 for size in array.shape[:-1]) > 1:
        raise BridgeError(f"{path}: {name} {list(array.shape)} is no table of positions")
    return array.reshape(-1, d_model)


def _merged(tensors: Tensors, around: Around, options: TorchOptions) -> Around:
    """Merges the names of matrices that are shared in the model, if their values are equal."""

    def same(name: str | None) -> bool:
        there = name is not None and name != around.target
        return there and np.array_equal(tensors[name], tensors[around.target])

    own_ids = (options.source_pad, options.source_eos, options.source_unk) != (None, None, None)
    if same(around.source) and not own_ids:
        again = (*around.again, around.source)
        around = around._replace(source=around.target, again=again)
    if same(around.output):
        around = around._replace(output=None, again=(*around.again, around.output))
    return around
