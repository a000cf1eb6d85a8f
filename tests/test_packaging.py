"""requirements.txt (exact versions) and setup.cfg (ranges) speak of the same packages."""

import configparser
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def requirements(text: str) -> dict[str, Requirement]:
    lines = (line.strip() for line in text.splitlines())
    return {r.name: r for r in (Requirement(line) for line in lines if line and line[0] != "#")}


def test_tested_versions_lie_in_the_ranges_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    ranges = requirements(setup["options"]["install_requires"])
    ranges |= requirements(setup["options.extras_require"]["test"])
    exact = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert ranges.keys() == exact.keys()
    for name, requirement in exact.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert pin.version in ranges[name].specifier, name


def test_import_tfm_loads_nothing_of_weight():
    program = (
        "import sys, tfm; heavy = {'orbax', 'grain', 'matplotlib', 'tyro', 'tensorboardX', 'torch',"
        "'tensorflow', 'experiments'}; print(*heavy & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == ""
