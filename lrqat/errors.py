"""The one error that users are meant to see: a single line naming what, where, and the remedy."""

from __future__ import annotations


class LrqatError(Exception):
    """Bad input or an impossible request. Commands print its text as one line and exit with status 2."""


def at_least(flag: str, value: int | None, least: int) -> None:
    """Refuse a flag's number below `least`; None is none.

    Raises:
        LrqatError: it is.
    """
    if value is not None and value < least:
        raise LrqatError(f"{flag}: expected at least {least}, got {value}")
