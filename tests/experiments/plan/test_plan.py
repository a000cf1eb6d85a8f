import re
import subprocess
import sys
from typing import get_args

import pytest

from experiments.plan import tables
from experiments.plan.chips import CHIPS
from experiments.plan.plan import ChipName, PlanConfig, defaults, work_of
from experiments.run import main
from tfm import BIG


def planned(capsys, *flags):
    main(["plan", *flags])
    return capsys.readouterr().out


def test_the_plan_of_big_on_eight_devices(capsys):
    out = planned(capsys, "--preset", "big", "--mesh.data", "8", "--price", "2")
    assert f"{BIG.parameter_count():,}" in out and "compiled" not in out
    for title in ("Memory of one device", "Matrix products", "Collectives", "Expected on 8 chips"):
        assert title in out
    for name in CHIPS:
        assert len(re.findall(rf"^{name} ", out, re.M)) == 3  # its times, its peaks, their source
    assert "parameters 857 MB" in re.sub(" +", " ", out)  # 4 · 214,171,648
    assert "300,000 steps" in out and "…" not in out


@pytest.mark.parametrize(
    "flags",
    [
        ("--price", "2"),
        ("--preset", "big", "--mesh.data", "8", "--mesh.tensor", "2", "--mesh.fsdp", "2",
         "--rows", "40960", "--model.rematerialize", "layers", "--accumulation", "2",
         "--steps", "1000000", "--price", "20"),
    ],
)  # fmt: skip
def test_nothing_is_cut_or_wrapped_at_80_columns(flags, capsys, monkeypatch):
    narrow = [line.rstrip() for line in planned(capsys, *flags).splitlines()]
    monkeypatch.setattr(tables, "WIDTH", 200)
    wide = [line.rstrip() for line in planned(capsys, *flags).splitlines()]
    assert narrow == wide and max(map(len, narrow)) <= 80


def test_flags_change_what_is_planned(capsys):
    out = planned(
        capsys, "--model.num-heads", "16", "--mesh.tensor", "16", "--rows", "64", "--chip", "L4",
        "--model.vocab-size", "37001", "--steps", "5", "--model.rematerialize", "layers",
        "--source-length", "16", "--target-length", "8", "--accumulation", "2",
    )  # fmt: skip
    assert "37,008" in out and "37,001 words, padded to a multiple of 16" in out
    assert "Expected on 16 chips" in out and "5 steps" in out and "H100" not in out
    assert "rematerialize=layers" in out and re.search(r"^ ?anew ", out, re.M)
    assert re.search(r"target positions +512 ", out)


def test_a_batch_that_does_not_fit_is_marked(capsys):
    out = planned(capsys, "--preset", "big", "--rows", "100000", "--chip", "L4")
    assert re.search(r"^ ?L4 +[\d,]+! ", out, re.M) and "!: 100,000 rows do not fit." in out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--mesh.tensor", "3"), "mesh.tensor=3 does not divide num_heads=8"),
        (("--mesh.data", "5"), "mesh.data=5 × mesh.fsdp=1 does not divide rows=192"),
        (("--accumulation", "5"), "accumulation=5 does not divide rows=192"),
        (("--rows", "0"), "rows=0 must be at least 1"),
        (("--price", "-1"), "price=-1.0 must be at least 0"),
        (("--mesh.fsdp", "0"), "fsdp=0 must be at least 1"),
        (("--assumed.products", "2"), "products=2.0 must be in (0, 1]"),
        (("--chip", "abacus"), "abacus"),
    ],
)
def test_impossible_flags_leave_with_2(capsys, flags, why):
    with pytest.raises(SystemExit) as left:
        main(["plan", *flags])
    told = capsys.readouterr()
    assert left.value.code == 2 and why in re.sub(r"[│\s]+", " ", told.out + told.err)


def test_chips_are_flags():
    assert set(get_args(ChipName)) == {"all", *CHIPS}


@pytest.mark.parametrize("preset", ["small", "base", "big"])
def test_presets_are_those_of_translate(preset):
    config = PlanConfig(**defaults(preset))
    assert config.compiles == (preset == "small")
    assert work_of(config).model.d_model == {"small": 256, "base": 512, "big": 1024}[preset]


@pytest.mark.slow
def test_a_small_model_is_compiled_beside_the_formulas():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "plan", "--preset", "small", "--mesh.data", "2",
         "--mesh.tensor", "2", "--rows", "16", "--model.vocab-size", "2000"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"compiled: args .* [\d,]+ B, as by formula", done.stdout)
    assert re.search(r"compiled: all-reduce tensor .*, as by formula", done.stdout)
    differs = re.search(r"compiled: temps .* [\d,]+ B, formula ([+-][\d.]+)%", done.stdout)
    assert abs(float(differs[1])) < 25
