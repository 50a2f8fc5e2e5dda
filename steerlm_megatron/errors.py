"""Errors that are the user's to mend: one clear message, exit code 2."""


class UserError(Exception):
    """A config or input error. The message names key (or file and line), value, rule and remedy; the CLI exits with
    2.
    """
