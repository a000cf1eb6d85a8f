"""The command line: `python -m experiments.run [EXPERIMENT] [flags]`."""

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from typing import Any

from experiments.errors import exit_code, told_in_one_line
from experiments.streams import Talk

EXPERIMENTS = {
    "pronounce": "Train a Transformer to pronounce words, and report on it (the default).",
    "translate": "Train a Transformer to translate on your own text, and report on it.",
    "claims": "Measure eleven claims about the Transformer; a ledger with verdicts and figures.",
    "bench": "Time this library beside the peers that are installed; ratios and a picture.",
    "cost": "Measure what a token costs by width, depth, length and batch; a law and a picture.",
    "plan": "Say what a training would need on devices not at hand, and how fast it should be.",
    "variants": "Say what differs between the models that bear the paper's name.",
    "predict": "Pronounce or translate standard input with a trained model, line for line.",
    "score": "Give the log-probability of translations on standard input.",
    "import": "Take over a translation model of another library (Marian, torch.nn.Transformer).",
    "export": "Write a translation model for another library (Marian, CTranslate2).",
}


def usage() -> str:
    """The answer to --help: every experiment with one sentence."""
    lines = [f"  {name:<12}{sentence}" for name, sentence in EXPERIMENTS.items()]
    return "\n".join(
        ["usage: python -m experiments.run [EXPERIMENT] [flags]", "", "experiments:", *lines, "",
         "No experiment means pronounce: `python -m experiments.run` trains it in minutes.",
         "Flags of one experiment: python -m experiments.run EXPERIMENT --help"]
    )  # fmt: skip


def _plain_cluster_flags(arguments: list[str]) -> list[str]:
    """`--coordinator` for `--cluster.coordinator`, and so on."""
    names = "coordinator|process-id|num-processes|connect-timeout|heartbeat-timeout|stall-timeout"
    return [re.sub(rf"^--({names})(?==|$)", r"--cluster.\1", a) for a in arguments]


def _current_flags(arguments: list[str]) -> list[str]:
    """Flags of former names under their present ones, which a line on standard error names."""
    current = []
    for argument in arguments:
        renamed = re.sub(r"^--model[.]attention(?==|$)", "--model.implementation", argument)
        if renamed != argument:
            print("note: --model.attention is called --model.implementation now", file=sys.stderr)
        before = current[-1] if current else ""
        if before == "--model.implementation" or renamed.startswith("--model.implementation="):
            renamed = re.sub(r"(^|=)reference$", r"\1formula", renamed)
        current.append(renamed)
    return current


def pronounce(arguments: list[str]) -> None:
    """Parses the flags over the chosen preset, and runs the task."""
    import tyro

    from experiments.pronounce.task import PRESETS, run

    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=list(PRESETS), default="default")
    chosen = preset.parse_known_args(arguments)[0].preset
    config = tyro.cli(
        type(PRESETS[chosen]), default=PRESETS[chosen], args=_plain_cluster_flags(arguments),
        prog="python -m experiments.run pronounce",
    )  # fmt: skip
    run(config)


def translate(arguments: list[str]) -> None:
    """Parses the flags over the chosen preset and variant, and runs the task."""
    import tyro

    from experiments.translate.config import TranslateConfig, configured
    from experiments.translate.task import run
    from tfm.variants import VARIANTS

    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", choices=("small", "base", "big"), default="small")
    chosen.add_argument("--variant", choices=list(VARIANTS), default="paper")
    known = chosen.parse_known_args(arguments)[0]
    # "from" is a word of Python's, and cannot be a field.
    arguments = [re.sub(r"^--from(?==|$)", "--from-run", a) for a in arguments]
    config = tyro.cli(
        TranslateConfig, default=TranslateConfig(**configured(known.preset, known.variant)),
        args=_plain_cluster_flags(arguments), prog="python -m experiments.run translate",
    )  # fmt: skip
    run(config)


def plan(arguments: list[str]) -> None:
    """Parses the flags over the chosen preset, and prints the plan."""
    import tyro

    from experiments.plan.plan import PlanConfig, defaults, run

    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", choices=("small", "base", "big"), default="base")
    preset = chosen.parse_known_args(arguments)[0].preset
    config = tyro.cli(
        PlanConfig, default=PlanConfig(**defaults(preset)), args=arguments,
        prog="python -m experiments.run plan",
    )  # fmt: skip
    run(config)


