"""When a session should leave its route for a better one."""

from __future__ import annotations

from typing import Final

WORTHWHILE: Final = 0.8
"""A new route must cost at most this share of the present one, so that small changes of the facts move nobody."""


def move_pays(current_ms: float, new_ms: float, move_ms: float, steps_left: int) -> bool:
    """Whether the steps that are left save more than the move costs.

    current_ms, new_ms: cost of a step on the two routes. move_ms: until the new hops hold the session's cache.
    """
    return new_ms <= WORTHWHILE * current_ms and (current_ms - new_ms) * steps_left > move_ms
