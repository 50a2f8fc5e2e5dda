"""How a command ends otherwise than done: errors that are the user's to mend (exit code 2), and being stopped (75)."""


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


class Interrupted(SystemExit):
    """Stopped by a signal or the time limit, with what is to be kept saved: exit code 75, "requeue me"."""

    CODE = 75

    def __init__(self, unsaid: str | None = None) -> None:
        """``unsaid``: what stopped it, where nobody has told the user."""
        super().__init__(self.CODE)
        self.unsaid = unsaid
