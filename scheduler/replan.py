"""When a session should leave its route for a better one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from statistics import median
from typing import Final, TypeVar

from scheduler.averages import MovingAverage

DISAPPOINTING: Final = 1.7
"""A route has become slow if a step takes so many times as long as was predicted when the route was chosen.

Others are not left. What is told of better ones is old, whoever else reads it goes there too, and each move has a
context computed again by peers that others wait for (docs/scheduling.md).
"""

WORTHWHILE: Final = 0.65
"""A new route must cost at most this share of the present one."""


def has_become_slow(current_ms: float, predicted_ms: float) -> bool:
    """Whether a route may be left at all. Cost of a step now, and by the prediction when it was chosen (0: none)."""
    return current_ms >= DISAPPOINTING * predicted_ms


def move_pays(current_ms: float, new_ms: float, move_ms: float, steps_left: int, predicted_ms: float) -> bool:
    """Whether a route has become slow, and the steps that are left save more than the move costs.

    current_ms, new_ms: cost of a step on the two routes. move_ms: until the new hops hold the session's cache.
    predicted_ms: cost of a step on the present one when it was chosen; 0: not known.
    """
    if not has_become_slow(current_ms, predicted_ms) or new_ms > WORTHWHILE * current_ms:
        return False
    return (current_ms - new_ms) * steps_left > move_ms


SURPRISE: Final = 2.0
SURPRISE_MS: Final = 20.0
"""A step that took so many times as long as usual, and so much longer, is a reason to look for another route."""

SHARE: Final = 0.2
"""Weight of the latest step in what is usual."""

TRIAL_STEPS: Final = 8
"""After so many steps on a route it is known whether it is as fast as predicted."""

RECENT_STEPS: Final = 3
"""The median of so many steps tells what the route costs now."""

RELIEF: Final = 0.2
"""Weight of a prediction that was better than the ones before in what is expected of the next."""

MAX_ERROR: Final = 20.0


def prediction_error(former: float, ratio: float) -> float:
    """By what factor routes are slower than predicted, at least 1, after one that was `ratio` times as slow.

    Where devices share something that no record tells of (a machine, a radio), every peer that is not in use looks
    faster than it will be once it is; without this sessions would never come to rest.
    """
    return min(max(1.0, ratio, former + RELIEF * (ratio - former)), MAX_ERROR)


class RouteWatch:
    """What decode steps take on the present route, beside what was predicted. All times in ms.

    Attributes:
        surprised: the last step took far longer than usual.
    """

    def __init__(self) -> None:
        self.surprised = False
        self._usual = MovingAverage(SHARE)
        self._predicted_ms = 0.0
        self._trial_ms: list[float] = []
        self._recent_ms: deque[float] = deque(maxlen=RECENT_STEPS)

    @property
    def predicted_ms(self) -> float:
        """Of a step on the present route when it was chosen; 0: not known."""
        return self._predicted_ms

    @property
    def usual_ms(self) -> float:
        """Of a step, over all routes; 0 before the first."""
        return self._usual.value

    def begin(self, predicted_ms: float) -> None:
        """Steps go along another route from now on."""
        self._predicted_ms, self._trial_ms = predicted_ms, []
        self._recent_ms.clear()

    def present_ms(self, cost_ms: float) -> float:
        """Of a step on the present route now: what the facts say, but no less than the last steps took.

        So a route is left that has become slow for a reason that no fact tells: a link that does not even answer pings.
        """
        return max(cost_ms, median(self._recent_ms)) if len(self._recent_ms) == RECENT_STEPS else cost_ms

    def forget_recent(self) -> None:
        """What the last steps took was too long ago to say anything of now."""
        self._recent_ms.clear()

    def step_took(self, elapsed_ms: float, positions: int = 1) -> float | None:
        """Takes in a step; once it is known, returns by what factor the route is slower than predicted.

        positions: in the step; only of single ones is compared what they cost with what they took.
        """
        self.surprised = elapsed_ms > SURPRISE * (self.usual_ms or elapsed_ms) + SURPRISE_MS
        self._usual.add(elapsed_ms)
        if positions == 1:
            self._recent_ms.append(elapsed_ms)
        if len(self._trial_ms) < TRIAL_STEPS:
            self._trial_ms.append(elapsed_ms)
            if len(self._trial_ms) == TRIAL_STEPS and self._predicted_ms:
                return median(self._trial_ms) / self._predicted_ms
        return None


H = TypeVar("H")


def changed_hops(present: Sequence[H], route: Sequence[H]) -> tuple[H | None, list[H]]:
    """The hop before the first that differs (None: the client), and the hops of `route` that must be filled."""
    stay = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(present, route, strict=False))))
    rest = route[stay:]
    pairs = zip(reversed(present[stay:]), reversed(rest), strict=False)
    behind = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return (route[stay - 1] if stay else None), list(rest[: len(rest) - behind])
