"""How many positions of a prompt a client sends in each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

# Positions per step that are tried: smaller steps use devices badly, larger steps make hops wait.
CHUNK_SIZES: Final = (64, 128, 256, 512)


def best_chunk(positions: int, latency_ms: Callable[[int], float], slowest_hop_ms: Callable[[int], float]) -> int:
    """The step size with which `positions` positions finish soonest; among equally fast sizes the largest.

    latency_ms: returns the time of a step through the route, by its number of positions. slowest_hop_ms: returns the
    time for which a step occupies the slowest hop or link, and so delays the next step.
    """

    def prefill_ms(size: int) -> float:
        size = min(size, positions)
        return latency_ms(size) + (math.ceil(positions / size) - 1) * slowest_hop_ms(size)

    return min(reversed(CHUNK_SIZES), key=prefill_ms)
