"""Events in the order of their time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

Subject = TypeVar("Subject")


class Events:
    """What is still to happen. Of two events at the same time the one that was planned first comes first.

    Attributes:
        now: in ms.
        done: how many events have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0
        self._order = count()
        self._planned: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def at(self, ms: float, act: Callable[[Subject], None], subject: Subject) -> None:
        """Plans `act(subject)`."""
        heapq.heappush(self._planned, (ms, next(self._order), act, subject))

    def next_before(self, end_ms: float) -> bool:
        """Lets the next event happen, and says so; False if none is planned until then."""
        if not self._planned or self._planned[0][0] > end_ms:
            return False
        self.now, _, act, subject = heapq.heappop(self._planned)
        act(subject)
        self.done += 1
        return True
