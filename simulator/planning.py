"""What the machine of a session has planned: by the policy, with what the client knows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from scheduler import route as routes
from scheduler.batching import SIZES, best_step
from scheduler.cost import route_ms
from scheduler.facts import CLIENT, Hop, Network
from simulator.directory import View
from simulator.identities import Identities, device_at
from simulator.node import Node
from simulator.policies import Plan, Planned, Routing
from simulator.session import Session
from simulator.world import World
from splitnet.errors import CoverageError, PeerBusy
from splitnet.session.events import AskRoute, Move, NoRoute
from splitnet.session.events import Planned as RoutePlanned
from splitnet.swarm.measure import SILENT_S
from splitnet.swarm.plan import (
    HEARD_S,
    Ends,
    PlannedHop,
    no_route_error,
    repaired_route,
    searched_route,
    with_kept_hops,
)
from splitnet.wire.codecs import Codec, codec_by_name

PLAIN = codec_by_name("none")


class Planning:
    """Plans for all sessions.

    Args:
        routing: the policy.
        view: what clients know now.
        nodes: all peers by id, to see whether one that is banned answers.
        choices: makes the random ones.
    """

    def __init__(
        self,
        world: World,
        routing: Routing,
        identities: Identities,
        view: Callable[[], View],
        nodes: Mapping[str, Node],
        choices: random.Random,
        clock_s: Callable[[], float],
    ) -> None:
        self._world = world
        self._settings = world.settings
        self._blocks = (0, world.settings.num_blocks)
        self._routing = routing
        self._identities = identities
        self._view = view
        self._nodes = nodes
        self._choices = choices
        self._clock_s = clock_s

    @property
    def replans(self) -> bool:
        """Whether sessions look for better routes while they run."""
        return self._routing.replans

    def answer(self, session: Session, asked: AskRoute) -> tuple[RoutePlanned | NoRoute, Planned]:
        """The answer to a machine's question, and what the policy says of the last part that it planned."""
        if asked.unban:
            for name in session.bans.keys():  # noqa: SIM118 (not a mapping)
                if self._nodes[self._identities.device(name)].serves:
                    session.bans.lift(name)
        banned = session.bans.keys()
        planned = Planned([])

        def part(
            blocks: tuple[int, int], ends: Ends, exclude: Collection[str], holders: Collection[str]
        ) -> list[PlannedHop]:
            nonlocal planned
            source, target = (self._identities.device(end.key.text) if end is not None else CLIENT for end in ends)
            plan = replace(
                self._plan(session, {*exclude, *banned}),
                blocks=blocks,
                source=source,
                target=target,
                prompt=0 if session.tokens else session.request.prompt,
                present=[_named(hop) for hop in asked.kept if hop.name in holders],
            )
            planned = self._route(session, plan)
            return self._hops(planned.hops)

        try:
            route = repaired_route(asked.kept, asked.excluded, self._blocks, part)
        except (CoverageError, PeerBusy) as error:
            known = self._view().records
            refused = {name for name in asked.excluded if self._identities.device(name) in known}
            return NoRoute(asked.number, error, frozenset(refused), was_covered=True), planned
        return RoutePlanned(asked.number, tuple(route), _codecs(route)), planned

    def better(self, session: Session) -> tuple[Move, Planned] | None:
        """A change of route that pays for the tokens that are left, or None."""
        present = [hop.planned for hop in session.machine.hops]
        plan = replace(
            self._plan(session, session.bans.keys()),
            present=[_named(hop) for hop in present],
            cached=session.context,
            seen={node.id: seen for node, seen in session.seen.items()},
            latencies=session.latencies,
        )
        try:
            planned = self._route(session, plan)
        except (CoverageError, PeerBusy):
            return None
        if not planned.present_ms or planned.hops == plan.present:
            return None
        # What is known of the present route was seen; what is known of the other was told, and is doubted.
        new_ms = planned.token_ms * (session.forecasts.error if self._settings.doubts else 1.0)
        left = session.request.output - session.tokens
        present_ms = session.watch.present_ms(planned.present_ms)
        if not session.watch.move_pays(present_ms, new_ms, planned.move_ms, left):
            return None
        route = with_kept_hops(self._hops(planned.hops), present)
        return Move(tuple(route), _codecs(route)), planned

    def step_ms(self, session: Session, positions: int, in_flight: int = 1) -> float:
        """What so many steps of so many positions are predicted to take on the present route; 0: not known."""
        hops = [_named(hop.planned) for hop in session.machine.hops]
        view = self._view()
        if any(hop.peer not in view.records for hop in hops):
            return 0.0
        places = {CLIENT: session.client.place, **{hop.peer: view.records[hop.peer].place for hop in hops}}
        return route_ms(
            hops,
            {hop.peer: view.records[hop.peer].peer for hop in hops},
            Network(session.client.links, places=places),
            positions=positions,
            encodings=self._settings.encodings,
            in_flight=in_flight,
        )

    def step_positions(self, session: Session, positions: int) -> int:
        """Into steps of what size so many positions are cut, as a real client cuts them."""
        if positions <= SIZES[0]:
            return positions
        return best_step(
            positions,
            lambda size: self.step_ms(session, size),
            lambda size: self.step_ms(session, size, 2) - self.step_ms(session, size),
        )

    def _plan(self, session: Session, exclude: Collection[str]) -> Plan:
        request, ids = session.request, {self._identities.device(name) for name in exclude}
        return Plan(session.client, request, self._blocks, CLIENT, CLIENT, ids, request.positions)

    def _route(self, session: Session, plan: Plan) -> Planned:
        """Past silent peers, as real clients search for it."""
        grounds = _Grounds(self._world, self._routing, self._view(), self._choices, plan, self._clock_s())
        grounds.given_up = set(map(self._identities.device, session.bans.keys()))
        planned = searched_route(grounds, {*grounds.holders, plan.source, plan.target})
        for name in grounds.contacts:
            session.contacts.setdefault(self._nodes[name], self._clock_s() * 1000)
        return replace(planned, asked_ms=planned.asked_ms + grounds.waited_ms)

    def _hops(self, hops: Sequence[Hop]) -> list[PlannedHop]:
        records = self._view().records
        return [self._identities.hop(hop, records[hop.peer]) for hop in hops]


