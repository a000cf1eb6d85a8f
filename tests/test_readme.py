"""What the README says runs, runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
FUNCTIONS = [block for block in BLOCKS if "runs/" not in block]


@pytest.mark.parametrize("block", FUNCTIONS, ids=lambda block: block.split("\n")[3][:20])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_every_function_of_the_table_exists():
    import tfm

    names = re.findall(r"`tfm\.(\w+)", README)
    assert len(names) > 11
    assert not [name for name in names if not hasattr(tfm, name)]


def test_parameter_counts_are_those_of_the_presets():
    import tfm

    for name in ("BASE", "BIG"):
        count = f"{getattr(tfm, name).parameter_count():,}"
        assert re.search(rf"`tfm\.{name}` \| {count} \|", README), (name, count)


def test_every_flag_of_the_readme_is_a_flag():
    import dataclasses

    from experiments.predict import PredictConfig
    from experiments.tasks.pronounce import PronounceConfig

    fields = {
        field.name.replace("_", "-")
        for config in (PronounceConfig, PredictConfig)
        for field in dataclasses.fields(config)
    }
    for line in re.findall(r"python -m experiments\.run(.*)", README):
        for flag in re.findall(r"(?<= )--([a-z-]+)", line):
            assert flag in fields | {"help"}, f"--{flag}"
