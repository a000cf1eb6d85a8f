"""Where arrays lie: refusals by name, each process's rows, and copies that a host can read."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

import tfm
from experiments.data.packing import endless_batches
from experiments.training import placement as layout
from experiments.training.placement import Layout, LayoutError, divisible
from tfm.parallel.mesh import MeshConfig

MODEL = tfm.TransformerConfig(
    vocab_size=42, source_vocab_size=32, d_model=16, d_ff=32, num_heads=4, num_encoder_layers=1,
    num_decoder_layers=1,
)  # fmt: skip
OPTIMIZER = tfm.make_optimizer(tfm.paper_schedule(16), 1.0)


def state():
    made = partial(tfm.init_state, tfm.Transformer(MODEL), OPTIMIZER)
    return jax.jit(made)(jax.random.PRNGKey(0))


def test_all_devices_go_to_data_where_no_mesh_is_asked_for():
    assert Layout(MeshConfig(), MODEL, rows=8).config.sizes == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh", "rows", "accumulation", "why"),
    [
        (MeshConfig(8), 25, 1, "mesh.data=8 × mesh.fsdp=1 does not divide rows=25: take --rows 32, "
                              "or --mesh.data 5"),
        (MeshConfig(8), 24, 4, "does not divide rows=24 / accumulation=4: take --rows 32, or "
                              "--mesh.data 6"),
        (MeshConfig(tensor=8), 8, 1, "mesh.tensor=8 does not divide num_heads=4"),
        (MeshConfig(data=16), 16, 1, "asks for 16 devices, but 8 are visible"),
    ],
)  # fmt: skip
def test_what_the_devices_cannot_share_is_refused_by_name(mesh, rows, accumulation, why):
    with pytest.raises(LayoutError) as error:
        Layout(mesh, MODEL, rows, accumulation)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_without_a_mesh_as_many_devices_as_can_share_the_rows_take_part(capsys):
    assert Layout(MeshConfig(), MODEL, rows=25).config.sizes["data"] == 5
    assert "5 of 8 devices take part: more do not divide 25 rows" in capsys.readouterr().err
    assert Layout(MeshConfig(tensor=2), MODEL, rows=6).config.sizes["data"] == 3
    assert Layout(MeshConfig(fsdp=2), MODEL, rows=8).config.sizes["data"] == 4
    assert "6 of 8" in capsys.readouterr().err


def test_the_rows_of_a_micro_batch_are_divided():
    Layout(MeshConfig(), MODEL, rows=32, accumulation=4)


def test_a_vocabulary_is_padded_only_where_the_mesh_does_not_divide_it():
    assert divisible(MODEL, MeshConfig(tensor=2)) == MODEL
    assert divisible(MODEL, MeshConfig(tensor=4)).vocab_multiple == 4
    padded = dataclasses.replace(MODEL, vocab_multiple=6)
    assert divisible(padded, MeshConfig(tensor=4)).vocab_multiple == 12
    Layout(MeshConfig(tensor=4), divisible(MODEL, MeshConfig(tensor=4)), rows=8)


def test_a_state_is_placed_in_parts_and_read_whole():
    made, shared = state(), Layout(MeshConfig(2, 2, 2), MODEL, rows=8)
    placed = shared.place(made)
    w1 = placed.params["encoder_0"]["feed_forward"]["w1"]
    assert w1.sharding.shard_shape(w1.shape) == (8, 16)
    back = shared.on_one_device(placed)
    jax.tree.map(np.testing.assert_array_equal, back, made)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(back))


def test_the_facts_are_those_of_the_arrays():
    """A matrix that both axes divide holds a quarter of its bytes in each device."""
    facts = Layout(MeshConfig(2, 2, 2), MODEL, rows=8).facts
    placed = Layout(MeshConfig(2, 2, 2), MODEL, rows=8).place(state())
    found = facts(placed)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed.params))
    assert found["parameter_bytes_per_device"] == held
    assert held < sum(x.nbytes for x in jax.tree.leaves(placed.params)) / 3
    moments = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed.opt_state))
    assert found["moment_bytes_per_device"] == moments
    assert found["devices"] == 8 and found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_process_loads_only_its_own_rows():
    loaded = []

    def load(chosen):
        loaded.append(len(chosen))
        return {"row": chosen}

    every = endless_batches(20, load, rows=8, seed=3)
    own = endless_batches(20, load, rows=8, seed=3, own=slice(4, 8))
    for _ in range(5):
        np.testing.assert_array_equal(next(own)["row"], next(every)["row"][4:8])
    assert set(loaded) == {4, 8} and own.get_state() == every.get_state()
    assert Layout(MeshConfig(), MODEL, rows=16).own_rows == slice(0, 16)  # all are this process's


def test_processes_agree_on_the_call_before(monkeypatch):
    """Two processes played by one: the answer is the largest, one call late."""
    shared = Layout(MeshConfig(), MODEL, rows=8)
    assert shared.agreement()(15) == 15  # alone: at once
    monkeypatch.setattr(layout.jax, "process_count", lambda: 2)
    agree = shared.agreement()
    assert [agree(said) for said in (None, None, 15, None, None)] == [None, None, None, 15, None]
