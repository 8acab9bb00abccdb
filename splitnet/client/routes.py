"""Plans what a session asks for: a whole route, or other hops between those that stay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from scheduler.replan import RouteWatch, changed_hops
from splitnet.client.known_peers import LOOK_S
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.planner import Needs, PlannedHop, repaired_route, with_kept_hops
from splitnet.client.session_events import AskRoute, Move, NoRoute, Planned
from splitnet.client.survey import TRUST_S
from splitnet.client.swarm import Swarm
from splitnet.errors import CoverageError, PeerBusy, SplitnetError
from splitnet.net.codecs import Codec

log = logging.getLogger(__name__)

PAUSE_S = 1.0
"""Between two looks for a better route."""


class Routes:
    """Routes for one session. Blocks: it reads the directory and measures links.

    Args:
        swarm: the peers.
        codecs: chooses the codec of each link.
        blocks: what to cover, `[start, end)`.
        any_weights: whether blocks may be held otherwise than a session needs them where nobody holds them so.

    Attributes:
        watch: what steps take on the present route.
    """

    def __init__(self, swarm: Swarm, codecs: LinkCodecs, blocks: tuple[int, int], *, any_weights: bool = False) -> None:
        self.watch = RouteWatch()
        self._swarm = swarm
        self._codecs = codecs
        self._blocks = blocks
        self._any_weights = any_weights
        self._news = swarm.fresh_facts.news
        self._looked_at = 0.0
        self._stepped_at = 0.0
        self._suspected_at = 0.0
        self._unexplained = False
        self._route: list[PlannedHop] = []
        self._lost = False
        """The latest plan takes the place of a route that was lost."""
        self._planned: tuple[list[PlannedHop], float] = [], 0.0
        """The latest plan, with what a step of it was predicted to take then, in ms."""

    def answer(self, asked: AskRoute, needs: Needs) -> Planned | NoRoute:
        """The route that was asked for, or why there is none."""
        swarm = self._swarm

        def route_for(needs: Needs) -> list[PlannedHop]:
            return repaired_route(
                asked.kept,
                asked.excluded,
                self._blocks,
                lambda blocks, ends, exclude, holders: swarm.plan(
                    needs, blocks=blocks, ends=ends, exclude=exclude, holders=holders, fresh=asked.fresh
                ),
            )

        try:
            if asked.unban:
                swarm.unban_living()
            try:
                route = route_for(needs)
            except (CoverageError, PeerBusy):
                if not (needs.held and self._any_weights):
                    raise
                route = route_for(replace(needs, held=()))
        except SplitnetError as error:
            return NoRoute(asked.number, error, self._present(), swarm.was_covered)
        self._planned, self._lost = (route, swarm.planner.cost_ms(replace(needs, prompt=0), route)), True
        return Planned(asked.number, tuple(route), self._codecs_of(route))

    def step_took(self, elapsed_ms: float, positions: int) -> None:
        """Takes in the time of a decode step that had the route for itself."""
        now = time.monotonic()
        if now - self._stepped_at > TRUST_S:
            self.watch.forget_recent()
        self._stepped_at = now
        ratio = self.watch.step_took(elapsed_ms, positions)
        if ratio is not None:
            self._swarm.survey.forecast_came(tuple(hop.name for hop in self._route), ratio)

    def better(
        self, hops: Sequence[PlannedHop], needs_now: Callable[[], Needs], cached: int, steps_left: int
    ) -> Move | None:
        """A route that pays for the move from `hops`, if there is a reason to look for one and it exists.

        Args:
            hops: the present route.
            needs_now: of the session.
            cached: positions that new hops would have to be given.
            steps_left: decode steps that are expected at most.
        """
        swarm = self._swarm
        if self._route != list(hops):
            self._route = list(hops)
            # By what was known when it was planned: until the first step facts may say that it has become slow.
            route, predicted_ms = self._planned
            known = route == self._route
            self.watch.begin(predicted_ms if known else swarm.planner.cost_ms(needs_now(), hops), lost=self._lost)
        now = time.monotonic()
        surprised = self.watch.surprised
        news = self._news != swarm.fresh_facts.news or surprised
        if not (news or self._unexplained) or now - self._looked_at < PAUSE_S:
            return None
        if now - self._stepped_at > TRUST_S:
            self.watch.forget_recent()
        self._looked_at, self._news, self.watch.surprised = now, swarm.fresh_facts.news, False
        needs = needs_now()
        known_ms = swarm.planner.cost_ms(needs, hops)
        current_ms = self.watch.present_ms(known_ms)
        is_slow = self.watch.is_slow(current_ms)
        # What a hop took is known from the step. If it was one of the own links, that is measured first; of the
        # others their hops tell after some seconds.
        silent = swarm.survey.silent() & {hops[0].name, hops[-1].name}
        explained = bool(silent) or self.watch.is_slow(known_ms)
        self._unexplained = is_slow and not explained
        measures = self._unexplained and now - self._suspected_at >= LOOK_S
        if surprised or measures:
            swarm.fresh_facts.look_again([hops[0].record, hops[-1].record], probe=measures)
        if measures:
            self._suspected_at = now
        if not is_slow or measures or (self._unexplained and not news):
            return None
        try:
            route = with_kept_hops(swarm.plan(needs, holders={hop.name for hop in hops}), hops)
        except SplitnetError as error:
            log.debug("no other route: %s", error)
            return None
        if route == list(hops):
            return None
        # What is known of the present route was seen; what is known of the other was told, and may be too good.
        predicted_ms = swarm.planner.cost_ms(needs, route)
        new_ms = predicted_ms * swarm.survey.prediction_error
        if self._unexplained and set(_links(route)) & set(_links(hops)):  # which may be what is slow
            new_ms += current_ms - known_ms
        before, changed = changed_hops(hops, route)
        move_ms = swarm.planner.move_ms(needs, before, changed, max(cached, 1))
        if not self.watch.move_pays(current_ms, new_ms, move_ms, steps_left):
            return None
        self._planned, self._lost = (route, predicted_ms), False
        log.info(
            "a better route: %.0f ms per step instead of %.0f ms",
            new_ms,
            current_ms,
            extra={"step_ms": round(new_ms, 1), "former_step_ms": round(current_ms, 1)},
        )
        return Move(tuple(route), self._codecs_of(route))

    def _codecs_of(self, route: Sequence[PlannedHop]) -> tuple[Codec, ...]:
        return (self._codecs.to(route[0]), *(self._codecs.after(route, index) for index in range(len(route))))

    def _present(self) -> frozenset[str]:
        try:
            return frozenset(record.key.text for record in self._swarm.peers())
        except SplitnetError:
            return frozenset()


def _links(hops: Sequence[PlannedHop]) -> Iterable[tuple[str, str]]:
    """Between hops, by name."""
    return pairwise(hop.name for hop in hops)
