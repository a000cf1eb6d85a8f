"""State dicts without torch: every name finds its place, or is told. See test_torch_parity.py."""

import bridging
import numpy as np
import pytest
from bridging import state_dict
from checks import assert_refuses
from safetensors.numpy import save_file

import tfm
from experiments.interop.files import BridgeError
from experiments.interop.torch_transformer import TorchOptions, read_model

OPTIONS = {"num_heads": 4, "sinusoid_layout": "interleaved"}


@pytest.fixture
def arrays():
    config = bridging.config_with(
        final_norm=True, projection_bias=True, tied_output=False, source_vocab_size=30
    )
    return bridging.random_arrays(config, 1)


@pytest.fixture
def state(arrays):
    return state_dict(arrays) | {
        "src_emb.weight": arrays["source_embedding"], "tgt_emb.weight": arrays["embedding"],
        "generator.weight": arrays["output"].T, "generator.bias": arrays["output_bias"],
    }  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read(state, **options):
        path = tmp_path / "model.safetensors"
        save_file({n: np.ascontiguousarray(a) for n, a in state.items()}, path)
        return read_model(path, TorchOptions(**(OPTIONS | options)))

    return read


def test_every_array_finds_its_place(arrays, state, read):
    found = read(state)
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].tobytes() == array.tobytes(), name
    c = found.config
    assert (c.d_model, c.d_ff, c.num_heads, c.vocab_size, c.source_vocab_size) == (
        32, 48, 4, 40, 30
    )  # fmt: skip
    assert c.final_norm and c.projection_bias and c.output_bias and not c.tied_output


def test_padding_goes_to_the_front_with_its_rows(arrays, state, read):
    found = read(state, pad=5, source_pad=2, source_eos=3)
    order = [5, 0, 1, 2, 3, 4, *range(6, 40)]
    assert found.target_order.tolist() == order
    np.testing.assert_array_equal(found.arrays["embedding"], arrays["embedding"][order])
    np.testing.assert_array_equal(found.arrays["output"], arrays["output"][:, order])
    np.testing.assert_array_equal(found.arrays["output_bias"], arrays["output_bias"][order])
    own = [2, 0, 1, *range(3, 30)]
    np.testing.assert_array_equal(found.arrays["source_embedding"], arrays["source_embedding"][own])


def test_what_is_one_matrix_is_one(arrays, state, read):
    state |= {"src_emb.weight": state["tgt_emb.weight"]}
    assert read(state).config.source_vocab_size is None
    assert read(state, source_pad=1).config.source_vocab_size == 40  # other ids: two after all
    state |= {"generator.weight": state["tgt_emb.weight"]}
    found = read(state)
    assert found.config.tied_output and "output" not in found.arrays
    del state["src_emb.weight"], state["generator.weight"], state["generator.bias"]
    found = read(state)
    assert found.config.tied_output and found.config.source_vocab_size is None
    assert not found.config.output_bias


@pytest.mark.parametrize("layout", ["interleaved", "halves", "tensor2tensor"])
def test_positions_of_a_formula_are_recognised(state, read, layout):
    table = np.asarray(tfm.sinusoidal_positions(60, 32, layout))
    for shape in ((60, 32), (1, 60, 32), (60, 1, 32)):
        found = read(state | {"pos.pe": table.reshape(shape)}, sinusoid_layout=None)
        assert (found.config.positions, found.config.sinusoid_layout) == ("sinusoidal", layout)
        assert found.positions == 60
    other = "halves" if layout == "interleaved" else "interleaved"
    assert_refuses(
        lambda: read(state | {"pos.pe": table}, sinusoid_layout=other), words=[layout, other]
    )


def test_positions_of_no_formula_are_learned(state, read):
    tables = {f"{s}.pos_embedding.weight": np.full((20, 32), i, np.float32)
              for i, s in enumerate(("encoder", "decoder"))}  # fmt: skip
    found = read(state | tables, sinusoid_layout=None)
    assert (found.config.positions, found.config.max_learned_positions) == ("learned", 20)
    assert found.arrays["source_positions"].max() == 0
    assert found.arrays["target_positions"].min() == 1
    tables["decoder.pos_embedding.weight"] = np.ones((21, 32), np.float32)
    assert_refuses(lambda: read(state | tables, sinusoid_layout=None), words=["two lengths", "21"])


def test_names_that_do_not_tell_are_asked_for(state, read):
    renamed = {"a_emb.weight": "src_emb.weight", "b_emb.weight": "tgt_emb.weight",
               "c.weight": "generator.weight", "c.bias": "generator.bias"}  # fmt: skip
    odd = {new: state.pop(old) for new, old in renamed.items()}
    assert_refuses(lambda: read(state | odd), words=["source embedding", "a_emb.weight [30, 32]",
                                                     "--torch.source-embedding"])  # fmt: skip
    found = read(state | odd, source_embedding="a_emb.weight", target_embedding="b_emb.weight")
    assert found.config.source_vocab_size == 30
    odd["d.weight"] = odd["c.weight"] + 1
    named = {"source_embedding": "a_emb.weight", "target_embedding": "b_emb.weight"}
    assert_refuses(lambda: read(state | odd, **named), words=["output", "--torch.output"])
    assert_refuses(lambda: read(state, output="nowhere"), words=["nowhere", "no such tensor"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("transformer.decoder.layers.1.linear2.weight"),
         ["missing", "transformer.decoder.layers.1.linear2.weight [32, 48]"]),
        (lambda s: s.update({"extra": np.ones((2, 3), np.float32)}), ["unknown", "extra [2, 3]"]),
        (lambda s: s.update({"transformer.encoder.layers.0.norm1.weight": np.ones(31, np.float32)}),
         ["shape", "norm1.weight [31], not [32]"]),
        (lambda s: s.update({"transformer.encoder.layers.0.norm1.weight":
                             np.full(32, np.inf, np.float32)}), ["finite", "norm1.weight"]),
        (lambda s: [s.pop(f"transformer.encoder.norm.{n}") for n in ("weight", "bias")],
         ["final norm", "decoder"]),
        (lambda s: [s.pop(n) for n in list(s) if "encoder.layers.0" in n],
         ["no encoder.layers.0.self_attn.in_proj_weight"]),
        (lambda s: [s.pop(n) for n in list(s) if "decoder.layers.0" in n], ["decoder", "[1]"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named_with_their_shapes(state, read, change, words):
    change(state)
    assert_refuses(lambda: read(state), words=words, error=BridgeError)


def test_options_that_do_not_fit_are_named(state, read):
    for options, words in [
        ({"num_heads": 5}, ["num_heads=5"]), ({"pad": 40}, ["pad=40"]),
        ({"eos": -1}, ["eos=-1"]), ({"source_pad": 30}, ["source_pad=30"]),
        ({"sinusoid_layout": None}, ["--torch.sinusoid-layout"]),
        ({"pad": 35}, ["source_pad=35"]),
    ]:  # fmt: skip
        assert_refuses(lambda options=options: read(state, **options), words=words)
