"""Marian folders without torch and transformers: what goes out comes in again, and what is refused.

What the other library makes of them is in test_marian_parity.py.
"""

import dataclasses
import json
import subprocess
import sys

import bridging
import numpy as np
import pytest
from bridging import TEXT, assert_same, translator_of
from checks import assert_refuses
from safetensors.numpy import load_file, save_file

import tfm
from experiments.data.subwords import train_subwords
from experiments.interop.files import BridgeError, Folder
from experiments.interop.links import flat
from experiments.interop.marian import export_marian, import_marian
from experiments.interop.marian_model import refuse_what_marian_lacks


@pytest.fixture(scope="module")
def subwords():
    return train_subwords(TEXT, 280)


@pytest.fixture
def exported(subwords, tmp_path):
    export_marian(tmp_path, translator_of(subwords))
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sinusoid_layout": "halves", "activation": "swish", "projection_bias": True},
        {"tied_output": False, "output_bias": False, "compute_dtype": "bfloat16"},
        {"scale_embeddings": False, "dropout_rate": 0.3, "activation_dropout_rate": 0.1},
    ],
)
def test_export_then_import_is_the_identity_bit_for_bit(subwords, tmp_path, changes):
    translator = translator_of(subwords, **changes)
    export_marian(tmp_path, translator)
    assert_same(translator, import_marian(Folder(tmp_path)))


@pytest.mark.parametrize("size", [280, 281])
def test_so_it_is_with_a_vocabulary_a_side(subwords, tmp_path, size):
    target = train_subwords([line[::-1] for line in TEXT], size)
    translator = translator_of(subwords, target)
    export_marian(tmp_path, translator)
    assert_same(translator, import_marian(Folder(tmp_path)))


def test_a_note_with_a_former_name_is_read(exported):
    path = exported / "config.json"
    config = json.loads(path.read_text())
    del config["tfm"]["implementation"]
    config["tfm"]["attention"] = "chunked"
    path.write_text(json.dumps(config))
    assert import_marian(Folder(exported)).model.config.implementation == "chunked"


def test_import_then_export_is_the_identity_too(exported, subwords, tmp_path):
    """Of a folder without our note, as theirs are: the same tensors, ids and fields."""
    config = json.loads((exported / "config.json").read_text())
    del config["tfm"]
    (exported / "config.json").write_text(json.dumps(config))
    (second := tmp_path / "second").mkdir()
    export_marian(second, import_marian(Folder(exported)))
    before, after = (load_file(p / "model.safetensors") for p in (exported, second))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    again = json.loads((second / "config.json").read_text())
    assert again.pop("tfm")["sinusoid_layout"] == "halves"
    assert again == config
    for name in ("vocab.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (second / name).read_bytes()


def test_it_decodes_the_same_after_a_round_trip_of_another_layout(subwords, tmp_path):
    """Without the note the features come back in another order: the same function."""
    translator = translator_of(subwords)
    export_marian(tmp_path, translator)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tfm"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = import_marian(Folder(tmp_path))
    assert again.model.config.sinusoid_layout == "halves"
    pairs = [(text, text) for text in TEXT[:5]]
    one, other = ([s.log_probs for s in t.score(pairs)] for t in (translator, again))
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), rtol=0, atol=1e-4)


def test_padding_is_the_last_id_there(exported):
    """As in every Marian model: CTranslate2's converter of these counts on it."""
    config = json.loads((exported / "config.json").read_text())
    ids = json.loads((exported / "vocab.json").read_text())
    assert config["pad_token_id"] == ids["<pad>"] == 279
    assert (config["decoder_start_token_id"], config["eos_token_id"]) == (0, 1)
    assert (ids["<s>"], ids["</s>"], ids["<unk>"]) == (0, 1, 2)


