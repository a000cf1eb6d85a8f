"""How arrays are divided over devices: one table from what an axis means to the mesh's axes.

A mesh of devices has three named axes:

    data     each device has its own rows of the batch, and a copy of what `fsdp` and `tensor` leave
    fsdp     divides the rows too, and the parameters and moments, which are gathered where used
    tensor   divides the heads, the hidden features and the vocabulary

Under `jax.set_mesh(make_mesh(...))` the model computes the same numbers in parts, and XLA
puts the communication between them; without a mesh all of this is the identity. What the parameters
are called says how they lie (`PARAM_LOGICAL_AXES`), so the modules that own them know no mesh.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

AXES = ("data", "fsdp", "tensor")

LOGICAL_AXIS_RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # d_model of a matrix, as it is stored
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    None: (),
}
"""Which axes of the mesh divide an axis of an array, by what the latter means."""

PARAM_LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocabulary", "embed"),
    "source_embedding": ("vocabulary", "embed"),
    "output": ("embed", "vocabulary"),
    "output_bias": ("vocabulary",),
    "source_positions": (None, "embed"),
    "target_positions": (None, "embed"),
    "w_q": ("embed", "heads"),
    "w_k": ("embed", "heads"),
    "w_v": ("embed", "heads"),
    "w_o": ("heads", "embed"),
    "b_q": ("heads",),
    "b_k": ("heads",),
    "b_v": ("heads",),
    "w1": ("embed", "hidden"),
    "b1": ("hidden",),
    "w2": ("hidden", "embed"),
}
"""What the axes of a parameter mean, by the last part of its path; others are not divided."""


def _mesh() -> Any:
    """The mesh that is set, or None: where there is none of ours, or a device computes alone."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(AXES) <= set(mesh.axis_names) and mesh.size > 1
    return mesh if ours and set(mesh.axis_types) == {AxisType.Auto} else None


def is_divided() -> bool:
    """Whether a mesh of several devices is set."""
    return _mesh() is not None


def axes_of(meaning: str | None, size: int, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes that divide an axis of `size`: none where they do not divide it evenly."""
    axes = tuple(axis for axis in LOGICAL_AXIS_RULES[meaning] if sizes[axis] > 1)
    return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()


def partition(shape: Sequence[int], meanings: Sequence[str | None], mesh: Any) -> PartitionSpec:
    """Of an array whose last axes have these meanings; an axis without one is not divided."""
    meanings = (None,) * (len(shape) - len(meanings)) + tuple(meanings)
    meanings = meanings[len(meanings) - len(shape) :]
    sizes = dict(mesh.shape)
    return PartitionSpec(
        *(axes_of(m, size, sizes) or None for m, size in zip(meanings, shape, strict=True))
    )


def constrain(x: Array, *meanings: str | None) -> Array:
    """x itself, divided over the mesh that is set as its last axes mean.

    For [B, L, D]: constrain(x, "batch", None, None). Of an array of fewer axes the first meanings
    are left out; an axis that the mesh does not divide evenly stays whole.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, partition(x.shape, meanings, mesh))


def _whole(name: str, w: Array) -> Array:
    used = [None if meaning == "embed" else meaning for meaning in PARAM_LOGICAL_AXES[name]]
    return constrain(w, *used)


_gathered = jax.custom_vjp(_whole, nondiff_argnums=(0,))


def _gathered_backward(name: str, _: None, cotangent: Array) -> tuple[Array]:
    return (constrain(cotangent, *PARAM_LOGICAL_AXES[name]),)


_gathered.defvjp(lambda name, w: (_whole(name, w), None), _gathered_backward)


def gather_for_compute(name: str, w: Array) -> Array:
    """The parameter of that name as a product wants it: what `fsdp` stores in parts, gathered.

    Its gradient is divided again as the parameter is.
    """
    return _gathered(name, w) if is_divided() and name in PARAM_LOGICAL_AXES else w


def shard_map_logical(
    function: Callable[..., Array],
    *parts: tuple[Array, tuple[str | None, ...]],
    out: tuple[tuple[int, ...], tuple[str | None, ...]],
) -> Array:
    """function of each device's own part of the arrays, or without a mesh of the arrays.

    parts: each array, and what its last axes mean.
    out: the same of the result: its shape as a whole, and what its last axes mean.
    """
    mesh = _mesh()
    arrays = [array for array, _ in parts]
    if mesh is None:
        return function(*arrays)
    specs = tuple(partition(array.shape, meanings, mesh) for array, meanings in parts)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=partition(*out, mesh), check_vma=False
    )
    return mapped(*arrays)


def _own_axes(meaning: str, size: int) -> tuple[str, ...]:
    """In `shard_map_logical`: the mesh axes that divide an axis of that meaning and whole size."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.manual_axes):
        return ()
    return axes_of(meaning, size, dict(mesh.shape))


def psum_over(x: Array, meaning: str, size: int) -> Array:
    """In `shard_map_logical`: Σ of x over the parts of an axis of that meaning and whole size."""
    axes = _own_axes(meaning, size)
    return lax.psum(x, axes) if axes else x


def local_ids(ids: Array, meaning: str, size: int) -> Array:
    """Inside `shard_map_logical`: where in this device's part of an axis the ids' elements are.

    Elements of the other parts are as many as one past its end.
    """
    axes = _own_axes(meaning, size)
    if not axes:
        return ids
    part = size // math.prod(lax.axis_size(axis) for axis in axes)
    own = ids - lax.axis_index(axes) * part
    return jnp.where((own >= 0) & (own < part), own, part)
