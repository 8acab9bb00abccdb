"""Into what steps a long prefill is cut, so that all hops of a route work on it at the same time."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Final

SIZES: Final = (64, 128, 256, 512)
"""Positions of a step. Smaller ones use the devices badly, larger ones make the hops wait for each other."""


def best_step(positions: int, latency_ms: Callable[[int], float], stage_ms: Callable[[int], float]) -> int:
    """The size of steps with which `positions` positions are through soonest, the largest of those that are as good.

    Args:
        latency_ms: of a step through the route, by its positions.
        stage_ms: by how much a step behind it comes later: what it keeps the slowest hop or link busy for.
    """

    def prefill_ms(size: int) -> float:
        size = min(size, positions)
        return latency_ms(size) + (ceil(positions / size) - 1) * stage_ms(size)

    return min(reversed(SIZES), key=prefill_ms)
