"""Import and export as a user does them: from files to a run folder, and back."""

import json
import shutil
import sys
import types
import zipfile

import bridging
import pytest
from bridging import TEXT, assert_same, state_dict, translator_of
from checks import assert_refuses
from safetensors.numpy import save_file

from experiments.data.subwords import train_subwords
from experiments.inference.saved import load, write
from experiments.interop.convert import (
    ExportConfig,
    ImportConfig,
    Vocabularies,
    run_export,
    run_import,
)
from experiments.interop.files import BridgeError
from experiments.interop.torch_transformer import TorchOptions


@pytest.fixture(scope="module")
def subwords():
    return train_subwords(TEXT, 280)


@pytest.fixture
def run(subwords, tmp_path):
    """A run folder of translation, of a random model."""
    write(tmp_path / "run", translator_of(subwords), {"imported_from": "a test"})
    return tmp_path / "run"


def test_out_and_in_again_is_the_same_run(run, tmp_path, capsys):
    out, again = tmp_path / "marian", tmp_path / "again"
    run_export(ExportConfig(run=run, path=out))
    said = capsys.readouterr().out
    assert str(out) in said and "n^α" in said  # the run ranks by the paper's penalty
    run_import(ImportConfig(path=str(out), run=again))
    assert_same(load(run), load(again))
    about = json.loads((again / "config.json").read_text())["about"]
    assert about["imported_from"] == str(out) and len(about["sha256"]) == 64


def test_an_archive_is_imported(run, tmp_path):
    run_export(ExportConfig(run=run, path=tmp_path / "marian"))
    shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path / "marian")
    run_import(ImportConfig(path=str(tmp_path / "model.zip"), run=tmp_path / "again"))
    assert_same(load(run), load(tmp_path / "again"))
    with zipfile.ZipFile(tmp_path / "model.zip", "a") as archive:
        archive.writestr("../evil.json", "{}")
    config = ImportConfig(path=str(tmp_path / "model.zip"), run=tmp_path / "third")
    assert_refuses(run_import, config, words=["../evil.json", "outside"], error=BridgeError)
    assert not (tmp_path / "third").exists()


def test_nothing_that_is_there_is_overwritten(run, tmp_path):
    (full := tmp_path / "full").mkdir()
    (full / "mine").write_text("kept")
    for function, config in (
        (run_export, ExportConfig(run=run, path=full)),
        (run_import, ImportConfig(path="anything", run=full)),
    ):
        assert_refuses(function, config, words=[str(full), "not an empty folder"])
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_a_model_that_the_other_library_lacks_leaves_no_folder(subwords, tmp_path):
    write(tmp_path / "run", translator_of(subwords, norm_placement="pre"), {})
    config = ExportConfig(run=tmp_path / "run", path=tmp_path / "out" / "marian")
    assert_refuses(run_export, config, words=["norm_placement='pre'"], error=BridgeError)
    assert not list((tmp_path / "out").iterdir())
    config = ExportConfig(run=tmp_path / "run", path=tmp_path / "new", int8=True)
    assert_refuses(run_export, config, words=["--int8", "ctranslate2"], error=BridgeError)


def test_ctranslate2_is_asked_for_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    config = ExportConfig(run=run, path=tmp_path / "out", format="ctranslate2")
    assert_refuses(run_export, config, words=["ctranslate2 is not installed", "[interop]"])
    assert not (tmp_path / "out").exists()


def test_what_is_no_folder_is_asked_of_the_hub(run, tmp_path, monkeypatch):
    run_export(ExportConfig(run=run, path=tmp_path / "marian"))
    config = ImportConfig(path="somebody/a-model", run=tmp_path / "again")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = ["somebody/a-model", "huggingface_hub is not installed"]
    assert_refuses(run_import, config, words=words, error=BridgeError)

    def offline(*_, **__):
        raise OSError("no network\nand a long story")

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline)
    )
    words = ["somebody/a-model", "no network"]
    assert_refuses(run_import, config, words=words, error=BridgeError)

    def download(name, local_dir, allow_patterns):
        assert name == "somebody/a-model"
        shutil.copytree(tmp_path / "marian", local_dir, dirs_exist_ok=True)

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download)
    )
    run_import(config)
    assert_same(load(run), load(tmp_path / "again"))
    assert_refuses(
        run_import, ImportConfig(path="no such folder", run=tmp_path / "x"), words=["not a folder"]
    )


def test_a_torch_model_comes_with_its_vocabulary(subwords, tmp_path):
    config = bridging.config_with(
        vocab_size=subwords.size, projection_bias=True, tied_output=False, sinusoid_layout="halves"
    )
    arrays = bridging.random_arrays(config, 1)
    state = state_dict(arrays) | {
        "embedding.weight": arrays["embedding"], "generator.weight": arrays["output"].T,
        "generator.bias": arrays["output_bias"],
    }  # fmt: skip
    path, spm = tmp_path / "model.safetensors", tmp_path / "both.spm"
    save_file({name: array.copy(order="C") for name, array in state.items()}, path)
    spm.write_bytes(subwords.model)
    options = TorchOptions(num_heads=4, sinusoid_layout="halves")
    given = ImportConfig(
        path=str(path), run=tmp_path / "run", format="torch", torch=options,
        vocabulary=Vocabularies(source_spm=spm, length=40),
    )  # fmt: skip
    run_import(given)
    found = load(tmp_path / "run")
    assert found.target.sha256 == subwords.sha256 and found.settings.source_length == 40
    assert found.model.config.tied_output is False and found.model.config.final_norm is False
    assert found([TEXT[0]])

    pieces = {piece: i for i, piece in enumerate(reversed(subwords.pieces))}
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    last = subwords.size - 1
    options = TorchOptions(
        num_heads=4, sinusoid_layout="halves", pad=last, bos=last - 1, eos=last - 2, unk=last - 3
    )
    vocabulary = Vocabularies(source_spm=spm, source_pieces=tmp_path / "vocab.json")
    again = ImportConfig(
        path=str(path), run=tmp_path / "again", format="torch", torch=options, vocabulary=vocabulary
    )
    run_import(again)
    target = load(tmp_path / "again").target
    assert target.pieces[0] == "<pad>" and target.pieces[target.eos] == "</s>"

    bare = ImportConfig(path=str(path), run=tmp_path / "x", format="torch", torch=options)
    assert_refuses(run_import, bare, words=["--vocabulary.source-spm"], error=BridgeError)
    (tmp_path / "vocab.json").write_text(json.dumps(dict(list(pieces.items())[1:])))
    third = ImportConfig(
        path=str(path), run=tmp_path / "x", format="torch", torch=options, vocabulary=vocabulary
    )
    assert_refuses(run_import, third, words=["vocab.json", "280 ids"], error=BridgeError)
    assert not (tmp_path / "x").exists()
