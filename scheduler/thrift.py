"""The chain with the least energy among those that are nearly as fast as the fastest.

That is a shortest path under a constraint. With the constraint as a term of the cost, ms plus a weight times joules, it
is a shortest path again; the weight is found as in LARAC (Juttner et al., "Lagrange Relaxation Based Method for the QoS
Routing Problem", 2001): between a chain that is fast enough and one that is not, it makes both cost the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from scheduler.chain_search import Costs, Floats, Path, cheapest_chain, sum_of

ENERGY_SLOWDOWN: Final = 1.5
"""How many times as long as on the fastest route a step may take, if nobody says otherwise."""

MAX_WEIGHTS: Final = 8
"""How many weights are tried; in random swarms four were the most that it took."""

_ENERGY_ALONE: Final = 1e6
"""Energy counts so many times as much as time in the first chain: of equally thrifty ones it is the fastest."""
_SMALL: Final = 1e-9


def thriftiest_chain(costs: Costs, joules: Floats, num_blocks: int, slowdown: float) -> Path:
    """The path with the least joules on which a step takes at most `slowdown` times as long as on the fastest.

    A chain that no weight makes the cheapest is not found, though it may have a little less energy. What is found keeps
    the bound, and has no more energy than the fastest chain.

    joules: of one block `[peers]`.
    """

    def with_weight(weight: float) -> tuple[Path, float, float]:
        path = cheapest_chain(replace(costs, block=costs.block + weight * joules), num_blocks, 1)
        return path, sum_of(costs, path), float(joules[path].sum())

    within, within_ms, within_joules = with_weight(0.0)
    most_ms = within_ms * max(slowdown, 1.0) * (1 + _SMALL)
    alone = _ENERGY_ALONE * max(within_ms, _SMALL) / max(within_joules, _SMALL)
    beyond, beyond_ms, beyond_joules = with_weight(alone)
    if beyond_ms <= most_ms:
        return beyond
    for _ in range(MAX_WEIGHTS):
        saved = within_joules - beyond_joules
        if saved <= _SMALL * within_joules:
            break
        weight = (beyond_ms - within_ms) / saved
        path, path_ms, path_joules = with_weight(weight)
        if path_ms + weight * path_joules >= (within_ms + weight * within_joules) * (1 - _SMALL):
            break  # nothing lies between the two
        if path_ms <= most_ms:
            within, within_ms, within_joules = path, path_ms, path_joules
        else:
            beyond_ms, beyond_joules = path_ms, path_joules
    return within
