"""What a check has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


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


COLORS = {Status.passed: "green", Status.warned: "yellow", Status.failed: "red"}
_CHECK_WIDTH = 10


def line(finding: Finding) -> str:
    """One finding, without its status."""
    return f"{finding.check:<{_CHECK_WIDTH}} {finding.text}"


def summary(findings: Sequence[Finding]) -> str:
    """How it stands in all."""
    counts = Counter(finding.status for finding in findings)
    told = f"{counts[Status.passed]} passed, {counts[Status.warned]} warned, {counts[Status.failed]} failed"
    return f"{told}: docs/doctor.md has more on each check" if counts[Status.failed] else told


def has_failed(findings: Sequence[Finding]) -> bool:
    """Whether something cannot work."""
    return any(finding.status is Status.failed for finding in findings)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    return {"failed": has_failed(findings), "findings": [asdict(finding) for finding in findings]}
