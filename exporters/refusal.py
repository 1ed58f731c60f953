"""Why a wire format or its runtime cannot take a tensor, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One refusal.

    Attributes:
        reason: what does not fit, and where.
        remedy: what the user can do instead.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"
