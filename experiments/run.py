"""The command line: `tfm`, or `python -m experiments.run`, then [EXPERIMENT] [flags]."""

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import pkgutil
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, get_args, get_type_hints

from experiments.errors import EXTRAS, exit_code, not_installed, told_in_one_line
from experiments.streams import Talk


class Command(NamedTuple):
    """A command; its MODULE:NAME entries are imported when the command is called."""

    about: str
    config: str
    """The dataclass that its flags are derived from."""
    run: str
    """The function that takes one."""
    default: Callable[[list[str]], Any] | None = None
    """Makes the default config from the flags that choose a preset. None: the dataclass."""
    positional: bool = False
    """Whether its fields are positional arguments."""
    device_per_core: bool = False
    """Whether each CPU core is a JAX device, to run trainings in parallel."""
    instead: "dict[str, Command]" = {}
    """flag -> the command that runs in the place of this one, with its own flags."""


def _chosen(arguments: list[str], **choices: Sequence[str]) -> dict[str, str]:
    """The values of the flags that choose defaults; each flag's first choice is its default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    return vars(parser.parse_known_args(arguments)[0])


def _pronounce_preset(arguments: list[str]) -> Any:
    from experiments.pronounce.task import PRESETS

    return PRESETS[_chosen(arguments, preset=list(PRESETS))["preset"]]


def _translate_preset(arguments: list[str]) -> Any:
    from experiments.translate.config import TranslateConfig, configured
    from tfm.variants import VARIANTS

    names = _chosen(arguments, preset=("small", "base", "big"), variant=list(VARIANTS))
    return TranslateConfig(**configured(**names))


def _plan_preset(arguments: list[str]) -> Any:
    from experiments.plan.plan import PlanConfig, defaults

    return PlanConfig(**defaults(**_chosen(arguments, preset=("base", "small", "big"))))


ON_DEVICE = Command(
    "Measure an accelerator beside its peers, in minutes.",
    "experiments.bench.device.config:DeviceConfig",
    "experiments.bench.device.command:run",
)
COMMANDS = {
    "pronounce": Command(
        "Train a Transformer to pronounce words (the default).",
        "experiments.pronounce.task:PronounceConfig",
        "experiments.pronounce.task:run",
        _pronounce_preset,
    ),
    "translate": Command(
        "Train a Transformer to translate, on your own text.",
        "experiments.translate.config:TranslateConfig",
        "experiments.translate.task:run",
        _translate_preset,
    ),
    "claims": Command(
        "Measure eleven claims about the Transformer, with verdicts.",
        "experiments.claims.ledger:ClaimsConfig",
        "experiments.claims.ledger:run",
        device_per_core=True,
    ),
    "bench": Command(
        "Time this library beside the peers that are installed.",
        "experiments.bench.referee:BenchConfig",
        "experiments.bench.referee:run",
        instead={"--device": ON_DEVICE},
    ),
    "cost": Command(
        "Fit what a token costs by width, depth, length and batch.",
        "experiments.bench.cost:CostConfig",
        "experiments.bench.cost:run",
    ),
    "plan": Command(
        "Say what a training needs on devices that are not at hand.",
        "experiments.plan.plan:PlanConfig",
        "experiments.plan.plan:run",
        _plan_preset,
    ),
    "variants": Command(
        "Say what differs between the models that bear the paper's name.",
        "experiments.reporting.variants:VariantsConfig",
        "experiments.reporting.variants:run",
        positional=True,
    ),
    "predict": Command(
        "Pronounce or translate standard input, line for line.",
        "experiments.inference.predict_config:PredictConfig",
        "experiments.inference.predict:run",
    ),
    "score": Command(
        "Give the log-probability of given answers, line for line.",
        "experiments.inference.score:ScoreConfig",
        "experiments.inference.score:run",
    ),
    "import": Command(
        "Take over a translation model of Marian or PyTorch.",
        "experiments.interop.convert:ImportConfig",
        "experiments.interop.convert:run_import",
    ),
    "export": Command(
        "Write a translation model for Marian or CTranslate2.",
        "experiments.interop.convert:ExportConfig",
        "experiments.interop.convert:run_export",
    ),
}


def program() -> str:
    """What the user typed before the experiment."""
    script = os.path.basename(sys.argv[0])
    return "tfm" if script in ("tfm", "tfm.exe") else "python -m experiments.run"


def usage() -> str:
    """The answer to --help: every command with one sentence."""
    lines = [f"  {name:<12}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [f"usage: {program()} [EXPERIMENT] [flags]", "", "experiments:", *lines, "",
         f"No experiment means pronounce: `{program()}` trains it in minutes.",
         f"Flags of one experiment: {program()} EXPERIMENT --help"]
    )  # fmt: skip


def _current_flags(name: str, arguments: list[str]) -> list[str]:
    """Renames former flags to those of the dataclasses, with a note on standard error."""
    if name in ("pronounce", "translate"):
        flags = "coordinator|process-id|num-processes|(connect|heartbeat|stall)-timeout"
        arguments = [re.sub(rf"^--({flags})(?==|$)", r"--cluster.\1", a) for a in arguments]
    if name == "translate":  # "from" is a Python keyword, and cannot be a field
        arguments = [re.sub(r"^--from(?==|$)", "--from-run", a) for a in arguments]
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


def _join_help_lines(config: type) -> None:
    """Gives tyro each field's docstring as one line, without the line breaks of the source."""
    import docstring_parser

    docs: dict[str, str] = {}
    for cls in config.__mro__[:-1]:
        described = docstring_parser.parse_from_object(cls).params
        docs = {p.arg_name: " ".join((p.description or "").split()) for p in described} | docs
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        field.metadata = MappingProxyType({"help": docs.get(field.name)} | dict(field.metadata))
        for kind in (types[field.name], *get_args(types[field.name])):
            if dataclasses.is_dataclass(kind):
                _join_help_lines(kind)


