"""A client's session, and its plans: by the policy, with the knowledge of the client."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from scheduler import route as routes
from scheduler.cost import route_ms
from scheduler.facts import CLIENT, Hop, Network
from scheduler.liveness import LOST_S
from scheduler.prefill_chunks import CHUNK_SIZES, best_chunk
from scheduler.replan import PredictionErrors, RouteWatch
from scheduler.route_search import PlannedRoute, searched_route
from simulator.clients import RouteTask, SeenHop, SimulatedClient, SimulatedPlan
from simulator.node import Hops, Node, NodeRoute, Parcel
from simulator.policies import Routing
from simulator.simulated_directory import MODEL, DirectoryView, Identities, device_at
from simulator.world import SimulatedRequest, World
from splitnet.errors import CoverageError, PeerBusy
from splitnet.session.events import AskRoute, Cause, Event, MoveRoute, Received, RouteFailed, RoutePlanned
from splitnet.session.machine import SessionState
from splitnet.swarm.peer_cache import Bans
from splitnet.swarm.plan import CLIENT_ENDS, PartNeighbours, PlannedHop, no_route_error, repaired_route, with_kept_hops
from splitnet.wire.codecs import Codec, codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Failure, FailureCode, Result

RUNNING: Final = "running"
FINISHED: Final = "finished"
FAILED: Final = "failed"

POSITION: Final = bytes(4)
"""Activations with a single value save memory; `Wire` counts the time of real activations."""

PLAIN = codec_by_name("none")


class SimulatedSession:
    """One request and its session in the swarm, with the state machine of real sessions. All times in ms.

    Attributes:
        machine: the state machine.
        route: the hops of the present epoch; None: there are none. hops: the same; after the end the last ones.
        first_ms, last_ms: when the client received its first and its latest token.
        predicted_ms: of a token, by the plan of the whole route; 0: hops were replaced since.
        predictions: how many times as slow as predicted routes were.
        seen, latencies: observations at its hops, and between them.
        contacts: when the client's connection to each peer is up.
        feed: passes an event to the machine, and performs the effects.
    """

    feed: Callable[[Event], None]

    def __init__(
        self,
        request: SimulatedRequest,
        client: SimulatedClient,
        identities: Identities,
        world: World,
        clock_s: Callable[[], float],
    ) -> None:
        self.request = request
        self.client = client
        self.arrived_ms = clock_s() * 1000
        self.state = RUNNING
        self.tokens = 0
        self.first_ms = 0.0
        self.last_ms = 0.0
        self.ended_ms = 0.0
        self.predicted_ms = 0.0
        self.predictions = PredictionErrors()
        self.watch = RouteWatch()
        self.hops: Hops = []
        self.route: NodeRoute | None = None
        self.hop_observations: dict[Node, SeenHop] = {}
        self.latencies: dict[tuple[str, str], float] = {}
        self.contacts: dict[Node, float] = {}
        self.bans = Bans(clock_s)
        self.machine = SessionState(
            request.number.to_bytes(16, "big"),
            model=MODEL,
            blocks=(0, world.settings.num_blocks),
            hidden_size=1,
            reservation=request.positions,
            recovery_timeout_s=world.settings.wait_limit_s,
        )
        self._identities = identities

    @property
    def context(self) -> int:
        """Positions that its hops hold between two tokens."""
        return self.request.prompt + max(0, self.tokens - 1)

    @property
    def moves(self) -> int:
        """Changes to a better route."""
        return sum(each.cause is Cause.BETTER_ROUTE for each in self.machine.recoveries)

    @property
    def repairs(self) -> int:
        """Repairs of a route after the loss of a hop, or of messages."""
        return len(self.machine.recoveries) - self.moves

    def endpoint(self, node: Node) -> Endpoint:
        return self._identities.endpoint(node.id)

    def failure(self, node: Node, epoch: int, number: int, code: FailureCode) -> Received:
        """The refusal of a peer; number 0: it concerns the session itself."""
        message = Failure(self.machine.session, epoch, number, code, code.name.lower().replace("_", " "))
        return Received(self.endpoint(node), message)

    def observe_hop(self, node: Node, block_ms: float, wait_ms: float) -> None:
        """Records the observations of a token at a hop."""
        seen = self.hop_observations.get(node)
        if seen is None:
            seen = self.hop_observations[node] = SeenHop()
        seen.block_ms.add(block_ms)
        seen.wait_ms.add(wait_ms)

    def result(self, parcel: Parcel) -> Received:
        """The notice that a request, or a replay, is done."""
        node, _, end = parcel.route.hops[parcel.last_hop]
        payload = POSITION * parcel.keep
        message = Result(self.machine.session, parcel.route.epoch, parcel.number, end, 0, (), payload)
        return Received(self.endpoint(node), message)


class SimulatedPlanner:
    """Plans for all sessions.

    Args:
        routing: the policy.
        view: returns the present view of clients.
        nodes: all peers by id, to see whether a banned peer answers.
        choices: source of random choices.
    """

    def __init__(
        self,
        world: World,
        routing: Routing,
        identities: Identities,
        view: Callable[[], DirectoryView],
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

    def answer_query(
        self, session: SimulatedSession, asked: AskRoute
    ) -> tuple[RoutePlanned | RouteFailed, SimulatedPlan]:
        """The answer to the machine's request for a route, and the plan of the part that was planned last."""
        if asked.unban:
            for name in session.bans.keys():  # noqa: SIM118 (not a mapping)
                if self._nodes[self._identities.device(name)].serves:
                    session.bans.lift(name)
        banned = session.bans.keys()
        planned = SimulatedPlan([])

        def part(
            blocks: tuple[int, int],
            exclude: Collection[str],
            neighbours: PartNeighbours = CLIENT_ENDS,
            holders: Collection[str] = (),
        ) -> list[PlannedHop]:
            nonlocal planned
            device = self._identities.device
            source, target = (CLIENT if each is None else device(each.key.text) for each in neighbours)
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
            return RouteFailed(asked.number, error, frozenset(refused), was_covered=True), planned
        return RoutePlanned(asked.number, tuple(route), _codecs(route)), planned

    def better_route(self, session: SimulatedSession) -> tuple[MoveRoute, SimulatedPlan] | None:
        """A change of route that pays for the remaining tokens, or None."""
        present = [hop.planned for hop in session.machine.hops]
        plan = replace(
            self._plan(session, session.bans.keys()),
            present=[_named(hop) for hop in present],
            cached=session.context,
            seen={node.id: seen for node, seen in session.hop_observations.items()},
            latencies=session.latencies,
        )
        try:
            planned = self._route(session, plan)
        except (CoverageError, PeerBusy):
            return None
        if not planned.present_ms or planned.hops == plan.present:
            return None
        error = session.predictions.error if self._settings.corrects else 1.0
        left = session.request.output - session.tokens
        if session.watch.better_ms(planned.present_ms, planned.token_ms, error, planned.move_ms, left) is None:
            return None
        route = with_kept_hops(self._hops(planned.hops), present)
        return MoveRoute(tuple(route), _codecs(route)), planned

    def step_ms(self, session: SimulatedSession, positions: int, in_flight: int = 1) -> float:
        """Predicted ms of `in_flight` steps of `positions` positions on the present route; 0: not known."""
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

    def step_positions(self, session: SimulatedSession, positions: int) -> int:
        """The size of the steps into which a client cuts this many positions, as real clients do."""
        if positions <= CHUNK_SIZES[0]:
            return positions
        return best_chunk(
            positions,
            lambda size: self.step_ms(session, size),
            lambda size: self.step_ms(session, size, 2) - self.step_ms(session, size),
        )

    def _plan(self, session: SimulatedSession, exclude: Collection[str]) -> RouteTask:
        request, ids = session.request, {self._identities.device(name) for name in exclude}
        return RouteTask(session.client, request, self._blocks, CLIENT, CLIENT, ids, request.positions)

    def _route(self, session: SimulatedSession, plan: RouteTask) -> SimulatedPlan:
        """Plans around silent peers, as real clients do."""
        now_s, holders = self._clock_s(), {hop.peer for hop in plan.present}
        searcher = _SimulatedSearcher(self._world, self._routing, self._view(), self._choices, plan, now_s)
        planned = searched_route(
            searcher,
            plan.client.answers,
            excluded=plan.exclude,
            given_up=set(map(self._identities.device, session.bans.keys())),
            alive={*holders, plan.source, plan.target},
            since_s=now_s - LOST_S,
        )
        for name in searcher.contacts:
            session.contacts.setdefault(self._nodes[name], now_s * 1000)
        return replace(planned, asked_ms=planned.asked_ms + searcher.waited_ms)

    def _hops(self, hops: Sequence[Hop]) -> list[PlannedHop]:
        records = self._view().records
        return [self._identities.hop(hop, records[hop.peer]) for hop in hops]