class _Grounds:
    """What a simulated client searches for a route with, see `Grounds`.

    Attributes:
        given_up: whom the session does not ask for a while.
        contacts: whom the search has asked. waited_ms: how long that took.
    """

    def __init__(
        self, world: World, routing: Routing, view: View, choices: random.Random, plan: Plan, now_s: float
    ) -> None:
        self.excluded = plan.exclude
        self.holders = {hop.peer for hop in plan.present}
        self.given_up: set[str] = set()
        self.contacts: list[str] = []
        self.waited_ms = 0.0
        self._world = world
        self._routing = routing
        self._view = view
        self._choices = choices
        self._plan = plan
        self._client = plan.client
        self._now_s = now_s

    def route(self, left_out: frozenset[str]) -> Planned:
        try:
            plan = replace(self._plan, exclude={*self._plan.exclude, *left_out})
            return self._routing.route(plan, self._view, self._choices)
        except routes.NoRoute as error:
            raise no_route_error(error, "simulated", lambda start, end: f"blocks {start}:{end}") from None

    def unmeasured(self, route: Planned) -> list[str]:
        """Bandwidths are known."""
        return []

    def unheard(self, route: Planned) -> list[str]:
        since_s, asked_s = self._now_s - HEARD_S, self._client.asked_s
        names = (hop.peer for hop in route.hops if hop.peer not in self.holders)
        return [name for name in names if asked_s.get(name, -math.inf) < since_s]

    def measure(self, ends: Collection[str], others: Collection[str]) -> bool:
        asked = list(others)[: self._client.pings_left(self._now_s) // 2]
        if asked:
            self.waited_ms += self._client.measure(self._world, asked, self._now_s, self._choices.random)
        self.contacts += asked
        return bool(asked)

    def lost(self) -> set[str]:
        asked_s, since_s = self._client.asked_s, self._now_s - SILENT_S
        lately = (name for name in self._client.silent if asked_s[name] > since_s)
        return {*lately, *self.given_up} & self._view.records.keys()

    def silent(self) -> set[str]:
        return self._client.silent

    def met(self) -> tuple[set[str], set[str]]:
        return self._client.asked_since(self._now_s - HEARD_S)

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        return self._view.idle_crowd.beside_silent(silent, answered) if self._routing.has_coordinates else set()

    def unasked(self, met: set[str]) -> tuple[set[str], set[str]]:
        unasked = self._view.records.keys() - met
        return unasked, unasked - self._client.asked_s.keys()

    def likely(self, among: set[str], count: int) -> list[str]:
        return self._client.likely(self._world, self._view, count, self._view.records.keys() - among)

    def drawn(self, among: set[str], count: int) -> list[str]:
        return self._choices.sample(sorted(among), min(len(among), count))


def _named(hop: PlannedHop) -> Hop:
    return Hop(device_at(hop.endpoint), hop.start, hop.end)


def _codecs(route: Sequence[PlannedHop]) -> tuple[Codec, ...]:
    return (PLAIN,) * (len(route) + 1)
