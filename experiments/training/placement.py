"""Placement of a training's arrays: the device mesh, and this process's rows of each batch."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.checkpoints.run_folder import RunFolder
from experiments.errors import UserError
from tfm.config import TransformerConfig
from tfm.parallel.mesh import MeshConfig, batch_sharding, check_divides, make_mesh, state_shardings
from tfm.training import Batch, TrainState


class LayoutError(UserError):
    """Why the training cannot be divided over the devices."""


def divisible(
    model: TransformerConfig, mesh: MeshConfig, folder: RunFolder | None = None
) -> TransformerConfig:
    """The model with its vocabularies padded to a multiple of `tensor`.

    folder: a run to resume; its padding is kept unless a flag asks for another.
    """
    before = (folder and folder.read("config.json")) or {}
    if model.vocab_multiple == 1:
        multiple = before.get("model", {}).get("vocab_multiple", 1)
        model = dataclasses.replace(model, vocab_multiple=multiple)
    sizes = [model.vocab_size, model.source_vocab_size or model.vocab_size]
    if all(model.padded(size) % mesh.tensor == 0 for size in sizes):
        return model
    multiple = math.lcm(model.vocab_multiple, mesh.tensor)
    return dataclasses.replace(model, vocab_multiple=multiple)


def _same(x: jax.Array) -> jax.Array:
    return x


class Layout:
    """The mesh of a training, over the devices of all its processes.

    Raises LayoutError, before anything is compiled, where there are too few devices or the mesh
    does not divide the model or the batch; the message names the flags.
    """

    def __init__(
        self, config: MeshConfig, model: TransformerConfig, rows: int, accumulation: int = 1
    ) -> None:
        if config.data is None:
            config = self._as_many_as_divide(config, rows // accumulation)
        try:
            self.config = config.over(len(jax.devices()))
            check_divides(model, self.config)
            self.mesh = make_mesh(self.config)
        except ValueError as error:
            raise LayoutError(str(error)) from None
        try:
            check_divides(model, self.config, rows, accumulation)
        except ValueError as error:
            raise LayoutError(f"{error}: {self._enough(rows, accumulation)}") from None
        taking_part = {device.process_index for device in self.mesh.devices.flat}
        if left_out := set(range(jax.process_count())) - taking_part:
            raise LayoutError(
                f"the mesh of {self.mesh.size} devices leaves out all those of process "
                f"{min(left_out)}: start fewer processes, or make the mesh larger"
            )
        self._rows = rows
        self._batch = batch_sharding(self.mesh)
        self._everywhere = NamedSharding(self.mesh, PartitionSpec())

    @staticmethod
    def _as_many_as_divide(config: MeshConfig, rows: int) -> MeshConfig:
        """The mesh with the largest `data` that fits the visible devices and divides the rows."""
        visible, others = len(jax.devices()), config.fsdp * config.tensor
        most = max(1, visible // others)
        data = next((n for n in range(most, 0, -1) if rows % (n * config.fsdp) == 0), most)
        if data < most and jax.process_index() == 0:
            print(
                f"{data * others} of {visible} devices take part: more do not divide {rows} rows",
                file=sys.stderr,
            )
        return dataclasses.replace(config, data=data) if data < most else config

    def _enough(self, rows: int, accumulation: int) -> str:
        """A hint for the message: flags with which the mesh divides the rows."""
        parts, fsdp, micro = self.config.parts("batch"), self.config.fsdp, rows // accumulation
        fewer = next((n for n in range(parts // fsdp, 0, -1) if micro % (n * fsdp) == 0), None)
        more = f"take --rows {-(-micro // parts) * parts * accumulation}"
        return f"{more}, or --mesh.data {fewer}" if fewer else more

    @functools.cached_property
    def own_rows(self) -> slice:
        """The range of batch rows that this process's devices hold; it loads no others."""
        indices = self._batch.addressable_devices_indices_map((self._rows,)).values()
        spans = [rows.indices(self._rows) for (rows,) in indices]
        return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))

    def place(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Shards a state that every process has in full."""

        def put(x: Any, sharding: NamedSharding) -> jax.Array:
            whole = np.asarray(x)
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

        return jax.tree.map(put, tree, state_shardings(self.mesh, tree))

    def step(
        self,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
        state: TrainState,
    ) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
        """The jitted step over the mesh; it takes this process's own rows of the batch."""
        shardings = state_shardings(self.mesh, state), self._everywhere
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=shardings)
        return self._of_own_rows(jitted)

    def evaluation(
        self, function: Callable[[chex.ArrayTree, Batch], chex.ArrayTree]
    ) -> Callable[[chex.ArrayTree, Batch], chex.ArrayTree]:
        """A jitted function of parameters and batch over the mesh. All processes call it, and each
        gets the full result."""
        return self._of_own_rows(jax.jit(function, out_shardings=self._everywhere))

    def _of_own_rows(
        self, jitted: Callable[[chex.ArrayTree, Batch], Any]
    ) -> Callable[[chex.ArrayTree, Batch], Any]:
        def call(tree: chex.ArrayTree, batch: Batch) -> Any:
            shared = {name: self._share(rows) for name, rows in batch.items()}
            with jax.set_mesh(self.mesh):
                return jitted(tree, shared)

        return call

    def _share(self, own: np.ndarray) -> jax.Array:
        first, shape = self.own_rows.start, (self._rows, *own.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._rows)
            return own[start - first : stop - first]

        return jax.make_array_from_callback(shape, self._batch, part)

    def on_one_device(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Gathers the arrays on this process's first device; all processes must call it."""
        return tree if self.mesh.size == 1 else jax.tree.map(self._whole, tree)

    def on_host(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Gathers the arrays in this process's memory; all processes must call it."""
        return jax.tree.map(lambda x: np.asarray(self._whole(x)), tree)

    def _whole(self, x: jax.Array) -> jax.Array:
        """Gathers one array, since every device holds all of it meanwhile."""
        return jax.jit(_same, out_shardings=self._everywhere)(x).addressable_data(0)

    def agreement(self) -> Callable[[int | None], int | None]:
        """A function that reduces a number of each process to the largest, the same in all.

        All processes call it after each step. It returns the result of the call before, so that no
        process waits for the others. A single process gets its own number at once.
        """
        if jax.process_count() == 1:
            return lambda number: number
        everyone = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        largest = jax.jit(jnp.max, out_shardings=self._everywhere)
        under_way: list[jax.Array] = []

        def agree(number: int | None) -> int | None:
            own = np.full(len(self.mesh.local_devices), number or 0, np.int32)
            shared = jax.make_array_from_process_local_data(everyone, own, (self.mesh.size,))
            under_way.append(largest(shared))
            return int(under_way.pop(0)) or None if len(under_way) > 1 else None

        return agree

    def facts(self, state: TrainState) -> dict[str, Any]:
        """Fields of results.json: `devices`, `processes`, `mesh`, and the bytes of parameters and
        moments on each device."""

        def bytes_of(tree: chex.ArrayTree) -> int:
            return sum(
                int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
                for x in jax.tree.leaves(tree)
            )

        return {
            "devices": self.mesh.size,
            "processes": jax.process_count(),
            "mesh": self.config.sizes,
            "parameter_bytes_per_device": bytes_of(state.params),
            "moment_bytes_per_device": bytes_of(state.opt_state),
        }
