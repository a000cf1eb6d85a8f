"""A mesh of eight devices computes what one device does, and holds a part of it in each."""

import contextlib
import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.parallel import mesh as meshes
from tfm.parallel import sharding
from tfm.parallel.mesh import MeshConfig
from tfm.training import init_params

MESHES = [MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(1, 1, 8), MeshConfig(2, 2, 2)]
CONFIG = tfm.TransformerConfig(
    vocab_size=42, source_vocab_size=34, vocab_multiple=8, d_model=32, d_ff=112, num_heads=8,
    num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1, activation_dropout_rate=0.1,
    projection_bias=True, output_bias=True,
)  # fmt: skip
OPTIMIZER = tfm.make_optimizer(tfm.paper_schedule(32, 50), clip_threshold=1.0)
ROWS = 16


def named(config):
    return "×".join(map(str, config.sizes.values()))


def batch(seed):
    """Two sequences in each row, and padding behind them."""
    rng, made = np.random.default_rng(seed), {}
    for side, length, words in (("source", 12, 34), ("target", 10, 42)):
        half = length // 2
        segments = np.repeat([1, 2, 0], [half, half - 2, 2]).astype(np.int32)
        positions = np.r_[np.arange(half), np.arange(half - 2), 0, 0].astype(np.int32)
        made[side] = rng.integers(3, words, (ROWS, length)).astype(np.int32) * (segments > 0)
        made[f"{side}_segment_ids"] = np.tile(segments, (ROWS, 1))
        made[f"{side}_positions"] = np.tile(positions, (ROWS, 1))
    return {name: array.astype(np.int32) for name, array in made.items()}


class Training:
    """A model's training step on a mesh, or without one."""

    def __init__(self, config, divided, **options):
        model = tfm.Transformer(config)
        self.state = jax.jit(partial(tfm.init_state, model, OPTIMIZER))(jax.random.PRNGKey(0))
        step = tfm.make_train_step(model, OPTIMIZER, bos=1, **options)
        self.mesh = None if divided is None else meshes.make_mesh(divided)
        if divided is None:
            self.step = jax.jit(step)
        else:
            shardings = meshes.state_shardings(self.mesh, self.state)
            self.state = jax.device_put(self.state, shardings)
            self.step = jax.jit(step, out_shardings=(shardings, None))

    def context(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def batch(self, seed):
        made = batch(seed)
        return made if self.mesh is None else jax.device_put(made, meshes.batch_sharding(self.mesh))

    def losses(self, steps):
        losses = []
        with self.context():
            for seed in range(steps):
                self.state, metrics = self.step(self.state, self.batch(seed))
                losses.append(float(metrics["loss"]))
        return np.array(losses)

    def compiled(self):
        with self.context():
            return self.step.lower(self.state, self.batch(0)).compile()


def f64(config):
    return dataclasses.replace(config, compute_dtype="float64")


@pytest.fixture(scope="module")
def reference():
    """The losses of one device: in f32, and in f64."""
    single = Training(CONFIG, None).losses(50)
    with jax.enable_x64(True):
        return {"float32": single, "float64": Training(f64(CONFIG), None).losses(50)}


@pytest.mark.slow
@pytest.mark.parametrize("divided", MESHES, ids=named)
def test_a_mesh_gives_the_losses_of_one_device_in_f64(divided, reference):
    """50 steps, dropout on: within 1e-9."""
    with jax.enable_x64(True):
        losses = Training(f64(CONFIG), divided).losses(50)
    np.testing.assert_allclose(losses, reference["float64"], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("divided", MESHES, ids=named)
def test_a_mesh_gives_the_losses_of_one_device_in_f32(divided, reference):
    losses = Training(CONFIG, divided).losses(50)
    np.testing.assert_allclose(losses, reference["float32"], rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (1, 8, 6, 6), (8, 1, 6, 6), (8, 8, 6, 1)])
@pytest.mark.parametrize("implementation", ["formula", "chunked"])
def test_the_gradient_of_a_bias_is_that_of_one_device(rng, shape, implementation):
    operands = [jnp.float32(rng.standard_normal((8, 8, 6, 4))) for _ in range(3)]
    bias = jnp.float32(rng.standard_normal(shape))

    def total(bias, *operands):
        out = tfm.scaled_dot_product_attention(*operands, bias=bias, implementation=implementation)
        return jnp.square(out).sum()

    both = jax.value_and_grad(total, argnums=(0, 1))
    alone = both(bias, *operands)
    with jax.set_mesh(meshes.make_mesh(MeshConfig(2, 2, 2))):
        together = jax.jit(both)(bias, *operands)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), together, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"source_vocab_size": None, "tied_output": False},
        {"positions": "learned", "norm_placement": "pre"},
        {"implementation": "chunked"},
        {"rematerialize": "layers"},
        {"scan_layers": True},
        {"attention_dropout_rate": 0.2},
        {"accumulation": 2},
    ],
    ids=str,
)
def test_an_option_is_divided_too(changes):
    options = {"accumulation": changes.pop("accumulation", 1)}
    config = f64(dataclasses.replace(CONFIG, **changes))
    with jax.enable_x64(True):
        losses = Training(config, MeshConfig(2, 2, 2), **options).losses(3)
        one = Training(config, None, **options).losses(3)
    np.testing.assert_allclose(losses, one, rtol=1e-12)


