"""What the machine of a session has planned: by the policy, with what the client knows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from scheduler import route as routes
from scheduler.cost import route_ms
from scheduler.network import CLIENT, Network
from scheduler.prefill import SIZES, best_step
from scheduler.replan import move_pays
from scheduler.swarm import Hop
from splitnet.client.fresh_facts import PINGED_AT_ONCE
from splitnet.client.planner import Ends, PlannedHop, no_route_error, repaired_route, with_kept_hops
from splitnet.client.session_events import AskRoute, Move, NoRoute
from splitnet.client.session_events import Planned as RoutePlanned
from splitnet.client.survey import SILENT_S
from splitnet.client.swarm import ASKED_BESIDE, HEARD_S, MANY_SILENT, MAX_PROBED_ROUTES
from splitnet.errors import CoverageError, PeerBusy
from splitnet.net.codecs import Codec, codec_by_name
from splitnet.simulation.directory import View
from splitnet.simulation.identities import Identities, device_at
from splitnet.simulation.node import Node
from splitnet.simulation.policies import Plan, Planned, Routing
from splitnet.simulation.session import Session
from splitnet.simulation.world import World

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
            planned = self._checked_route(session, plan)
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
            planned = self._checked_route(session, plan)
        except (CoverageError, PeerBusy):
            return None
        if not planned.present_ms or planned.hops == plan.present:
            return None
        # What is known of the present route was seen; what is known of the other was told, and is doubted.
        new_ms = planned.token_ms * (session.forecasts.error if self._settings.doubts else 1.0)
        left = session.request.output - session.tokens
        present_ms = session.watch.present_ms(planned.present_ms)
        if not move_pays(present_ms, new_ms, planned.move_ms, left, session.watch.expected_ms):
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

    def _checked_route(self, session: Session, plan: Plan) -> Planned:
        """Where peers are silent, hops are asked before they are used, as `splitnet/client/swarm.py` does."""
        client, records, now_s, waited_ms = plan.client, self._view().records, self._clock_s(), 0.0
        holders = {hop.peer for hop in plan.present}
        planned = self._route(plan)
        beside: set[str] = set()
        others: list[str] = []
        for _ in range(MAX_PROBED_ROUTES):
            lately = (name for name in client.silent if client.asked_s[name] > now_s - SILENT_S)
            lost = {*lately, *map(self._identities.device, session.bans.keys())} & records.keys()
            names = [hop.peer for hop in planned.hops if hop.peer not in holders]
            doubted = [name for name in names if client.asked_s.get(name, -math.inf) < now_s - HEARD_S]
            asked = [*doubted, *others][: client.pings_left(now_s) // 2]
            if len(lost) < MANY_SILENT or not doubted or not asked:
                break
            waited_ms += client.measure(self._world, asked, now_s, self._choices.random)
            for name in asked:
                session.contacts.setdefault(self._nodes[name], now_s * 1000)
            if not beside and client.silent.isdisjoint(doubted):
                break
            beside, others = self._elsewhere(plan, {*holders, plan.source, plan.target})
            planned = self._route(plan, beside)
        return replace(planned, asked_ms=planned.asked_ms + waited_ms)

    def _elsewhere(self, plan: Plan, alive: set[str]) -> tuple[set[str], list[str]]:
        """As the same method of `splitnet/client/swarm.py`."""
        client, view = plan.client, self._view()
        silent, heard = client.asked_since(self._clock_s() - HEARD_S)
        beside = (
            view.idle_crowd.beside_silent(silent, alive.union(heard)) if self._routing.has_coordinates else set[str]()
        )
        elsewhere = view.records.keys() - beside
        near = client.likely(self._world, view, ASKED_BESIDE, {*plan.exclude, *client.silent, *heard, *elsewhere})
        if heard:
            asked = client.likely(self._world, view, PINGED_AT_ONCE, {*plan.exclude, *client.asked_s, *beside})
            return beside, near + asked
        unknown = sorted(elsewhere - client.asked_s.keys() - set(plan.exclude))
        return beside, self._choices.sample(unknown, min(len(unknown), PINGED_AT_ONCE))

    def _route(self, plan: Plan, beside: Collection[str] = ()) -> Planned:
        """Through peers that have answered, if there are enough of them, as `splitnet/client/swarm.py` does.

        beside: who stands beside silent ones.
        """
        silent = plan.client.silent.difference(plan.exclude)
        *doubted, nobody = dict.fromkeys(map(frozenset, (silent.union(beside), silent, ())))

        def route_without(names: frozenset[str]) -> Planned:
            return self._routing.route(replace(plan, exclude={*plan.exclude, *names}), self._view(), self._choices)

        for names in doubted:
            with suppress(routes.NoRoute):
                return route_without(names)
        try:
            return route_without(nobody)
        except routes.NoRoute as error:
            raise no_route_error(error, "simulated") from None

    def _hops(self, hops: Sequence[Hop]) -> list[PlannedHop]:
        records = self._view().records
        return [self._identities.hop(hop, records[hop.peer]) for hop in hops]


def _named(hop: PlannedHop) -> Hop:
    return Hop(device_at(hop.endpoint), hop.start, hop.end)


def _codecs(route: Sequence[PlannedHop]) -> tuple[Codec, ...]:
    return (PLAIN,) * (len(route) + 1)
