"""Errors that are the user's to mend: one clear message, exit code 2."""


class UserError(Exception):
    """A config or input error. The message names key (or file and line), value, rule and remedy; the CLI exits with
    2.
    """


class ReportedElsewhere(UserError):
    """A UserError of rank 0 on the ranks that waited for it: it ends them too, and is printed once."""