def test_biases_trained_there_are_kept(exported):
    tensors = load_file(exported / "model.safetensors")
    tensors["model.encoder.layers.0.self_attn.q_proj.bias"][0] = 1
    save_file(tensors, exported / "model.safetensors")
    again = import_marian(Folder(exported))
    assert again.model.config.projection_bias
    assert flat(again.params)["encoder_0/attention/b_q"][0] == 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "bart", ["model_type='bart'"]),
        ("normalize_before", True, ["normalize_before=True"]),
        ("normalize_embedding", True, ["normalize_embedding=True"]),
        ("add_final_layer_norm", True, ["add_final_layer_norm=True"]),
        ("static_position_embeddings", False, ["static_position_embeddings=False"]),
        ("encoder_layerdrop", 0.1, ["encoder_layerdrop=0.1"]),
        ("activation_function", "gelu_new", ["activation_function='gelu_new'"]),
        ("decoder_attention_heads", 2, ["decoder_attention_heads=2", "encoder_attention_heads=4"]),
        ("decoder_ffn_dim", 64, ["decoder_ffn_dim=64", "encoder_ffn_dim=48"]),
        ("d_model", "many", ["d_model='many'"]),
        ("d_model", True, ["d_model=True"]),
        ("d_model", 33, ["model.shared.weight [280, 32], not [280, 33]"]),
        ("decoder_vocab_size", 7, ["decoder_vocab_size=7"]),
        ("decoder_start_token_id", 280, ["decoder_start_token_id=280"]),
        ("eos_token_id", [1, 2], ["eos_token_id=[1, 2]"]),
        ("eos_token_id", 5, ["eos_token_id", "</s>"]),
        ("dropout", 2.0, ["dropout_rate=2.0"]),
        ("encoder_layers", 10**9, ["encoder_layers=1000000000"]),
        ("decoder_layers", 0, ["decoder_layers=0"]),
        ("decoder_layers", 1, ["unknown", "model.decoder.layers.1"]),
        ("d_model", 10**9, ["model.shared.weight [280, 32], not [280, 1000000000]"]),
        ("tfm", {"sinusoid_layout": "tensor2tensor"}, ["tfm", "tensor2tensor"]),
        ("tfm", {"initializer": "zeros"}, ["tfm", "initializer='zeros'"]),
        ("tfm", {"settings": {"beam": 0}}, ["settings"]),
        ("tfm", {"settings": "none"}, ["settings"]),
    ],
)
def test_a_config_that_has_no_counterpart_is_refused_by_name_and_value(
    exported, field, value, words
):
    path = exported / "config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(config))
    assert_refuses(
        import_marian, Folder(exported), error=BridgeError, words=[str(exported), *words]
    )


