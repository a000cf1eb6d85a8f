"""What a user can mend."""


class UserError(ValueError):
    """A mistake in what was asked or given, told in one line that is ready to print."""