def variants(arguments: list[str]) -> None:
    """Parses the names, and prints the table of differences."""
    import tyro

    from experiments.reporting.variants import VariantsConfig, run

    positional = tyro.conf.Positional[VariantsConfig]
    run(tyro.cli(positional, args=arguments, prog="python -m experiments.run variants"))


def predict(arguments: list[str]) -> None:
    """Parses the flags, and pronounces or translates standard input."""
    import tyro

    from experiments.inference.predict import run
    from experiments.inference.predict_config import PredictConfig

    run(tyro.cli(PredictConfig, args=arguments, prog="python -m experiments.run predict"))


def score(arguments: list[str]) -> None:
    """Parses the flags, and scores the translations on standard input."""
    import tyro

    from experiments.inference.score_sentences import ScoreConfig, run

    run(tyro.cli(ScoreConfig, args=arguments, prog="python -m experiments.run score"))


def import_(arguments: list[str]) -> None:
    """Parses the flags, and makes a run folder of another library's model."""
    import tyro

    from experiments.interop.convert import ImportConfig, run_import

    run_import(tyro.cli(ImportConfig, args=arguments, prog="python -m experiments.run import"))


def export(arguments: list[str]) -> None:
    """Parses the flags, and writes a run's model as another library has it."""
    import tyro

    from experiments.interop.convert import ExportConfig, run_export

    run_export(tyro.cli(ExportConfig, args=arguments, prog="python -m experiments.run export"))


def claims(arguments: list[str]) -> None:
    """Parses the flags, and measures the ledger."""
    import jax
    import tyro

    from experiments.claims.ledger import ClaimsConfig, run

    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # trainings side by side
    run(tyro.cli(ClaimsConfig, args=arguments, prog="python -m experiments.run claims"))


def bench(arguments: list[str]) -> None:
    """Parses the flags, and times ours beside the peers, or with --device on an accelerator."""
    import tyro

    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--device", action="store_true")
    known, others = chosen.parse_known_args(arguments)
    if known.device:
        from experiments.bench.device import command
        from experiments.bench.device.config import DeviceConfig

        prog = "python -m experiments.run bench --device"
        return command.run(tyro.cli(DeviceConfig, args=others, prog=prog))
    from experiments.bench.referee import BenchConfig, run

    run(tyro.cli(BenchConfig, args=arguments, prog="python -m experiments.run bench"))


def cost(arguments: list[str]) -> None:
    """Parses the flags, and measures the scaling law of cost."""
    import tyro

    from experiments.bench.cost import CostConfig, run

    run(tyro.cli(CostConfig, args=arguments, prog="python -m experiments.run cost"))


def use_huge_pages() -> None:
    """On Linux, starts this process anew with glibc's malloc on huge pages.

    XLA allocates the buffers of a step anew at each step. On pages of 4 kB the kernel hands out
    tens of thousands of them every time, which takes a tenth to a sixth of the training on a CPU.
    glibc reads the setting only where a process begins; other C libraries ignore it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def hide_echoes() -> None:
    """Keeps what a failed save sets off apart from its own one line.

    Orbax logs the error that it raises, and leaves other writes unawaited. Tensorstore reports
    every array to Orbax's event loop, closed by then, and prints a traceback for each.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            show(raised)

    sys.unraisablehook = show_others


def main(arguments: list[str]) -> None:
    """Runs one experiment; what a user can mend is told in one line, with exit code 2."""
    if arguments[:1] in (["--help"], ["-h"], ["help"]):
        print(usage())
        return
    name = "pronounce" if not arguments or arguments[0].startswith("-") else arguments[0]
    if name not in EXPERIMENTS:
        print(f"error: no experiment named {name!r}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    flags = _current_flags(arguments[1:] if arguments[:1] == [name] else arguments)
    try:
        globals()["import_" if name == "import" else name](flags)  # a word of Python's
    except KeyboardInterrupt as error:  # a training saves first
        sys.exit(exit_code(error))
    except SystemExit:  # named, so that leaving does not import what the next line needs
        raise
    except ImportError as error:
        if error.name != "jax":  # of an unsupported one `tfm` says all that there is to say
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except told_in_one_line() as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    use_huge_pages()
    sys.stdout, sys.stderr = Talk(sys.stdout), Talk(sys.stderr)
    hide_echoes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a training saves first
    main(sys.argv[1:])
