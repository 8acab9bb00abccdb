"""Leaving a route that works for one that is better."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from itertools import takewhile

from scheduler.replan import move_pays
from splitnet.client.planner import Needs, PlannedHop, with_kept_hops
from splitnet.client.swarm import Swarm
from splitnet.errors import SplitnetError

log = logging.getLogger(__name__)

SURPRISE = 2.0
SURPRISE_MS = 20.0
"""A step that took so many times as long as usual, and so much longer, is a reason to look for another route."""

PAUSE_S = 1.0
"""Between two looks."""

SHARE = 0.2
"""Weight of the latest step in what is usual."""

TRIAL_STEPS = 8
"""After so many steps on a route it is known whether it is as fast as foretold."""


class Replanner:
    """Looks for a better route when the facts were refreshed, or when steps have become slow.

    Args:
        swarm: plans and knows costs.

    Attributes:
        usual_ms: of a decode step, 0 before the first.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._news = swarm.news
        self.usual_ms = 0.0
        self._surprised = False
        self._looked_at = 0.0
        self._route: list[PlannedHop] = []
        self._foretold_ms = 0.0
        self._trial_ms: list[float] = []

    def step_took(self, elapsed_ms: float) -> None:
        """Takes in the time of a decode step."""
        usual = self.usual_ms or elapsed_ms
        self._surprised = elapsed_ms > SURPRISE * usual + SURPRISE_MS
        self.usual_ms = usual + SHARE * (elapsed_ms - usual)
        if len(self._trial_ms) < TRIAL_STEPS:
            self._trial_ms.append(elapsed_ms)
            if len(self._trial_ms) == TRIAL_STEPS and self._foretold_ms:
                self._swarm.survey.forecast_came(statistics.median(self._trial_ms) / self._foretold_ms)

    def better_route(
        self, hops: Sequence[PlannedHop], needs: Needs, cached: int, steps_left: int
    ) -> list[PlannedHop] | None:
        """A route that pays for the move from `hops`, if there is a reason to look for one and it exists.

        Args:
            hops: the present route.
            needs: of the session.
            cached: positions that new hops would have to be given.
            steps_left: decode steps that are expected at most.
        """
        if self._route != hops:
            self._route, self._trial_ms = list(hops), []
            self._foretold_ms = self._swarm.cost_ms(needs, hops)
        now = time.monotonic()
        fresh_facts = self._news != self._swarm.news
        if not (fresh_facts or self._surprised) or now - self._looked_at < PAUSE_S:
            return None
        if self._surprised:
            # What a hop took is known from the step. If it was one of the client's own links, that must be measured.
            self._swarm.look_again([hops[0].record, hops[-1].record])
        self._looked_at, self._news, self._surprised = now, self._swarm.news, False
        try:
            route = with_kept_hops(self._swarm.plan(needs, holders={hop.name for hop in hops}), hops)
        except SplitnetError as error:
            log.debug("no other route: %s", error)
            return None
        if route == list(hops):
            return None
        current_ms = self._swarm.cost_ms(needs, hops)
        # What is known of the present route was seen; what is known of the other was told, and is doubted.
        new_ms = self._swarm.cost_ms(needs, route) * self._swarm.survey.doubt
        if not move_pays(current_ms, new_ms, self._move_ms(needs, hops, route, cached), steps_left):
            return None
        log.info(
            "a better route: %.0f ms per step instead of %.0f ms",
            new_ms,
            current_ms,
            extra={"step_ms": round(new_ms, 1), "former_step_ms": round(current_ms, 1)},
        )
        return route

    def _move_ms(self, needs: Needs, hops: Sequence[PlannedHop], route: Sequence[PlannedHop], cached: int) -> float:
        """Ms to give the session's cache to the hops of `route` that do not have it."""
        stay = len(list(takewhile(lambda hop: hop in hops, route)))
        stay_behind = len(list(takewhile(lambda hop: hop in hops, reversed(route[stay:]))))
        changed = route[stay : len(route) - stay_behind]
        before = route[stay - 1].record if stay else None
        return self._swarm.cost_ms(needs, changed, ends=(before, None), positions=max(cached, 1))
