"""The mesh of devices: its flags, what it can divide, and how a state and a batch lie on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tfm.config import TransformerConfig
from tfm.parallel.sharding import AXES, LOGICAL_AXIS_RULES, PARAM_LOGICAL_AXES, partition
from tfm.shapes import ArrayTree


@dataclass(frozen=True)
class MeshConfig:
    """Over how many devices what is divided; 1 each: nothing is."""

    data: int | None = None
    """Parts of the batch. None: as many as devices are left by the others."""
    fsdp: int = 1
    """Parts of the batch, of the parameters and of the moments."""
    tensor: int = 1
    """Parts of the heads, of the hidden features and of the vocabulary."""

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1")

    def over(self, devices: int) -> "MeshConfig":
        """The same with `data` decided, for so many devices.

        Raises:
          ValueError: they are too few, or cannot be shared out.
        """
        others = self.fsdp * self.tensor
        data = max(1, devices // others) if self.data is None else self.data
        needed = data * others
        told = f"data={data} × fsdp={self.fsdp} × tensor={self.tensor}"
        if needed > devices:
            raise ValueError(
                f"the mesh {told} asks for {needed} devices, but {devices} are visible"
            )
        if self.data is None and needed != devices:
            raise ValueError(
                f"fsdp={self.fsdp} × tensor={self.tensor} does not divide the {devices} devices: "
                f"name data too, to use fewer"
            )
        return MeshConfig(data, self.fsdp, self.tensor)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of the mesh."""
        return {"data": self.data or 1, "fsdp": self.fsdp, "tensor": self.tensor}

    def parts(self, meaning: str | None) -> int:
        """Into how many parts an axis of that meaning is divided."""
        return math.prod(self.sizes[axis] for axis in LOGICAL_AXIS_RULES[meaning])


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `devices` (None: all that are visible), for `jax.set_mesh`.

    Raises ValueError as `MeshConfig.over` does.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.over(len(devices)).sizes
    used = list(devices)[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used
    )


def check_divides(
    config: TransformerConfig, mesh: MeshConfig, rows: int | None = None, accumulation: int = 1
) -> None:
    """Raises ValueError where the mesh does not divide a number of the model, or the rows of a
    micro-batch.

    The message names the axes of the mesh, the field and both numbers.
    """
    numbers = {
        "heads": {"num_heads": config.num_heads},
        "hidden": {"d_ff": config.d_ff},
        "vocabulary": {"vocab_size": config.padded(config.vocab_size)},
        "embed": {"d_model": config.d_model},
        "batch": {} if rows is None else {"rows": rows},
    }
    if config.source_vocab_size is not None:
        numbers["vocabulary"]["source_vocab_size"] = config.padded(config.source_vocab_size)
    for meaning, named in numbers.items():
        parts = mesh.parts(meaning)
        axes = " × ".join(f"mesh.{axis}={mesh.sizes[axis]}" for axis in LOGICAL_AXIS_RULES[meaning])
        for name, number in named.items():
            cut = accumulation if name == "rows" else 1
            if number // cut % parts:
                of = "" if cut == 1 else f" / accumulation={cut}"
                raise ValueError(f"{axes} does not divide {name}={number}{of}")


def state_shardings(mesh: Mesh, state: ArrayTree) -> ArrayTree:
    """How each array of a training state (or of parameters alone) lies, by the name in its path."""

    def of(path: tuple[Any, ...], x: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        meanings = PARAM_LOGICAL_AXES.get(names[-1], ()) if names else ()
        return NamedSharding(mesh, partition(x.shape, meanings, mesh))

    return jax.tree_util.tree_map_with_path(of, state)


def fit_vocabulary(params: ArrayTree, config: TransformerConfig) -> ArrayTree:
    """The parameters with the rows beyond the vocabulary that `config` pads it to: cut, or 0."""

    def of(path: tuple[Any, ...], x: Any) -> Any:
        name = path[-1].key
        meanings = PARAM_LOGICAL_AXES.get(name, ())
        if "vocabulary" not in meanings:
            return x
        axis = meanings.index("vocabulary")
        size = config.vocab_size
        if name == "source_embedding":
            size = config.source_vocab_size or size
        if x.shape[axis] == config.padded(size):
            return x
        words = jnp.moveaxis(x, axis, 0)[:size]
        missing = config.padded(size) - size
        return jnp.moveaxis(jnp.pad(words, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), 0, axis)

    return jax.tree_util.tree_map_with_path(of, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the rows of a batch lie."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXIS_RULES["batch"]))
