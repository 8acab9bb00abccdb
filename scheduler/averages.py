"""The one kind of average of what was seen lately."""

from __future__ import annotations


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
