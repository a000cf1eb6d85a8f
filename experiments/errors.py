"""What a user can mend, and what a process that an error ends leaves with."""


class UserError(ValueError):
    """A mistake in what was asked or given, told in one line that is ready to print."""


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
