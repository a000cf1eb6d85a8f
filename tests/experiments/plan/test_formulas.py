"""The formulas alone, without a compiler."""

import dataclasses
import math

import jax
import pytest

from experiments.plan.chips import CHIPS, Chip
from experiments.plan.flops import forward_flops
from experiments.plan.memory import (
    CPU,
    GPU,
    TPU,
    activation_bytes,
    loss_bytes,
    stages,
    temporary_bytes,
)
from experiments.plan.speed import Assumed, habits_on, most_rows, needed_bytes, times
from experiments.plan.traffic import Collective, collectives, products
from experiments.plan.work import COUNTERS, Work, argument_bytes, parameter_bytes, parameters
from tfm import BASE, BIG, Transformer, TransformerConfig, init_state, make_optimizer
from tfm.parallel.mesh import MeshConfig

SMALL = TransformerConfig(vocab_size=1000, vocab_multiple=8, d_model=64, d_ff=128, num_heads=8,
                          num_encoder_layers=2, num_decoder_layers=1)  # fmt: skip
VARIANTS = (
    {},
    {"projection_bias": True, "output_bias": True, "tied_output": False},
    {"source_vocab_size": 320, "norm_placement": "pre"},
    {"positions": "learned", "final_norm": True, "max_learned_positions": 24},
    {"scan_layers": True},
)


def work(model=SMALL, mesh=(1, 1, 1), rows=16, source=20, target=12, accumulation=1):
    return Work(model, MeshConfig(*mesh), rows, source, target, accumulation)


@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters_are_those_of_the_model(changes):
    config = dataclasses.replace(SMALL, **changes)
    whole = sum(p.elements(MeshConfig(1)) for p in parameters(config))
    assert whole == config.parameter_count()


def test_padding_adds_rows():
    padded = dataclasses.replace(SMALL, vocab_size=993)
    assert parameter_bytes(work(padded)) == parameter_bytes(work()) == 4 * SMALL.parameter_count()


def test_the_states_bytes_are_those_of_a_state():
    model = Transformer(dataclasses.replace(SMALL, **VARIANTS[1]))
    optimizer = make_optimizer(lambda step: 1e-3, 1.0)
    state = jax.eval_shape(lambda key: init_state(model, optimizer, key), jax.random.PRNGKey(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size == 3 * parameter_bytes(work(model.config)) + COUNTERS


def test_each_mesh_divides_what_its_rules_say():
    whole, each = work(), {mesh: work(mesh=mesh) for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8))}
    batch = 4 * 3 * 16 * (20 + 12)
    assert argument_bytes(whole) == 12 * SMALL.parameter_count() + COUNTERS + batch
    assert argument_bytes(whole) - argument_bytes(each[8, 1, 1]) == batch - batch // 8
    # Not divided: what belongs to features alone; of tensor's parts that are not b₁ too.
    features = 4 * 64 * (2 * (2 * 2 + 3 * 1) + 3)
    b_1 = 4 * 128 * 3
    undivided = {(1, 8, 1): features + b_1, (1, 1, 8): features}
    for mesh, rest in undivided.items():
        assert parameter_bytes(each[mesh]) == (parameter_bytes(whole) - rest) // 8 + rest


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mesh": (1, 1, 3)}, r"mesh.tensor=3 does not divide num_heads=8"),
        ({"mesh": (1, 3, 1)}, r"mesh.fsdp=3 does not divide d_model=64"),
        ({"mesh": (3, 1, 1)}, r"mesh.data=3 × mesh.fsdp=1 does not divide rows=16"),
        ({"mesh": (8, 1, 1), "accumulation": 4}, "divide rows=16 / accumulation=4"),
        ({"accumulation": 3}, r"accumulation=3 does not divide rows=16"),
        ({"rows": 0}, r"rows=0 must be at least 1"),
        ({"model": dataclasses.replace(SMALL, compute_dtype="float64")}, "float64 is for checks"),
    ],
)
def test_what_cannot_be_planned_is_named(changes, why):
    with pytest.raises(ValueError, match=why):
        work(**changes)


def test_activations_grow_with_rows_and_are_fewer_computed_anew():
    one, two = (temporary_bytes(work(rows=r), TPU) for r in (1600, 3200))
    assert two / one == pytest.approx(2, rel=0.01)
    anew = work(dataclasses.replace(SMALL, rematerialize="layers"), rows=1600)
    assert activation_bytes(anew, TPU) < activation_bytes(work(rows=1600), TPU) / 4
    assert temporary_bytes(anew, TPU) < one
    cut = work(rows=1600, accumulation=4)
    assert temporary_bytes(cut, TPU) == pytest.approx(one / 4, rel=0.1)


def test_an_encoders_activations_by_hand():
    config = dataclasses.replace(SMALL, dropout_rate=0.0, num_heads=2)
    (layer, _) = [s for s in stages(work(config), TPU) if s.name == "encoder"]
    n, d, f = 16 * 20, 64, 128
    sums, norms, statistics = 2 * n * d, 2 * n * d, 2 * 3 * n
    projected, hidden, weights, totals = 4 * n * d, 2 * n * f, 16 * 2 * 20 * 20, 16 * 2 * 20
    assert layer.kept == 4 * (sums + norms + statistics + projected + hidden + weights + totals)


