"""Averages in which newer values count more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class MovingAverage:
    """An exponential moving average.

    Attributes:
        share: weight of the latest value, 0 to 1.
        value: the average; None before the first value, which it begins with.
    """

    share: float
    value: float | None = None

    def add(self, value: float) -> float:
        """Takes a value in and returns the average."""
        self.value = value if self.value is None else self.value + self.share * (value - self.value)
        return self.value