@contextlib.contextmanager
def _lines_that_fit() -> Iterator[None]:
    """Wraps printed lines between words, since tyro wraps only the lines of flags."""
    from rich.console import Console
    from rich.text import Text

    buffer = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    try:
        with contextlib.redirect_stdout(buffer):
            yield
    finally:
        buffer.seek(0)
        Console().print(Text.from_ansi(buffer.read()))


def call(name: str, arguments: list[str]) -> None:
    """Parses the flags of a command, and runs it."""
    import tyro

    command, prog = COMMANDS[name], f"{program()} {name}"
    for flag in command.instead.keys() & set(arguments):
        command, prog = command.instead[flag], f"{prog} {flag}"
        arguments = [argument for argument in arguments if argument != flag]
    run, config = pkgutil.resolve_name(command.run), pkgutil.resolve_name(command.config)
    default = {} if command.default is None else {"default": command.default(arguments)}
    _join_help_lines(config)
    config = tyro.conf.Positional[config] if command.positional else config
    asked_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    with _lines_that_fit() if asked_for_help else contextlib.nullcontext():
        chosen = tyro.cli(config, args=arguments, prog=prog, **default)
    if command.device_per_core:
        import jax

        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    run(chosen)


def use_huge_pages() -> None:
    """On Linux, restarts this process with glibc's malloc on huge pages: see `cli`."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def hide_echoes() -> None:
    """Hides further output after a failed save, whose error is already one line.

    Orbax logs the error that it raises, and does not await the other writes. Tensorstore then
    prints a traceback for every array, since Orbax's event loop is closed.
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
    """Runs one command; a user's mistake ends in one line and exit code 2."""
    if arguments[:1] in (["--help"], ["-h"], ["help"]):
        print(usage())
        return
    name = "pronounce" if not arguments or arguments[0].startswith("-") else arguments[0]
    if name not in COMMANDS:
        print(f"error: no experiment named {name!r}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    flags = arguments[1:] if arguments[:1] == [name] else arguments
    try:
        call(name, _current_flags(name, flags))
    except KeyboardInterrupt as error:  # a training saves first
        sys.exit(exit_code(error))
    except SystemExit:  # named, so that leaving does not import what the next line needs
        raise
    except ImportError as error:
        if error.name in EXTRAS and isinstance(error, ModuleNotFoundError):
            print(f"error: {not_installed(error.name)}", file=sys.stderr)
        elif error.name == "jax":  # of an unsupported one `tfm` says all that there is to say
            print(f"error: {error}", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except told_in_one_line() as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))


def cli() -> None:
    """The entry point of `tfm` and of `python -m experiments.run`: process settings, then `main`.

    The process restarts itself (`os.execv`) to use huge pages. XLA allocates the buffers of a step
    at each step. With pages of 4 kB the kernel maps tens of thousands of them every time, which
    takes a tenth to a sixth of a training on a CPU. glibc reads the setting of malloc only at the
    start of a process; other C libraries ignore it.

    Settings of the process are made here and not in `main`, which other code may call: a closed
    output pipe does not end a training (`Talk`), a failed save prints one line (`hide_echoes`), and
    SIGTERM acts like Ctrl-C, after a training has saved.
    """
    use_huge_pages()
    sys.stdout, sys.stderr = Talk(sys.stdout), Talk(sys.stderr)
    hide_echoes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(sys.argv[1:])


if __name__ == "__main__":
    cli()
