"""Exceptions that end a command: errors that the user can fix (exit code 2), and a stop on request (75)."""


class UserError(Exception):
    """A config or input error. The message names key (or file and line), value, rule and remedy; the CLI exits with
    ``code``, 2.
    """

    code = 2


class TryLater(UserError):
    """The request is valid but cannot be met now. Exit code 75 asks a scheduler to start the same command again."""

    code = 75


class ReportedElsewhere(UserError):
    """A UserError of rank 0 on the ranks that waited for rank 0: it ends them too, and rank 0 alone prints it."""


class Interrupted(SystemExit):
    """A signal or the time limit stopped the command, which has saved its state: exit code 75, "requeue me"."""

    CODE = 75

    def __init__(self, unsaid: str | None = None) -> None:
        """``unsaid`` is the reason for the stop, if the user has not been told yet."""
        super().__init__(self.CODE)
        self.unsaid = unsaid