@pytest.mark.parametrize("value", ["[]", "{", "null", '{"a": ' * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
def test_a_damaged_json_file_is_named(exported, name, value):
    path = exported / name
    path.write_bytes(value if isinstance(value, bytes) else value.encode())
    assert_refuses(import_marian, Folder(exported), error=BridgeError, words=[str(path)])


def _drop(tensors):
    del tensors["model.decoder.layers.1.encoder_attn.k_proj.weight"]


def _add(tensors):
    tensors["model.decoder.layers.9.fc1.weight"] = np.zeros((3, 4), np.float32)


def _reshape(tensors):
    tensors["model.encoder.layers.0.fc1.weight"] = np.zeros((48, 31), np.float32)


def _break(tensors):
    tensors["model.encoder.layers.0.fc1.bias"][3] = np.nan


def _another_head(tensors):
    tensors["lm_head.weight"] = tensors["model.shared.weight"] + 1


def _positions(tensors):
    tensors["model.encoder.embed_positions.weight"] = np.ones((8, 32), np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, ["missing", "model.decoder.layers.1.encoder_attn.k_proj.weight [32, 32]"]),
        (lambda t: t.pop("model.shared.weight"), ["missing", "model.shared.weight [280, 32]"]),
        (_add, ["unknown", "model.decoder.layers.9.fc1.weight [3, 4]"]),
        (_reshape, ["shape", "model.encoder.layers.0.fc1.weight [48, 31], not [48, 32]"]),
        (_break, ["finite", "model.encoder.layers.0.fc1.bias"]),
        (_another_head, ["lm_head.weight", "model.shared.weight", "differ"]),
        (_positions, ["model.encoder.embed_positions.weight [8, 32]", "sinusoids"]),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_shapes(exported, change, words):
    tensors = load_file(path := exported / "model.safetensors")
    change(tensors)
    save_file(tensors, path)
    assert_refuses(import_marian, Folder(exported), words=[str(path), *words], error=BridgeError)


def test_repeated_matrices_and_positions_that_fit_are_taken(exported):
    tensors = load_file(path := exported / "model.safetensors")
    before = flat(import_marian(Folder(exported)).params)
    for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        tensors[f"{name}.weight"] = tensors["model.shared.weight"].copy()
    del tensors["model.shared.weight"]
    positions = np.asarray(tfm.sinusoidal_positions(64, 32, "halves"))
    tensors["model.decoder.embed_positions.weight"] = positions
    save_file(tensors, path)
    after = flat(import_marian(Folder(exported)).params)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_weights_in_sixteen_bits_are_widened(exported):
    tensors = load_file(path := exported / "model.safetensors")
    save_file({n: t.astype(np.float16) for n, t in tensors.items()}, path)
    params = flat(import_marian(Folder(exported)).params)
    assert {array.dtype for array in params.values()} == {np.dtype(np.float32)}


def test_a_vocabulary_that_is_not_the_model_s_is_refused(exported):
    path = exported / "vocab.json"
    ids = json.loads(path.read_text())
    for change, words in [
        ({"▁small": 280}, ["id", "280"]),
        ({"more": 280}, ["'more' (280)", "280 ids"]),
        ({"more": 7}, ["several pieces"]),
        ({"▁small": "7"}, ["'▁small'", "'7'"]),
    ]:
        path.write_text(json.dumps(ids | change))
        assert_refuses(import_marian, Folder(exported), words=[str(path), *words])
    renamed = {("end" if piece == "</s>" else piece): i for piece, i in ids.items()}
    path.write_text(json.dumps(renamed))
    assert_refuses(import_marian, Folder(exported), words=[str(path), "</s>"])


def test_a_damaged_sentencepiece_file_is_named(exported):
    for content in (b"", b"nonsense", (exported / "source.spm").read_bytes()[:-2000]):
        (exported / "target.spm").write_bytes(content)
        assert_refuses(import_marian, Folder(exported), words=[str(exported / "target.spm")])


def test_what_marian_lacks_is_not_written(subwords, tmp_path):
    for field, value in [
        ("norm_placement", "pre"), ("final_norm", True), ("positions", "learned"),
        ("sinusoid_layout", "tensor2tensor"), ("first_position", 2), ("layer_norm_epsilon", 1e-6),
    ]:  # fmt: skip
        config = bridging.config_with(**{field: value})
        assert_refuses(
            refuse_what_marian_lacks, config, words=[f"{field}={value!r}"], error=BridgeError
        )
    translator = translator_of(subwords, layer_norm_epsilon=1e-6)
    assert_refuses(export_marian, tmp_path, translator, words=["layer_norm_epsilon=1e-06"])
    other = dataclasses.replace(subwords, pieces=("pad", *subwords.pieces[1:]))
    translator = translator_of(subwords, other)
    assert_refuses(export_marian, tmp_path, translator, words=["padding", "'pad'", "'<pad>'"])
    assert not list(tmp_path.iterdir())


def test_reading_and_writing_need_neither_torch_nor_transformers(exported):
    code = (
        "import sys; sys.modules |= {'torch': None, 'transformers': None};"
        "from pathlib import Path; from experiments.interop.files import Folder;"
        "from experiments.interop.marian import import_marian, export_marian;"
        "t = import_marian(Folder(Path(sys.argv[1])));"
        "out = Path(sys.argv[1]) / 'again'; out.mkdir(); export_marian(out, t)"
    )
    subprocess.run([sys.executable, "-c", code, exported], check=True)
    assert (exported / "again" / "model.safetensors").is_file()
