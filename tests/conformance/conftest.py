"""Prints the number of passed tests of other projects."""

from __future__ import annotations

from typing import Any

from tests.conformance.counts import KEY, Outcome


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for tests, counts in terminalreporter.config.stash.get(KEY, {}).items():
        told = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome)
        terminalreporter.write_line(f"{tests}: {told}")
