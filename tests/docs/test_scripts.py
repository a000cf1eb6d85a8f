"""The scripts that made a table of the docs each: they still fit the packages that they import."""

import ast
import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from docs.scripts import calls
from docs.scripts.libreoffice import split

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docs" / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_of_ours_exists(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in found if node.module.split(".")[0] in ("experiments", "tfm")]
    missing = [
        f"{node.module}.{name.name}"
        for node in ours
        for name in node.names
        if not hasattr(importlib.import_module(node.module), name.name)
    ]
    assert not missing


def test_every_command_of_the_docs_names_a_script():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"-m docs\.scripts\.([a-z_]+)", pages))
    assert named == {path.stem for path in SCRIPTS} - {"torch_translation"}  # that peer's model


def test_a_page_is_on_one_side_and_held_out_text_is_not_learned():
    pages = [(f"page{i}", f"s{i}", f"t{i}") for i in range(2000)]
    copies = [(f"other{i}", f"s{i}", "another translation") for i in range(2000)]
    sides = split(pages + copies + pages)
    sources = {name: {source for source, _ in pairs} for name, pairs in sides.items()}
    assert all(sources.values())
    assert not sources["train"] & (sources["test"] | sources["valid"])
    assert not sources["test"] & sources["valid"]
    assert all(len(pairs) == len(set(pairs)) for pairs in sides.values())


ARRAYS, HEADS = calls._arrays(2, 3, 8, 2), 2
SAME_SHAPE = "multi-head attention", "feed-forward", "layer norm", "dropout", "embedding", "loss"


def test_calls_of_linen_do_the_same_work():
    ours, linen = calls.ours(ARRAYS, HEADS), calls.linen(ARRAYS, HEADS)
    assert list(ours) == list(linen)
    for name in SAME_SHAPE:
        shapes = [jax.eval_shape(f, *given).shape for f, given in (ours[name], linen[name])]
        assert shapes[0] == shapes[1], name


def test_calls_of_torch_do_too():
    pytest.importorskip("torch", reason="needs requirements-bench.txt")
    ours, torch = calls.ours(ARRAYS, HEADS), calls.torch_calls(ARRAYS, HEADS)
    assert list(ours) == list(torch)
    for name in ("attention", "loss"):
        function, arguments = ours[name]
        found, expected = np.ravel(function(*arguments)), np.ravel(torch[name]())
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
