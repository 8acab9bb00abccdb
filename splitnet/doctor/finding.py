"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check ended."""

    passed = "pass"
    warned = "warn"
    failed = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found.

    Attributes:
        check: its name, one word.
        status: how it ended.
        text: what was found; if it did not pass, what is wrong and what to do.
    """

    check: str
    status: Status
    text: str


def passed(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Status.passed, text)


def warned(check: str, text: str) -> Finding:
    """Something may be wrong, or is wrong for some uses."""
    return Finding(check, Status.warned, text)


def failed(check: str, text: str) -> Finding:
    """It cannot work like this."""
    return Finding(check, Status.failed, text)
