"""How many of the first blocks a client runs itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def best_share(candidates: Iterable[int], block_ms: float, route_ms: Callable[[int], float | None]) -> int:
    """The number of first blocks with which a token is there soonest; the smallest of those that are as good.

    Args:
        candidates: numbers of blocks that the client has memory for.
        block_ms: that one of them takes here.
        route_ms: of the best route for all blocks from a given one on, 0 behind the last; None: there is none.

    Raises:
        ValueError: there is a route for none of the candidates.
    """
    costs: list[tuple[float, int]] = []
    for count in candidates:
        rest_ms = route_ms(count)
        if rest_ms is not None:
            costs.append((count * block_ms + rest_ms, count))
    return min(costs)[1]
