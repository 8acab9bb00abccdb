"""What `splitnet doctor` says: a line for each finding, and how many there were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from splitnet.doctor.finding import Finding, Status

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
