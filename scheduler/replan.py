"""When a session should leave its route for a better one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Final, TypeVar

from scheduler.batching import MovingAverage

DISAPPOINTING: Final = 1.5
"""A route counts as slow if a step takes this many times as long as expected, see `RouteWatch.expected_ms`.

Sessions stay on routes that are not slow: records that show a better route may be old, other sessions read the same
records and move there too, and a move makes peers compute a context again while they serve others (docs/scheduling.md).
"""

WORTHWHILE: Final = 0.75  # a new route must cost at most this share of the present one
# Weight of the duration of a move, because the session waits, and so do other sessions at its new hops.
MOVE_COUNTS: Final = 4.0


def has_become_slow(current_ms: float, expected_ms: float) -> bool:
    """Whether a session may leave its route. current_ms: present duration of a step. expected_ms: expected duration;
    0: unknown."""
    return current_ms >= DISAPPOINTING * expected_ms


def move_pays(current_ms: float, new_ms: float, move_ms: float, steps_left: int, expected_ms: float) -> bool:
    """Whether a route has become slow, and the remaining steps save far more than the move takes.

    current_ms, new_ms: duration of a step on the two routes. move_ms: time until the new hops hold the session's cache.
    expected_ms: expected duration of a step on the present route, see `RouteWatch`; 0: unknown.
    """
    if not has_become_slow(current_ms, expected_ms) or new_ms > WORTHWHILE * current_ms:
        return False
    return (current_ms - new_ms) * steps_left > MOVE_COUNTS * move_ms


PAUSE_S: Final = 1.0  # shortest time between two looks for a better route
# Seconds between two measurements of the links of a route that is slow without a known reason.
SUSPECTED_AGAIN_S: Final = 10.0
RECENT_S: Final = 60.0  # seconds for which the times of steps count
SURPRISE: Final = 2.0
# A step that exceeds the usual time by the factor and by these ms is a reason to look for another route at once.
SURPRISE_MS: Final = 20.0
SHARE: Final = 0.2  # weight of the latest step in the usual time
TRIAL_STEPS: Final = 8  # steps on a route until its speed is compared with the prediction
# Number of latest steps whose median is the present cost of a route; on shared devices, a few steps are often slow.
RECENT_STEPS: Final = 8
# Number of latest routes from which a client estimates its prediction error: the second largest of their factors.
PREDICTIONS: Final = 4
MAX_ERROR: Final = 20.0


class PredictionErrors:
    """By which factors a client's latest routes are slower than predicted; not thread-safe.

    Where devices share something that records do not show (a machine, a radio), every idle peer looks faster than it
    will be in use; without this correction, sessions would never stop to move. A single slow route says nothing about
    others.
    """

    def __init__(self) -> None:
        self._ratios: dict[Hashable, float] = {}

    def add_ratio(self, route: Hashable, ratio: float) -> None:
        """Records by which factor a route was slower than predicted; for a known route, the latest value counts."""
        self._ratios.pop(route, None)
        self._ratios[route] = ratio
        if len(self._ratios) > PREDICTIONS:
            del self._ratios[next(iter(self._ratios))]

    @property
    def error(self) -> float:
        """The factor to expect for other routes, at least 1; unknown routes count as correctly predicted."""
        ratios = [*self._ratios.values(), *(1.0 for _ in range(PREDICTIONS - len(self._ratios)))]
        return min(max(1.0, sorted(ratios)[-2]), MAX_ERROR)


@dataclass(frozen=True, slots=True)
class RouteAdvice:
    plans: bool  # whether to look for another route
    suspects: bool  # whether to ping the first and the last hop
    measures: bool  # whether to measure the bandwidth to these two hops


class RouteWatch:
    """The times of decode steps on the present route, compared with the prediction, and whether to leave the route.

    former_ms: ms of a step on the route before a hop was lost, if that route was faster than the present route; 0: it
    was not. surprised: whether a step took far longer than usual, or the route has become slow, since the caller set
    this attribute to False.
    """

    def __init__(self) -> None:
        self.surprised = False
        self.former_ms = 0.0
        self.usual = MovingAverage(SHARE)  # ms of a step, over all routes; 0 before the first step
        self._predicted_ms = 0.0
        # Ms of a step, as predicted or as first measured on this route, whichever is less; 0: unknown.
        self.expected_ms = 0.0
        self._ratio = math.inf
        self._trial_ms: list[float] = []
        self._is_tried = False
        self._recent_ms: deque[float] = deque(maxlen=RECENT_STEPS)
        self._is_slow = False
        self._stepped_s = self._looked_s = self._suspected_s = -math.inf
        self._is_unexplained = False

    def begin_route(self, predicted_ms: float, *, lost: bool = False) -> None:
        """From now on, steps use another route. lost: whether this is because hops of the former route were lost."""
        best_ms = self._ratio * self._predicted_ms if self._ratio < math.inf else 0.0
        former_ms = self.former_ms or max(self.expected_ms, best_ms)
        self.former_ms = former_ms if lost and former_ms < predicted_ms else 0.0
        self._predicted_ms = self.expected_ms = predicted_ms
        self._ratio, self._trial_ms = math.inf, []
        self._is_tried = self._is_slow = False
        self._recent_ms.clear()

    def present_ms(self, cost_ms: float) -> float:
        """Ms of a step on the present route: as measured recently, or else by the facts (`cost_ms`); 0: the route is
        too new.

        A session does not leave a new route because of facts alone: moves of other sessions also make devices busy for
        a moment.
        """
        if len(self._recent_ms) == RECENT_STEPS:
            return median(self._recent_ms)
        return cost_ms if self._is_tried else 0.0

    def is_slow(self, step_ms: float) -> bool:
        """Whether a session may leave a route with such steps: the route is slow, or replaces a faster route after a
        loss."""
        return has_become_slow(step_ms, self.expected_ms) or has_become_slow(step_ms, self.former_ms or math.inf)

    def may_look(self, now_s: float, *, news: bool) -> bool:
        """Whether there is a reason to `advise`, `PAUSE_S` after the last look. news: facts were refreshed."""
        return (news or self.surprised or self._is_unexplained) and now_s - self._looked_s >= PAUSE_S

    def advise(self, now_s: float, known_ms: float, *, news: bool, ends_silent: bool) -> RouteAdvice:
        """What to do about the route at this time.

        The client's own links are measured first; records of the hops show the other links some seconds later.

        known_ms: ms of a step, by the facts. ends_silent: whether the first or the last hop does not answer.
        """
        surprised, self.surprised = self.surprised, False
        self._forget_old(now_s)
        self._looked_s = now_s
        is_slow = self.is_slow(self.present_ms(known_ms))
        self._is_unexplained = is_slow and not ends_silent and not self.is_slow(known_ms)
        measures = self._is_unexplained and now_s - self._suspected_s >= SUSPECTED_AGAIN_S
        if measures:
            self._suspected_s = now_s
        plans = is_slow and not measures and (news or surprised or not self._is_unexplained)
        return RouteAdvice(plans, suspects=surprised or measures, measures=measures)

    def better_ms(
        self,
        known_ms: float,
        predicted_ms: float,
        error: float,
        move_ms: float,
        steps_left: int,
        *,
        shares_links: bool = False,
    ) -> float | None:
        """Ms of a step on another route, if it pays to leave the present route for it; else None.

        Facts about the present route were observed; facts about the other route were reported by peers, and may be too
        optimistic. After a loss, a session leaves its new route for a route as good as the lost route.

        known_ms: ms of a step on the present route, by the facts; predicted_ms: on the other route. error: see
        `PredictionErrors`. move_ms, steps_left: see `move_pays`. shares_links: whether the routes have a common link,
        which may be the unknown cause of slowness.
        """
        current_ms, new_ms = self.present_ms(known_ms), predicted_ms * error
        if self._is_unexplained and shares_links:
            new_ms += current_ms - known_ms
        is_back = bool(self.former_ms) and not has_become_slow(new_ms, self.former_ms)
        expected_ms = self.former_ms if is_back else self.expected_ms
        return new_ms if move_pays(current_ms, new_ms, move_ms, steps_left, expected_ms) else None

    def _forget_old(self, now_s: float) -> None:
        if now_s - self._stepped_s > RECENT_S:
            self._recent_ms.clear()

    def observe_step(self, elapsed_ms: float, positions: int = 1, now_s: float = 0.0) -> float | None:
        """Records a step. Returns the route's slowdown against the prediction, when it is first known and when it
        decreases.

        A route may be slow at first, while its hops compute the contexts of other sessions that moved there, so the
        best value counts.

        positions: number of positions in the step; only steps of one position show the present cost of the route.
        now_s: time of the result of the step.
        """
        self._forget_old(now_s)
        self._stepped_s = now_s
        self.surprised |= elapsed_ms > SURPRISE * (self.usual.value or elapsed_ms) + SURPRISE_MS
        self.usual.add(elapsed_ms)
        if positions == 1:
            self._recent_ms.append(elapsed_ms)
            was_slow, self._is_slow = self._is_slow, has_become_slow(self.present_ms(0.0), self.expected_ms)
            self.surprised |= self._is_slow and not was_slow
        self._trial_ms.append(elapsed_ms)
        if len(self._trial_ms) == TRIAL_STEPS:
            took_ms, self._trial_ms = median(self._trial_ms), []
            ratio = took_ms / self._predicted_ms if self._predicted_ms else math.inf
            if not self._is_tried:
                self._is_tried, self.expected_ms = True, min(took_ms, self._predicted_ms)
            if ratio < self._ratio:
                self._ratio = ratio
                return ratio
        return None


H = TypeVar("H")


def changed_hops(present: Sequence[H], route: Sequence[H]) -> tuple[H | None, list[H]]:
    """The hop before the first new hop (None: the client), and the hops of `route` whose KV caches must be filled."""
    stay = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(present, route, strict=False))))
    rest = route[stay:]
    pairs = zip(reversed(present[stay:]), reversed(rest), strict=False)
    behind = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return (route[stay - 1] if stay else None), list(rest[: len(rest) - behind])
