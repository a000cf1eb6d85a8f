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


ZEROS, FLOATS = {"a": {"w": jnp.zeros(3)}}, {"a/w": np.zeros(3, np.float32)}
REFUSED = {  # content of the file (bytes or arrays; None: no file), what is wanted, words
    "missing": (FLOATS, ZEROS | {"x": jnp.zeros(1)}, r"x is missing, not \('F32', \(1,\)\)"),
    "unknown": (FLOATS, {"a": {}}, r"a/w is \('F32', .*, not known"),
    "other type": (FLOATS, {"a": {"w": jnp.zeros(3, jnp.bfloat16)}}, "a/w is .*F32.*not.*BF16"),
    "double": ({"a/w": np.zeros(3)}, ZEROS, r"a/w is \('F64', \(3,\)\), not \('F32', \(3,\)\)"),
    "empty": (b"", ZEROS, "not a safetensors file"),
    "pickle": (b"\x80\x04\x95", ZEROS, "not a safetensors file"),
    "JSON": (b"{}", ZEROS, "not a safetensors file"),
    "no file": (None, ZEROS, "No such file"),
}


@pytest.mark.parametrize(("content", "wanted", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, content, wanted, words):
    path = tmp_path / "p"
    if isinstance(content, dict):
        save_file(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: {words}"):
        import_params(path, wanted)
