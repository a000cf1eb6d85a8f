"""requirements.txt (exact versions) and setup.cfg (ranges) speak of the same packages."""

import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tfm import jax_versions

ROOT = Path(__file__).parents[1]


def requirements(text: str, python: str = "3.11") -> dict[str, Requirement]:
    """name -> what is asked of it under that Python."""
    lines = (line.strip() for line in text.splitlines())
    asked = [Requirement(line) for line in lines if line and line[0] != "#"]
    return {
        r.name: r for r in asked if not r.marker or r.marker.evaluate({"python_version": python})
    }


def ranges() -> dict[str, Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    found = requirements(setup["options"]["install_requires"])
    return found | requirements(setup["options.extras_require"]["test"])


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_tested_versions_lie_in_the_ranges_of_setup_cfg(python):
    exact = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8"), python)
    assert ranges().keys() == exact.keys()
    for name, requirement in exact.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert pin.version in ranges()[name].specifier, name


def test_the_range_of_jax_is_the_one_that_the_import_checks():
    assert ranges()["jax"].specifier == SpecifierSet(jax_versions.RANGE)


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