def test_weights_are_kept_where_attention_is_not_fused():
    sixteen = work(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    assert not sixteen.keeps_weights(20, 12, "cuda")
    assert sixteen.keeps_weights(20, 12, "tpu") and sixteen.keeps_weights(21, 12, "cuda")
    assert work().keeps_weights(20, 20, "cuda") and work().keeps_weights(20, 20, "cpu")
    assert not work(rows=1600).keeps_weights(20, 20, "cpu")  # more than CHUNK logits
    for name, kept in (("chunked", False), ("formula", True)):
        chosen = work(dataclasses.replace(SMALL, implementation=name))
        assert chosen.keeps_weights(20, 20, "cpu") == kept
    dropped = work(dataclasses.replace(SMALL, implementation="chunked", attention_dropout_rate=0.1))
    assert dropped.keeps_weights(20, 20, "cuda")


def test_products_are_thrice_the_forward_passs():
    found = products(work(BIG, rows=2))
    assert found.forward == 2 * forward_flops(BIG, 20, 12) and found.backward == 2 * found.forward
    assert found.recomputed == 0 and found.step == 3 * found.forward + found.rows
    again = products(work(dataclasses.replace(BIG, rematerialize="layers"), rows=2))
    assert again.recomputed == again.forward - 2 * 2 * 12 * 1024 * 37_000


def test_collectives_are_named_for_the_axes_of_a_mesh():
    def kinds(*mesh):
        return {(c.kind, c.axes) for c in collectives(work(mesh=mesh))}

    assert kinds(1, 1, 1) == set()
    assert kinds(8, 1, 1) == {("all-reduce", ("data",))}
    assert kinds(1, 8, 1) == {("all-gather", ("fsdp",)), ("all-reduce", ("fsdp",))}
    assert kinds(1, 1, 8) == {("all-reduce", ("tensor",))}
    assert ("all-reduce", ("data", "fsdp")) in kinds(2, 2, 2)


def test_a_ring_sends_a_sum_twice():
    on = work(mesh=(2, 4, 1))
    assert Collective("all-reduce", ("fsdp",), "", "", 100).sent(on) == 150
    assert Collective("all-gather", ("data", "fsdp"), "", "", 80).sent(on) == 70


def test_micro_batches_sum_their_gradients_each():
    def sums(accumulation):
        found = collectives(work(mesh=(2, 1, 1), accumulation=accumulation))
        return sum(c.bytes for c in found)

    assert sums(4) == 4 * sums(1)


MADE_UP = Chip("made up", "tpu", 2e9, 1e9, 1e9, 1e9, 1e5, "")


def test_times_by_hand():
    assumed = Assumed(products=0.5, link=0.5, memory=1.0)
    on = work(BASE, mesh=(2, 1, 1), rows=2)
    found = times(on, MADE_UP, assumed)
    assert found.passes == products(on).step / (2 * 1e9 * 0.5)
    assert found.optimizer == 8 * parameter_bytes(on) / 1e9
    sent = sum(c.bytes for c in collectives(on))  # of a sum over two devices as much is sent
    assert found.exchange == pytest.approx(sent / (1e5 * 0.5))
    assert found.exposed == pytest.approx(found.exchange - found.passes * 2 / 3)
    assert found.exposed > 0
    assert found.step == found.passes + found.optimizer + found.exposed
    slow = times(on, MADE_UP._replace(bandwidth=1e5), assumed)
    assert slow.passes == 2 * (activation_bytes(on, TPU) + loss_bytes(on)) / 1e5
    half = dataclasses.replace(BASE, compute_dtype="bfloat16")
    assert times(work(half, (2, 1, 1), 2), MADE_UP, assumed).passes == found.passes / 2


def test_sums_over_tensor_are_waited_for():
    on = work(mesh=(1, 1, 8))
    found = times(on, CHIPS["H100"], Assumed())
    assert found.exposed == found.exchange > 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_most_rows_fit_and_more_do_not(chip):
    assumed = Assumed(memory=0.8)
    on = work(BIG, mesh=(2, 2, 1), rows=16, source=128, target=128, accumulation=2)
    most = most_rows(on, chip, assumed)
    assert most > 0 and most % 8 == 0

    def needed(rows):
        return needed_bytes(dataclasses.replace(on, rows=rows), habits_on(chip))

    assert needed(most) <= 0.8 * chip.memory < needed(most + 8)


def test_where_not_even_a_row_fits_it_is_none():
    assert most_rows(work(BIG), MADE_UP._replace(memory=1e9), Assumed()) == 0


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan])
def test_a_share_is_a_share(value):
    with pytest.raises(ValueError, match=r"link=.* must be in \(0, 1\]"):
        Assumed(link=value)


def test_every_chip_says_where_its_numbers_are_from():
    for name, chip in CHIPS.items():
        assert chip.name == name and chip.source and chip.platform in ("cuda", "tpu")
        assert all(x > 0 for x in chip[2:7]) and chip.bfloat16 > chip.float32


def test_habits_differ_in_what_a_compiler_may_choose():
    sizes = [temporary_bytes(work(), h) for h in (CPU, GPU, TPU)]
    assert sizes[0] > sizes[1] == sizes[2]
