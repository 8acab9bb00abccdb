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
"""A route has become slow if a step takes so many times as long as expected, see `RouteWatch.expected_ms`.

Other routes are not left: what is told of better ones is old, others that read it go there too, and a move has a
context computed again by peers that others wait for (docs/scheduling.md).
"""

WORTHWHILE: Final = 0.75  # a new route must cost at most this share of the present one
MOVE_COUNTS: Final = 4.0  # weight of what a move takes: the session waits, and so do others at its new hops


def has_become_slow(current_ms: float, expected_ms: float) -> bool:
    """Whether a route may be left at all. Cost of a step now, and as it was to be expected (0: not known)."""
    return current_ms >= DISAPPOINTING * expected_ms


def move_pays(current_ms: float, new_ms: float, move_ms: float, steps_left: int, expected_ms: float) -> bool:
    """Whether a route has become slow, and the steps that are left save far more than the move takes.

    current_ms, new_ms: cost of a step on the two routes. move_ms: until the new hops hold the session's cache.
    expected_ms: of a step on the present one, see `RouteWatch`; 0: not known.
    """
    if not has_become_slow(current_ms, expected_ms) or new_ms > WORTHWHILE * current_ms:
        return False
    return (current_ms - new_ms) * steps_left > MOVE_COUNTS * move_ms


PAUSE_S: Final = 1.0  # between two looks for a better route
SUSPECTED_AGAIN_S: Final = 10.0  # how often the links of a route that is slow for no known reason are measured again
RECENT_S: Final = 60.0  # what steps took longer ago says nothing of now
SURPRISE: Final = 2.0
SURPRISE_MS: Final = 20.0  # with both, a step is so slow that another route is looked for now
SHARE: Final = 0.2  # weight of the latest step in what is usual
TRIAL_STEPS: Final = 8  # after so many steps on a route it is known whether it is as fast as predicted
RECENT_STEPS: Final = 8  # their median is what the route costs now: where others use the devices, a few are soon slow
PREDICTIONS: Final = 4  # the slowest but one of so many routes tells by what factor a client's predictions are too good
MAX_ERROR: Final = 20.0


class PredictionErrors:
    """By what factor routes are slower than predicted, from the latest of a client; not thread-safe.

    Where devices share something that no record tells of (a machine, a radio), every peer that is not in use looks
    faster than it will be once it is; without this sessions would never come to rest. A single slow route says nothing
    of others.
    """

    def __init__(self) -> None:
        self._ratios: dict[Hashable, float] = {}

    def came(self, route: Hashable, ratio: float) -> None:
        """Takes in by what factor a route was slower than predicted; of one that is known already the latest counts."""
        self._ratios.pop(route, None)
        self._ratios[route] = ratio
        if len(self._ratios) > PREDICTIONS:
            del self._ratios[next(iter(self._ratios))]

    @property
    def error(self) -> float:
        """At least 1; what is not known yet counts as right."""
        ratios = [*self._ratios.values(), *(1.0 for _ in range(PREDICTIONS - len(self._ratios)))]
        return min(max(1.0, sorted(ratios)[-2]), MAX_ERROR)


@dataclass(frozen=True, slots=True)
class Look:
    plans: bool  # look for another route
    suspects: bool  # ask the hops at its ends
    measures: bool  # measure the bandwidth to them


class RouteWatch:
    """What decode steps take on the present route, beside what was predicted, and whether to leave it.

    former_ms: of a step before a hop was lost, as it was to be expected, or at its best, if that was less than now; 0:
    it was not. surprised: a step took far longer than usual, or the route has become slow, since this was set to False.
    """

    def __init__(self) -> None:
        self.surprised = False
        self.former_ms = 0.0
        self.usual = MovingAverage(SHARE)  # ms of a step, over all routes; 0 before the first
        self._predicted_ms = 0.0
        self.expected_ms = 0.0  # of a step, as predicted when the route was chosen or as it was at first; 0: unknown
        self._ratio = math.inf
        self._trial_ms: list[float] = []
        self._is_tried = False
        self._recent_ms: deque[float] = deque(maxlen=RECENT_STEPS)
        self._is_slow = False
        self._stepped_s = self._looked_s = self._suspected_s = -math.inf
        self._is_unexplained = False

    def begin(self, predicted_ms: float, *, lost: bool = False) -> None:
        """Steps go along another route from now on. lost: not as that is better, but as hops of the former are gone."""
        best_ms = self._ratio * self._predicted_ms if self._ratio < math.inf else 0.0
        former_ms = self.former_ms or max(self.expected_ms, best_ms)
        self.former_ms = former_ms if lost and former_ms < predicted_ms else 0.0
        self._predicted_ms = self.expected_ms = predicted_ms
        self._ratio, self._trial_ms = math.inf, []
        self._is_tried = self._is_slow = False
        self._recent_ms.clear()

    def present_ms(self, cost_ms: float) -> float:
        """Of a step on the present route now: what the last ones took, or what the facts say; 0: it is too new to say.

        Facts alone move no session from a route that it has just come to: that others move makes devices busy, too.
        """
        if len(self._recent_ms) == RECENT_STEPS:
            return median(self._recent_ms)
        return cost_ms if self._is_tried else 0.0

    def is_slow(self, step_ms: float) -> bool:
        """Whether the route may be left if a step takes so long: it has become slow, or is what a loss has left."""
        return has_become_slow(step_ms, self.expected_ms) or has_become_slow(step_ms, self.former_ms or math.inf)

    def may_look(self, now_s: float, *, news: bool) -> bool:
        """Whether there is a reason to `look`, `PAUSE_S` after the last look. news: facts were refreshed."""
        return (news or self.surprised or self._is_unexplained) and now_s - self._looked_s >= PAUSE_S

    def look(self, now_s: float, known_ms: float, *, news: bool, ends_silent: bool) -> Look:
        """What to do about the route now.

        The client's own links are measured first; hops tell of the other links after some seconds.

        known_ms: of a step, as the facts say. ends_silent: one of the hops beside the client does not answer.
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
        return Look(plans, suspects=surprised or measures, measures=measures)

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
        """Ms of a step on another route, if it pays to leave the present one for it; else None.

        What is known of the present route was seen; what is known of the other was told, and may be too good. A route
        that was taken after a loss is left for one that is as good as the lost one.

        known_ms: of a step on the present route, as the facts say; predicted_ms: on the other. error: see
        `PredictionErrors`. move_ms, steps_left: see `move_pays`. shares_links: whether the routes have a link in
        common, which may be what is slow for no known reason.
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

    def step_took(self, elapsed_ms: float, positions: int = 1, now_s: float = 0.0) -> float | None:
        """Takes in a step; returns by what factor the route is slower than predicted, once known and when it is less.

        A route may be slow at first, while contexts of others that have moved are computed: its best counts.

        positions: in the step; only steps of one position tell what the route costs now. now_s: when it was done.
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
    """The hop before the first that differs (None: the client), and the hops of `route` that must be filled."""
    stay = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(present, route, strict=False))))
    rest = route[stay:]
    pairs = zip(reversed(present[stay:]), reversed(rest), strict=False)
    behind = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return (route[stay - 1] if stay else None), list(rest[: len(rest) - behind])
