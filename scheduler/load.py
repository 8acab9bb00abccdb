"""How busy a device has been lately: what peers publish beside their speed.

Averages, as clients plan with them for half a minute: what waits at the moment of publishing says nothing of that time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class MovingAverage:
    """Exponential moving average; the first value counts in full, unless there is one to begin with.

    Args:
        share: weight of the latest value.
        start: the average before anything was seen; None: the first value replaces it.

    Attributes:
        value: the average; 0 before the first value.
    """

    __slots__ = ("_begun", "_share", "value")

    def __init__(self, share: float, start: float | None = None) -> None:
        self.value = start or 0.0
        self._begun = start is not None
        self._share = share

    def add(self, value: float) -> float:
        """Takes in the latest value; returns the average."""
        self.value += (self._share if self._begun else 1.0) * (value - self.value)
        self._begun = True
        return self.value


HALF_LIFE_S = 10.0
_WINDOW_MS = 1000 * HALF_LIFE_S / math.log(2)
"""The time of which what fades so is the average."""
SHARE = 0.2
"""Weight of the latest pass in the average."""


class Load:
    """Averages over recent passes; they fade while nothing happens."""

    def __init__(self) -> None:
        self._wait_ms = MovingAverage(SHARE, 0.0)
        self._batch = MovingAverage(SHARE, 0.0)
        self._squares = 0.0
        self._at = 0.0

    @property
    def last_at(self) -> float:
        """When the last pass began, in seconds."""
        return self._at

    def observe(self, now: float, waits_ms: Sequence[float], others: Sequence[int], took_ms: float = 0.0) -> None:
        """Takes in a pass.

        Args:
            now: seconds.
            waits_ms: of the decode steps that began in it; prefill waits for those, so its own waits tell nothing.
            others: for each decode step in it, the positions that belong to other sessions.
            took_ms: how long it lasted.
        """
        fade = self._fade(now)
        self._wait_ms.value *= fade
        self._batch.value *= fade
        self._squares = self._squares * fade + took_ms * took_ms
        self._at = now
        for wait_ms in waits_ms:
            self._wait_ms.add(wait_ms)
        for batch in others:
            self._batch.add(batch)

    def at(self, now: float) -> tuple[float, float]:
        """Ms that a decode step waits for its pass, and positions of others that share the pass of a decode step.

        Steps were seen to wait so long; or, where hardly any came, one that comes at any time finds a pass under way
        that has a mean of (sum of squares of passes) / (twice the time) still to go.
        """
        fade = self._fade(now)
        return max(self._wait_ms.value, self._squares / _WINDOW_MS / 2) * fade, self._batch.value * fade

    def _fade(self, now: float) -> float:
        return 0.5 ** (max(0.0, now - self._at) / HALF_LIFE_S)
