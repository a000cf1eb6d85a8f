"""Compiles a step for simulated CPU devices, and reads its memory, FLOPs and collectives."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.plan.work import Work
from tfm.model import Transformer
from tfm.parallel.mesh import batch_sharding, make_mesh, state_shardings
from tfm.parallel.sharding import AXES
from tfm.training import (
    init_state,
    make_optimizer,
    make_train_step,
    paper_schedule,
    skip_nonfinite,
)

# LLVM's passes take most of the compile time, and do not change what is read here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# XLA for the CPU removes the barriers around a rematerialised layer, and then merges it with the
# first computation. With the barriers kept it recomputes the layer, as on other devices.
BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def lower(work: Work, devices: Sequence[Any] | None = None) -> Any:
    """The training step, as `train_model` runs it, lowered for the work's mesh.

    devices: of the mesh, possibly described only (`jax.experimental.topologies`). None: the visible
    ones.

    Raises ValueError, as `MeshConfig.over`, where there are too few devices.
    """
    model = Transformer(work.model)
    optimizer = make_optimizer(paper_schedule(work.model.d_model), 1.0)
    step = make_train_step(model, optimizer, bos=1, accumulation=work.accumulation)
    mesh = make_mesh(work.mesh, devices) if devices or work.devices > 1 else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        state = jax.eval_shape(partial(init_state, model, optimizer), key)
        shapes = {"source": work.source, "target": work.target}
        batch = {
            name: jax.ShapeDtypeStruct((work.rows, length), jnp.int32)
            for side, length in shapes.items()
            for name in (side, f"{side}_segment_ids", f"{side}_positions")
        }
        outputs = {}
        if mesh:
            lies = state_shardings(mesh, state), jax.tree.map(lambda _: batch_sharding(mesh), batch)
            state, batch = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                (state, batch), lies,
            )  # fmt: skip
            outputs = {"out_shardings": (lies[0], None)}
        return jax.jit(skip_nonfinite(step), donate_argnums=0, **outputs).lower(state, batch)


def compile_quickly(work: Work) -> Any:
    """The compiled step, to be inspected; it is not optimised for running."""
    recomputes = work.model.rematerialize == "layers"
    return lower(work).compile(compiler_options=QUICK | (BARRIERS if recomputes else {}))


class Emitted(NamedTuple):
    """A collective of a compiled program."""

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of its results on one device."""
    bytes: int
    """The bytes of results that are not scalars."""


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({KINDS})(?:-start)?\((.*)$", re.M)
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}"
)
_BYTES = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u8": 1, "s8": 1}


def _numbers(listed: str) -> list[int]:
    return [int(n) for n in listed.split(",")]


def _first_group(attributes: str) -> list[int]:
    """The devices, by number, of the first group of a collective's `replica_groups`."""
    if match := _LISTED.search(attributes):
        return _numbers(match[1])
    if match := _IOTA.search(attributes):
        sizes = _numbers(match[3])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(_numbers(match[4])) if match[4] else ids
        return ids.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := _NAMED.search(attributes):
        names = re.findall(r"'(\w+)'=(\d+)", match[1])
        sizes = [int(size) for _, size in names]
        ids = np.arange(math.prod(sizes))
        if match[2]:
            ids = ids.reshape(_numbers(match[2])).transpose(_numbers(match[3]))
        within = re.findall(r"'(\w+)'", match[4])
        index = tuple(slice(None) if name in within else 0 for name, _ in names)
        if "(" not in match[4]:  # whole axes only
            return ids.reshape(sizes)[index].reshape(-1).tolist()
    raise ValueError(f"cannot read the groups of a collective: {attributes[:200]}")


def emitted(text: str, work: Work) -> list[Emitted]:
    """The collectives of optimised HLO, without those over a single device."""
    ids = np.arange(work.devices).reshape(tuple(work.mesh.sizes.values()))
    operations = []
    for result, kind, attributes in _OPERATION.findall(text):
        group = _first_group(attributes)
        where = np.argwhere(np.isin(ids, group))
        axes = tuple(a for i, a in enumerate(AXES) if len(set(where[:, i].tolist())) > 1)
        if math.prod(work.mesh.sizes[a] for a in axes) != len(group):
            raise ValueError(f"a {kind} over {group}, which are no axes of the mesh")
        if len(group) == 1:
            continue
        arrays = [(t, tuple(_numbers(s)) if s else ()) for t, s in _ARRAY.findall(result)]
        size = sum(_BYTES[t] * math.prod(shape) for t, shape in arrays if shape)
        operations.append(Emitted(kind, axes, tuple(shape for _, shape in arrays), size))
    return operations


def by_kind(collectives: list[Any]) -> Counter[tuple[str, tuple[str, ...]]]:
    """Total bytes by kind and axes of planned or emitted collectives; scalars are left out."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in collectives:
        if c.bytes:
            total[c.kind, c.axes] += c.bytes
    return total