@pytest.mark.parametrize("divided", MESHES, ids=named)
def test_parameters_and_moments_are_divided(divided):
    """Each axis of a matrix by what the table of rules says; vectors of d_model stay whole."""
    mesh, model = meshes.make_mesh(divided), tfm.Transformer(CONFIG)
    state = jax.eval_shape(partial(tfm.init_state, model, OPTIMIZER), jax.random.PRNGKey(0))
    shardings = meshes.state_shardings(mesh, state)
    layer = shardings.params["decoder_0"]
    d, f, v = CONFIG.d_model, CONFIG.d_ff, CONFIG.padded(CONFIG.vocab_size)
    fsdp, tensor = divided.fsdp, divided.tensor
    ffn, attention = layer["feed_forward"], layer["self_attention"]
    assert ffn["w1"].shard_shape((d, f)) == (d // fsdp, f // tensor)
    assert ffn["w2"].shard_shape((f, d)) == (f // tensor, d // fsdp)
    assert ffn["b1"].shard_shape((f,)) == (f // tensor,)
    assert ffn["b2"].shard_shape((d,)) == (d,)
    assert attention["w_q"].shard_shape((d, d)) == (d // fsdp, d // tensor)
    assert attention["w_o"].shard_shape((d, d)) == (d // tensor, d // fsdp)
    assert shardings.params["embedding"].shard_shape((v, d)) == (v // tensor, d // fsdp)
    assert layer["feed_forward_norm"]["scale"].shard_shape((d,)) == (d,)
    moments = shardings.opt_state[1][0]
    assert moments.mu == moments.nu == shardings.params


@pytest.mark.slow
def test_a_matrix_that_tensor_divides_is_never_gathered():
    """Of the optimised program: its gathers are of the parts that `fsdp` stores."""
    training = Training(CONFIG, MeshConfig(2, 2, 2))
    text = training.compiled().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    wholes = {
        tuple(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(training.state.params)
        if x.ndim == 2 and "tensor" in str(x.sharding.spec)
    }
    shapes = {tuple(map(int, shape.split(","))) for shape in gathered}
    assert shapes and len(wholes) == 5 and not shapes & wholes


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(init_params, tfm.Transformer(CONFIG)))(jax.random.PRNGKey(0))


def test_the_vocabulary_is_padded_and_what_is_beyond_it_never_predicted(params):
    padded = tfm.Transformer(CONFIG)
    plain = tfm.Transformer(dataclasses.replace(CONFIG, vocab_multiple=1))
    cut = meshes.fit_vocabulary(params, plain.config)
    assert params["embedding"].shape == (48, 32) and cut["embedding"].shape == (42, 32)
    assert params["output_bias"].shape == (48,) and cut["source_embedding"].shape == (34, 32)
    features = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    logits = padded.apply({"params": params}, features, method="logits")
    np.testing.assert_array_equal(logits[..., 42:], -np.inf)
    expected = plain.apply({"params": cut}, features, method="logits")
    np.testing.assert_allclose(logits[..., :42], expected, rtol=1e-6)
    back = meshes.fit_vocabulary(cut, padded.config)
    np.testing.assert_array_equal(back["embedding"][42:], 0)
    np.testing.assert_array_equal(back["embedding"][:42], params["embedding"][:42])


@pytest.mark.slow
def test_padding_changes_no_parameter_at_the_start():
    """Of an output matrix of its own too, whose deviation depends on its size."""
    config = dataclasses.replace(CONFIG, tied_output=False)
    one = dataclasses.replace(config, vocab_multiple=1)
    made = [
        jax.jit(partial(init_params, tfm.Transformer(c)))(jax.random.PRNGKey(0))
        for c in (config, one)
    ]
    cut = meshes.fit_vocabulary(made[0], one)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), cut, made[1])


@pytest.mark.gives_nan
def test_an_id_among_the_padding_is_no_word(params):
    model = tfm.Transformer(CONFIG)
    source = batch(0)["source"][:1]
    with pytest.raises(ValueError, match="argument target holds 42, outside the 42 ids"):
        model.apply({"params": params}, source, np.array([[42]]))
    traced = jax.jit(lambda ids: model.apply({"params": params}, source, ids))(np.array([[42]]))
    assert np.isnan(traced[..., :42]).all()


@pytest.mark.parametrize("over", ["all", "others", "others_but_padding"])
def test_padded_words_have_no_part_in_the_loss(over, rng):
    """Neither in the softmax nor in the smoothing, and no gradient."""
    logits, labels = rng.normal(size=(6, 42)).astype(np.float32), rng.integers(0, 42, 6)
    beyond = np.full((6, 22), -np.inf, np.float32)

    def loss(logits):
        return tfm.label_smoothed_cross_entropy(logits, labels, 0.1, over, vocab_size=42).sum()

    value, gradient = jax.value_and_grad(loss)(np.concatenate([logits, beyond], axis=1))
    expected, expected_gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :42], expected_gradient, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 42:], 0)


@pytest.mark.gives_nan
def test_an_id_outside_the_vocabulary_is_nan_on_a_mesh_too():
    table = jnp.arange(64.0).reshape(16, 4)
    ids = jnp.array([[0, 15, 16, -1]] * 8)
    with jax.set_mesh(meshes.make_mesh(MeshConfig(2, 2, 2))):
        rows = jax.jit(partial(tfm.embed, scale=False))(ids, table)
    np.testing.assert_array_equal(rows[:, :2], table[ids[:, :2]])
    assert np.isnan(rows[:, 2:]).all()


def test_without_a_mesh_nothing_is_divided():
    x = jnp.ones((4, 4))
    assert not sharding.is_divided()
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.gather_for_compute("w1", x) is x
    with jax.set_mesh(meshes.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        assert not sharding.is_divided()


def test_data_takes_the_devices_that_are_left():
    assert MeshConfig().over(8).sizes == {"data": 8, "fsdp": 1, "tensor": 1}
    assert MeshConfig(fsdp=2, tensor=2).over(8).sizes == {"data": 2, "fsdp": 2, "tensor": 2}
    assert MeshConfig(data=2).over(8).sizes == {"data": 2, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MeshConfig(data=3, tensor=4), "data=3 × fsdp=1 × tensor=4 asks for 12 devices, but 8 are"),
        (
            MeshConfig(tensor=16),
            "data=1 × fsdp=1 × tensor=16 asks for 16 devices, but 8 are visible",
        ),
        (MeshConfig(fsdp=3), "fsdp=3 × tensor=1 does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(config, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        config.over(8)


@pytest.mark.parametrize("axis", sharding.AXES)
def test_an_axis_of_no_devices_is_refused(axis):
    with pytest.raises(ValueError, match=f"{axis}=0 must be at least 1"):
        MeshConfig(**{axis: 0})


@pytest.mark.parametrize(
    ("mesh", "changes", "why"),
    [
        (MeshConfig(1, 1, 16), {}, "mesh.tensor=16 does not divide num_heads=8"),
        (MeshConfig(1, 1, 8), {"d_ff": 60}, "mesh.tensor=8 does not divide d_ff=60"),
        (MeshConfig(1, 1, 8), {"vocab_multiple": 1}, "mesh.tensor=8 does not divide vocab_size=42"),
        (MeshConfig(1, 64, 1), {}, "mesh.fsdp=64 does not divide d_model=32"),
        (MeshConfig(3, 2, 1), {}, "mesh.data=3 × mesh.fsdp=2 does not divide rows=16"),
    ],
)
def test_a_number_that_a_mesh_does_not_divide_is_named(mesh, changes, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        meshes.check_divides(dataclasses.replace(CONFIG, **changes), mesh, rows=ROWS)


def test_the_rows_of_a_micro_batch_are_what_is_divided():
    meshes.check_divides(CONFIG, MeshConfig(8, 1, 1), rows=16, accumulation=2)
    with pytest.raises(ValueError, match="rows=16 / accumulation=4"):
        meshes.check_divides(CONFIG, MeshConfig(8, 1, 1), rows=16, accumulation=4)
