"""What XLA makes of a step for forced host devices: its memory, its FLOPs, its collectives."""

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

# LLVM's passes take most of the time, and change nothing of what is asked here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# XLA for the CPU takes away what keeps a layer's second computation apart from its first, and finds
# them equal. With the barriers in place it computes anew, as on other devices.
BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def lower(work: Work, devices: Sequence[Any] | None = None) -> Any:
    """The training step, as `train_model` runs it, lowered for the work's mesh.

    devices: those of the mesh, which need not be here (`jax.experimental.topologies`). None: those
    that are visible.

    Raises ValueError as `MeshConfig.over` does, where the devices are too few.
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
    """The compiled step, for what can be read of it; it would run slowly."""
    anew = work.model.rematerialize == "layers"
    return lower(work).compile(compiler_options=QUICK | (BARRIERS if anew else {}))


class Emitted(NamedTuple):
    """A collective of a compiled program."""

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of its results on one device."""
    bytes: int
    """Of those that are not single numbers."""


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


def _first_group(told: str) -> list[int]:
    """The devices, by number, of the first group of a collective's `replica_groups`."""
    if found := _LISTED.search(told):
        return _numbers(found[1])
    if found := _IOTA.search(told):
        sizes = _numbers(found[3])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(_numbers(found[4])) if found[4] else ids
        return ids.reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := _NAMED.search(told):
        names = re.findall(r"'(\w+)'=(\d+)", found[1])
        sizes = [int(size) for _, size in names]
        ids = np.arange(math.prod(sizes))
        if found[2]:
            ids = ids.reshape(_numbers(found[2])).transpose(_numbers(found[3]))
        within = re.findall(r"'(\w+)'", found[4])
        index = tuple(slice(None) if name in within else 0 for name, _ in names)
        if "(" not in found[4]:  # no part of an axis
            return ids.reshape(sizes)[index].reshape(-1).tolist()
    raise ValueError(f"cannot read the groups of a collective: {told[:200]}")


def emitted(text: str, work: Work) -> list[Emitted]:
    """The collectives of optimised HLO, without those that each device has with itself alone."""
    ids = np.arange(work.devices).reshape(tuple(work.mesh.sizes.values()))
    found = []
    for result, kind, told in _OPERATION.findall(text):
        group = _first_group(told)
        where = np.argwhere(np.isin(ids, group))
        axes = tuple(a for i, a in enumerate(AXES) if len(set(where[:, i].tolist())) > 1)
        if math.prod(work.mesh.sizes[a] for a in axes) != len(group):
            raise ValueError(f"a {kind} over {group}, which are no axes of the mesh")
        if len(group) == 1:
            continue
        arrays = [(t, tuple(_numbers(s)) if s else ()) for t, s in _ARRAY.findall(result)]
        size = sum(_BYTES[t] * math.prod(shape) for t, shape in arrays if shape)
        found.append(Emitted(kind, axes, tuple(shape for _, shape in arrays), size))
    return found


def by_kind(found: list[Any]) -> Counter[tuple[str, tuple[str, ...]]]:
    """Bytes by kind and axes, of collectives planned or emitted; none of single numbers alone."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in found:
        if c.bytes:
            total[c.kind, c.axes] += c.bytes
    return total
