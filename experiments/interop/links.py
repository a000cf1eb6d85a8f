"""Maps our arrays to those of another library by a table of names, in both directions.

Our arrays have flat names (`encoder_0/attention/w_q`). Conversions only move numbers and compute
none, so that export and import together are the identity, bit for bit.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.interop.files import BridgeError, Tensors, named_few
from tfm.config import TransformerConfig
from tfm.kernels.quantization import Quantized
from tfm.positions import sinusoidal_positions
from tfm.training import param_shapes

Shapes = dict[str, tuple[int, ...]]


class Link(NamedTuple):
    """One of our arrays, and its place among theirs."""

    ours: str
    theirs: str
    form: Literal["same", "transposed", "row"] = "same"
    """row: our [V] is their [1, V]."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the i-th of n equal parts of their rows."""

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        shape = {"same": ours, "transposed": ours[::-1], "row": (1, *ours)}[self.form]
        return (shape[0] * self.part[1], *shape[1:])

    def from_theirs(self, array: np.ndarray) -> np.ndarray:
        i, n = self.part
        rows = len(array) // n
        array = array[i * rows : (i + 1) * rows]
        return {"same": array, "transposed": array.T, "row": array.reshape(-1)}[self.form]

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Their whole array; for links without `part` only."""
        return {"same": array, "transposed": array.T, "row": array.reshape(1, -1)}[self.form]


def flat(params: Any) -> Tensors:
    """A tree of parameters as arrays by flat name; BridgeError where some are in 8 bits."""
    named = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    if any(isinstance(array, Quantized) for array in named.values()):
        raise BridgeError("a model in 8 bits cannot be written: load it without int8")
    return {name: np.asarray(array) for name, array in named.items()}


def tree(arrays: Tensors) -> Any:
    """The inverse of `flat`."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def shapes_of(config: TransformerConfig) -> Shapes:
    """The shape of each parameter of a model; nothing is computed."""
    shapes = traverse_util.flatten_dict(param_shapes(config), sep="/")
    return {name: x.shape for name, x in shapes.items()}


def take(path: Path, tensors: Tensors, links: Iterable[Link], shapes: Shapes) -> Tensors:
    """Converts their arrays to ours, in f32.

    Raises BridgeError naming the file, and the tensors that are missing, unknown, of another shape,
    or not finite.
    """
    links = list(links)
    wanted = {link.theirs: link.their_shape(shapes[link.ours]) for link in links}
    missing = [f"{n} {list(s)}" for n, s in wanted.items() if n not in tensors]
    unknown = [f"{n} {list(tensors[n].shape)}" for n in tensors if n not in wanted]
    wrong = [
        f"{n} {list(tensors[n].shape)}, not {list(s)}"
        for n, s in wanted.items()
        if n in tensors and tensors[n].shape != s
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)):
        if names:
            raise BridgeError(f"{path}: tensors that are {what}: {named_few(names)}")
    broken = [n for n in wanted if not np.isfinite(tensors[n].astype(np.float32)).all()]
    if broken:
        raise BridgeError(f"{path}: tensors with numbers that are not finite: {named_few(broken)}")
    taken = {n.ours: n.from_theirs(tensors[n.theirs]).astype(np.float32) for n in links}
    if left := sorted(shapes.keys() - taken.keys()):
        raise BridgeError(f"{path}: nothing in it is {named_few(left)}")
    return taken


def give(arrays: Tensors, links: Iterable[Link]) -> Tensors:
    """Converts our arrays to theirs; all links must be to whole arrays."""
    return {n.theirs: np.ascontiguousarray(n.to_theirs(arrays[n.ours])) for n in links}


def pad_first(size: int, pad: int) -> np.ndarray:
    """Our id -> theirs, with padding as our id 0 and the others in their order.

    Where padding is their last of V ids, as in Marian, this is theirs = (ours − 1) mod V.
    """
    return np.concatenate([[pad], np.delete(np.arange(size), pad)])


def reorder_ids(arrays: Tensors, target: np.ndarray, source: np.ndarray) -> Tensors:
    """Renumbers the symbols: row i of a table becomes the old row order[i]."""
    axes = {"embedding": (target, 0), "source_embedding": (source, 0), "output": (target, 1),
            "output_bias": (target, 0)}  # fmt: skip
    return {n: np.take(a, *axes[n]) if n in axes else a for n, a in arrays.items()}


def halves_from_interleaved(d_model: int) -> np.ndarray:
    """The order of features that maps sin, cos, sin, cos … to all sines, then all cosines."""
    return np.concatenate([np.arange(0, d_model, 2), np.arange(1, d_model, 2)])


def reorder_features(arrays: Tensors, order: np.ndarray) -> Tensors:
    """The same model with the d_model features in another order.

    The rows or columns of every array on that axis are permuted; nothing is computed.
    """
    return {name: _reorder(name, array, order) for name, array in arrays.items()}


def _reorder(name: str, array: np.ndarray, order: np.ndarray) -> np.ndarray:
    part, leaf = name.rpartition("/")[::2]
    if leaf in ("w_q", "w_k", "w_v", "w1", "output") or part.endswith("norm"):
        return array[order]  # their first axis is D
    if leaf in ("w_o", "b_o", "w2", "b2") or leaf.endswith(("embedding", "positions")):
        return array[..., order]  # their last axis is D
    return array  # b_q, b_k, b_v, b1, output_bias: no such axis


def layer_parts(side: str) -> tuple[str, ...]:
    """The sub-layers of an 'encoder' or 'decoder' layer, in order."""
    if side == "encoder":
        return "attention", "feed_forward"
    return "self_attention", "cross_attention", "feed_forward"


def sinusoids(positions: int, d_model: int, layout: str) -> np.ndarray:
    """The first rows of the table of positions [n, D] of a layout."""
    return np.asarray(sinusoidal_positions(positions, d_model, layout))
