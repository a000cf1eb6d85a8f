"""The formulas beside what XLA makes of the same step."""

import dataclasses

import pytest
from compiling import by_kind, compiled_apart, said, work_of

from experiments.plan.compiled import emitted, lower
from experiments.plan.memory import CPU, temporary_bytes
from experiments.plan.traffic import collectives, products
from experiments.plan.work import Work, argument_bytes, parameters
from tfm import BASE, BIG
from tfm.parallel.mesh import MeshConfig

NONE, ALL, ALONE = [1, 1, 1], [2, 2, 2], ([8, 1, 1], [1, 8, 1], [1, 1, 8])
DEEP = {"num_encoder_layers": 2, "num_decoder_layers": 2}
WIDE = {"d_model": 128, "d_ff": 384, "vocab_size": 3000, "num_decoder_layers": 2}
SHAPES = (
    (DEEP, 8, 64, 96),
    (WIDE, 32, 20, 28),
    (DEEP | {"rematerialize": "layers"}, 8, 64, 96),
    (WIDE | {"rematerialize": "layers"}, 32, 20, 28),
)
OTHER = {
    "source_vocab_size": 90, "tied_output": False, "output_bias": True, "projection_bias": True,
    "norm_placement": "pre", "activation_dropout_rate": 0.1,
}  # fmt: skip
CASES = [[model, mesh, *shape] for model, *shape in SHAPES for mesh in (NONE, ALL)]
# Each axis alone divides a layer of each as it divides more of them, which compile for longer.
SHALLOW = (({}, 16, 64, 96), ({"rematerialize": "layers"}, 32, 20, 28))
CASES += [[model, mesh, *shape] for model, *shape in SHALLOW for mesh in ALONE]
# Most of it hidden features, or logits: where one term is wrong, it shows.
HIDDEN, LOGITS = {"d_ff": 1024, "vocab_size": 197}, {"vocab_size": 8000}
CASES += [[model, [1, 1, 1], 64, 16, 16] for model in (HIDDEN, LOGITS, {"vocab_size": 7997})]
CASES += [[LOGITS, [1, 1, 8], 64, 16, 16]]
CASES += [[OTHER, mesh, 32, 24, 32] for mesh in ([1, 1, 8], [2, 2, 2])]


def check_arguments(work, answer):
    assert answer["arguments"] == argument_bytes(work)


def check_temporaries(work, answer):
    """Activations, logits and gradients; and what XLA for the CPU copies."""
    assert temporary_bytes(work, CPU) == pytest.approx(answer["temporaries"], rel=0.25)


def check_collectives(work, answer):
    planned = collectives(work)
    assert answer["kinds"] == sorted({c.kind for c in planned})
    wanted = sorted([kind, list(axes), n] for (kind, axes), n in by_kind(planned).items())
    assert [[k, list(a), n] for k, a, n in answer["collectives"]] == wanted


def check_no_whole_parameter(work, answer):
    """No all-gather has the whole of a parameter that `tensor` divides, upright or turned."""
    divided = {p.shape for p in parameters(work.model) if work.tensor > 1 and any(
        m in ("heads", "hidden", "vocabulary") for m in p.meanings)}  # fmt: skip
    whole = divided | {shape[::-1] for shape in divided}
    assert not whole & {tuple(shape) for shape in answer["gathered"]}
    assert bool(answer["gathered"]) == (work.mesh.fsdp > 1)


CHECKS = (check_arguments, check_temporaries, check_collectives, check_no_whole_parameter)


@pytest.fixture(scope="module")
def answers():
    return compiled_apart(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_plan_is_what_xla_makes_for_eight_devices(answers, number, check):
    check(work_of(*CASES[number]), answers[number])


@pytest.mark.parametrize("mesh", [[1, 2, 1], pytest.param([1, 1, 2], marks=pytest.mark.slow)])
def test_the_plan_is_what_xla_makes_for_two_devices(mesh):
    work = work_of(HIDDEN, mesh, 64, 16, 16)
    answer = said(work)
    for check in CHECKS:
        check(work, answer)


def products_over_lowered(config):
    work = Work(dataclasses.replace(config, implementation="formula"), MeshConfig(1), 8, 64, 48)
    return products(work).step / lower(work).cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("rematerialize", ["nothing", "layers"])
@pytest.mark.parametrize("config", [BASE, BIG])
def test_flops_are_those_of_the_unrolled_program(config, rematerialize):
    config = dataclasses.replace(config, rematerialize=rematerialize)
    assert products_over_lowered(config) == pytest.approx(1, rel=0.02)


def test_flops_of_a_layer_of_each_are_those_of_the_program():
    shallow = dataclasses.replace(BASE, num_encoder_layers=1, num_decoder_layers=1)
    assert products_over_lowered(shallow) == pytest.approx(1, rel=0.02)


TOLD = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
    "{{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "[4,2]<=[8]": ("tensor",),
    "[4,2]<=[2,2,2]T(0,2,1)": ("fsdp",),
    "[4,2]<=[4,2]T(1,0)": None,
    "[2,4]<=[4,2]T(1,0)": ("data", "fsdp"),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": ("data", "fsdp"),
    "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}": ("data", "tensor"),
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}": ("tensor",),
    "mesh['axis_0'=8] {'axis_0'}": ("data", "fsdp", "tensor"),
}


@pytest.mark.parametrize("groups", [g for g, axes in TOLD.items() if axes])
def test_the_axes_of_a_collective_are_read(groups):
    work = work_of({}, [2, 2, 2], 8, 4, 4)
    line = (
        f"  %x = (f32[2,3]{{1,0}}, f32[]) all-reduce(%a, %b), channel_id=1, replica_groups={groups}"
    )
    (found,) = emitted(f"{line}, use_global_device_ids=true", work)
    assert found == ("all-reduce", TOLD[groups], ((2, 3), ()), 24)


def test_groups_of_one_are_no_collectives_and_strange_ones_are_errors():
    work = work_of({}, [2, 2, 2], 8, 4, 4)
    line = "  %x = f32[2]{0} all-gather(%a), channel_id=1, replica_groups="
    assert emitted(f"{line}{{{{0}},{{1}}}}, dimensions={{0}}", work) == []
    with pytest.raises(ValueError, match="no axes of the mesh"):
        emitted(f"{line}{{{{0,3}},{{1,2}}}}, dimensions={{0}}", work)
    with pytest.raises(ValueError, match="cannot read the groups"):
        emitted(f"{line}something, dimensions={{0}}", work)
