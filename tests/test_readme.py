"""What the README says runs, runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
CHANGING = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8")
FUNCTIONS = [block for block in BLOCKS if "runs/" not in block]


@pytest.mark.parametrize("block", FUNCTIONS, ids=lambda block: block.split("\n")[3][:20])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_page_on_changes_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", CHANGING, flags=re.S)
    quick = [block for block in blocks if "study" not in block]
    assert len(quick) > 5
    exec(compile("\n".join(quick), "changing.md", "exec"), {})


@pytest.mark.slow
def test_the_page_compares_an_idea_over_seeds(capsys):
    blocks = re.findall(r"```python\n(.*?)```", CHANGING, flags=re.S)
    (study,) = (block for block in blocks if "study" in block)
    study = study.replace("steps, seeds = study.pronunciation(), 200, 8",
                          "steps, seeds = study.pronunciation(), 20, 2")  # fmt: skip
    assert "20, 2" in study
    (rms,) = (block for block in blocks if "class RMSNorm" in block)
    quick = [blocks[0], rms.split("class RelativeBias")[0], study.split("\n", 1)[1]]
    exec(compile("\n".join(quick), "changing.md", "exec"), {})
    assert re.search(r"better by [+-]\d\.\d+ nats a sound, 95 % \[", capsys.readouterr().out)


def test_every_function_of_the_table_exists():
    import tfm

    names = re.findall(r"`tfm\.(\w+)", README + CHANGING)
    assert len(names) > 11
    assert not [name for name in names if not hasattr(tfm, name)]


def test_parameter_counts_are_those_of_the_presets():
    import tfm

    for name in ("BASE", "BIG"):
        count = f"{getattr(tfm, name).parameter_count():,}"
        assert re.search(rf"`tfm\.{name}` \| {count} \|", README), (name, count)


def test_every_flag_of_the_readme_is_a_flag_of_its_experiment():
    import dataclasses

    from experiments.bench.cost import CostConfig
    from experiments.bench.device.config import DeviceConfig
    from experiments.bench.referee import BenchConfig
    from experiments.claims.ledger import ClaimsConfig
    from experiments.distributed.cluster import ClusterConfig
    from experiments.inference.predict_config import PredictConfig
    from experiments.inference.score import ScoreConfig
    from experiments.interop.convert import ExportConfig, ImportConfig
    from experiments.plan.plan import PlanConfig
    from experiments.pronounce.task import PronounceConfig
    from experiments.reporting.variants import VariantsConfig
    from experiments.translate.config import TranslateConfig

    names = ("translation.md", "scaling.md", "performance.md", "changing.md")
    pages = [ROOT / "docs" / name for name in names]
    text = "\n".join([README, *(page.read_text(encoding="utf-8") for page in pages)])
    lines = re.findall(r"python -m experiments\.run(.*)", text.replace("\\\n", ""))
    assert len(lines) > 4
    configs = {
        "predict": PredictConfig, "claims": ClaimsConfig, "bench": BenchConfig, "cost": CostConfig,
        "import": ImportConfig, "export": ExportConfig, "translate": TranslateConfig,
        "score": ScoreConfig, "variants": VariantsConfig, "plan": PlanConfig,
    }  # fmt: skip
    for line in lines:
        config = configs.get(line.split()[0] if line.split() else "", PronounceConfig)
        if config is BenchConfig and " --device" in line:  # it chooses other flags
            line, config = line.replace(" --device", ""), DeviceConfig
        # The cluster's flags go without its name: `experiments.run`.
        both = (*dataclasses.fields(config), *dataclasses.fields(ClusterConfig))
        fields = {field.name.replace("_", "-"): field for field in both}
        for flag, inner in re.findall(r"(?<= )--([a-z0-9-]+)(?:\.([a-z0-9-]+))?", line):
            assert flag in fields.keys() | {"help"}, f"--{flag}"
            if inner:
                known = {f.name.replace("_", "-") for f in dataclasses.fields(fields[flag].default)}
                assert inner in known, f"--{flag}.{inner}"


def test_the_lines_that_load_a_model_run(tmp_path, monkeypatch, capsys):
    import jax

    from experiments.checkpoints.checkpoint import Checkpoints
    from experiments.checkpoints.run_folder import plain, write_json
    from experiments.pronounce.task import PronounceConfig
    from tfm import Transformer, TransformerConfig, init_state, make_optimizer

    (block,) = set(BLOCKS) - set(FUNCTIONS)
    run = tmp_path / "runs" / "pronounce"
    run.mkdir(parents=True)
    letters, phones = list("abcdefghijklmnopqrstuvwxyz"), ["AH", "N"]
    model = TransformerConfig(
        vocab_size=5, source_vocab_size=29, d_model=8, d_ff=8, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    identity = plain(PronounceConfig(model=model))
    write_json(run / "config.json", identity)
    identity["vocabularies"] = {"letters": letters, "phones": phones}
    optimizer = make_optimizer(lambda _: 0.1, 1.0)
    with Checkpoints(run / "checkpoints") as checkpoints:
        state = init_state(Transformer(model), optimizer, jax.random.PRNGKey(0))
        checkpoints.save(1, state, {"identity": identity})
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and set(" ".join(said).split()) <= set(phones)
