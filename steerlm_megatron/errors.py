"""Errors that are the user's to mend: one clear message, exit code 2."""


class UserError(Exception):
    """A config or input error. The message names key (or file and line), value, rule and remedy; the CLI exits with
    ``code``, 2.
    """

    code = 2


class TryLater(UserError):
    """What was asked for is right and cannot be done now. 75 asks a scheduler to start the same command again."""

    code = 75


class ReportedElsewhere(UserError):
    """A UserError of rank 0 on the ranks that waited for it: it ends them too, and is printed once."""
