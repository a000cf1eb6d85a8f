import json
import os
import stat
import sys
import zipfile

import numpy as np
import pytest
from checks import assert_refuses
from safetensors.numpy import save_file

from experiments.interop.files import (
    BridgeError,
    Folder,
    leaves_folder,
    new_folder,
    opened,
    read_tensors,
)


def test_names_that_leave_the_folder():
    for name in ("../a", "a/../../b", "/etc/passwd", "..", "", "a\\..\\..\\b", "\\a"):
        assert leaves_folder(name), name
    for name in ("a", "a/b.json", "..a", "a..b/c"):
        assert not leaves_folder(name), name


@pytest.fixture
def folder(tmp_path):
    (root := tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text("{}")
    return Folder(root)


def test_a_link_that_leaves_the_folder_is_refused(folder):
    (folder.root / "config.json").symlink_to("../secret.json")
    assert_refuses(folder.json, "config.json", words=[str(folder.root), "outside"])
    (folder.root / "inner.json").write_text("{}")
    (folder.root / "link.json").symlink_to("inner.json")
    assert folder.json("link.json") == {}
    (folder.root / "away").symlink_to("..")
    assert_refuses(folder.json, "away/secret.json", words=["outside"])


def test_the_hub_s_cache_is_one_folder(tmp_path):
    """Its snapshots link to the files of the same model beside them, and may; no further."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots"
    (snapshot / "1234").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "beef").write_text('{"a": 1}')
    (snapshot / "1234" / "config.json").symlink_to("../../blobs/beef")
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "1234" / "vocab.json").symlink_to("../../../secret.json")
    folder = Folder(snapshot / "1234")
    assert folder.json("config.json") == {"a": 1}
    assert_refuses(folder.json, "vocab.json", words=["outside"])


def test_what_is_missing_or_no_folder_is_named(folder):
    assert_refuses(folder.json, "config.json", words=[str(folder.root / "config.json"), "missing"])
    assert_refuses(folder.weights, words=[str(folder.root), "model.safetensors"])
    assert_refuses(Folder, folder.root / "no", words=[str(folder.root / "no")])


def test_shards_are_read_and_none_of_elsewhere(folder):
    root = folder.root
    save_file({"a": np.ones(2, np.float32)}, root / "one.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, root / "two.safetensors")
    save_file({"c": np.zeros(3, np.float32)}, root.parent / "else.safetensors")
    where = {"a": "one.safetensors", "b": "two.safetensors"}

    def index(more):
        content = json.dumps({"weight_map": where | more})
        (root / "model.safetensors.index.json").write_text(content)

    index({})
    assert {name: array.shape for name, array in folder.tensors().items()} == {
        "a": (2,), "b": (3,)
    }  # fmt: skip
    index({"c": "../else.safetensors"})
    assert_refuses(folder.tensors, words=["../else.safetensors", "outside"])
    index({"c": "two.safetensors"})
    assert_refuses(folder.tensors, words=["index.json", "c"])
    index({"c": 3})
    assert_refuses(folder.tensors, words=["index.json", "weight_map"])


def test_a_damaged_safetensors_file_is_named(folder):
    path = folder.root / "model.safetensors"
    for content in (b"", b"nonsense", b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        assert_refuses(folder.tensors, words=[str(path)], error=BridgeError)


def test_torch_s_files_need_torch(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (path := folder.root / "pytorch_model.bin").write_bytes(b"anything")
    assert_refuses(folder.tensors, words=[str(path), "torch is not installed"])


def archive(path, members):
    with zipfile.ZipFile(path, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def test_an_archive_is_a_folder_for_a_while(tmp_path):
    for prefix in ("", "model/"):
        path = archive(tmp_path / "model.zip", {f"{prefix}{n}.json": "{}" for n in "ab"})
        with opened(path) as folder:
            assert folder.json("a.json") == {}
        assert not folder.root.exists()


def test_an_archive_s_members_stay_inside(tmp_path):
    link = zipfile.ZipInfo("config.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name in ("../evil.json", "/evil.json", "a/../../evil.json", link):
        shown = name if isinstance(name, str) else name.filename
        path = archive(tmp_path / "model.zip", {"ok.json": "{}", name: "../secret"})
        with pytest.raises(BridgeError, match=shown.replace(".", r"\.")), opened(path):
            pass
    assert not list(tmp_path.rglob("evil.json"))


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), new_folder(path) as filled:
        (filled / "a").write_text("half")
        raise RuntimeError
    assert not path.exists() and not list(path.parent.iterdir())
    path.mkdir()  # an empty one may be there
    with new_folder(path) as filled:
        (filled / "a").write_text("all")
    assert (path / "a").read_text() == "all" and os.listdir(path.parent) == ["model"]
    with pytest.raises(BridgeError, match="not an empty folder"), new_folder(path):
        pass
    assert (path / "a").read_text() == "all"
    (tmp_path / "file").write_text("")
    with pytest.raises(BridgeError, match="not an empty folder"), new_folder(tmp_path / "file"):
        pass


def test_a_safetensors_file_in_bfloat16_is_read(tmp_path):
    import jax.numpy as jnp
    from safetensors.flax import save_file as save

    save({"a": jnp.array([1.5, -2], jnp.bfloat16)}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")["a"].astype(np.float32).tolist() == [1.5, -2]
