"""The one error that users are meant to see: a single line naming what, where, and the remedy."""


class LrqatError(Exception):
    """Bad input or an impossible request. Commands print its text as one line and exit with status 2."""
