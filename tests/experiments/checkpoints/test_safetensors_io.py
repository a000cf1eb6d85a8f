import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import tfm
from experiments.checkpoints.safetensors_io import export_params, import_params
from tfm.training import init_params

MODEL = tfm.Transformer(
    tfm.TransformerConfig(
        vocab_size=11, d_model=8, d_ff=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
    )
)


@pytest.fixture
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture
def file(tmp_path, params):
    export_params(tmp_path / "params.safetensors", params, {"from": "a test"})
    return tmp_path / "params.safetensors"


def test_what_is_imported_is_what_was_exported(file, params):
    like = jax.eval_shape(lambda: params)
    imported = import_params(file, like)
    assert jax.tree.structure(imported) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, imported, params)


def test_short_types_survive(tmp_path):
    params = {"a": {"b": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}, "c": jnp.int32(7)}
    export_params(tmp_path / "p", params)
    imported = import_params(tmp_path / "p", params)
    assert imported["a"]["b"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, imported, params)


def test_other_arrays_are_refused_by_name(file, params):
    name = "decoder_0"
    others = {
        "w: not known": params | {name: {}},
        "missing": params | {"extra": jnp.zeros(1)},
    }
    with pytest.raises(ValueError, match=rf"{file}: {name}.* is \('F32', .*, not known"):
        import_params(file, others["w: not known"])
    with pytest.raises(ValueError, match=r"extra is missing, not \('F32', \(1,\)\)"):
        import_params(file, others["missing"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match="F32.*not.*BF16"):
        import_params(file, half)


def test_a_double_is_not_cut_to_a_float_in_silence(tmp_path):
    save_file({"w": np.ones(3)}, tmp_path / "p")
    with pytest.raises(ValueError, match=r"w is \('F64', \(3,\)\), not \('F32', \(3,\)\)"):
        import_params(tmp_path / "p", {"w": jnp.zeros(3)})


@pytest.mark.parametrize("damage", [b"", b"\x80\x04\x95", b"{}"])
def test_what_is_no_such_file_is_named(tmp_path, params, damage):
    (tmp_path / "p").write_bytes(damage)
    with pytest.raises(ValueError, match=f"{tmp_path / 'p'}: not a safetensors file"):
        import_params(tmp_path / "p", params)
    with pytest.raises(ValueError, match=f"{tmp_path / 'absent'}: No such file"):
        import_params(tmp_path / "absent", params)
