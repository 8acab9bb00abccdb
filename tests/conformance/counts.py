"""Counts the results of tests of other projects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import partial

import pytest

Counts = dict[str, Counter["Outcome"]]
KEY = pytest.StashKey[Counts]()


class Outcome(Enum):
    PASSED = "passed"
    REFUSED = "refused by name"
    NOT_APPLICABLE = "not applicable"
    FAILED = "failed"


def counted(config: pytest.Config, tests: str) -> Callable[[Outcome], None]:
    """A function that counts an outcome of the given tests."""
    return partial(_count, config.stash.setdefault(KEY, {}).setdefault(tests, Counter()))


def _count(counts: Counter[Outcome], outcome: Outcome) -> None:
    counts[outcome] += 1