class _SimulatedSearcher:
    """Plans and measures for the search of a route, see `Searcher`.

    Attributes:
        names: of all peers in view.
        contacts: peers that the search has pinged. waited_ms: duration of the pings.
    """

    def __init__(
        self, world: World, routing: Routing, view: DirectoryView, choices: random.Random, plan: RouteTask, now_s: float
    ) -> None:
        self.now_s = now_s
        self.peer_names = view.records.keys()
        self.contacts: list[str] = []
        self.waited_ms = 0.0
        self._world = world
        self._routing = routing
        self._view = view
        self._choices = choices
        self._plan = plan
        self._client = plan.client

    def plan_route(self, left_out: frozenset[str]) -> PlannedRoute[SimulatedPlan] | None:
        try:
            plan = replace(self._plan, exclude={*self._plan.exclude, *left_out})
            route = self._routing.route(plan, self._view, self._choices)
        except routes.NoRoute as error:
            if left_out:
                return None
            raise no_route_error(error, "simulated", lambda start, end: f"blocks {start}:{end}") from None
        holders = {hop.peer for hop in self._plan.present}
        # Bandwidths are known, so no end is unmeasured.
        return PlannedRoute(route, unmeasured=(), newcomers=[hop.peer for hop in route.hops if hop.peer not in holders])

    def measure_peers(self, ends: Sequence[str], others: Sequence[str]) -> set[str] | None:
        asked = list(others)[: self._client.pings_left(self.now_s) // 2]
        if not asked:
            return None
        self.waited_ms += self._client.measure_links(self._world, asked, self.now_s, self._choices.random)
        self.contacts += asked
        return set()

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        return self._view.idle_crowd.beside_silent(silent, answered) if self._routing.has_coordinates else set()

    def choose_peers(self, among: AbstractSet[str], count: int, *, likely: bool) -> list[str]:
        if likely:
            return self._client.likely_peers(self._world, self._view, count, self.peer_names - among)
        return self._choices.sample(sorted(among), min(len(among), count))


def _named(hop: PlannedHop) -> Hop:
    return Hop(device_at(hop.record.endpoint), hop.start, hop.end)


def _codecs(route: Sequence[PlannedHop]) -> tuple[Codec, ...]:
    return (PLAIN,) * (len(route) + 1)
