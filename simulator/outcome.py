"""The results of clients under a policy, and the extra cost of routes that are planned with little knowledge.

The latter is measured at the start of a world, when no peer is busy, with the true links.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from scheduler.cost import route_ms
from scheduler.facts import CLIENT, Hop
from scheduler.route import NoRoute
from simulator.clients import RouteTask, SimulatedClient, new_client
from simulator.geography import TrueNetwork
from simulator.membership import OwnPlacing
from simulator.policies import NO_LIMIT, POLICIES, Best, BestOptions, RandomRoute, Routing
from simulator.session import FINISHED
from simulator.simulation import Simulation
from simulator.world import SimulatedRequest, World
from splitnet.errors import SplitnetError
from splitnet.swarm.plan import no_route_error

SETTLED_MS: Final = 60_000.0
"""Peers that served for a shorter time (in ms) do not count in the balance of load."""

T_QUANTILES: Final = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)
"""97.5% quantiles of Student's t-distribution, by the degrees of freedom from 1 on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one policy in one or more worlds.

    ttft_ms: from the client's request for a route to the first token, of sessions that got one. token_ms: mean time
    between tokens, of each session with two or more. hops: of each finished session. utilisation: of each peer, the
    busy share of its serving time. tokens: received within time_s, the time in which clients arrive. predicted:
    predicted time per token as a share of the actual one, of sessions that kept their route.
    """

    sessions: int
    failed: int
    ttft_ms: Sequence[float]
    token_ms: Sequence[float]
    hops: Sequence[int]
    utilisation: Sequence[float]
    predicted: Sequence[float]
    tokens: int
    time_s: float
    peer_moves: int
    session_moves: int
    repairs: int
    record_bytes: int

    @property
    def goodput(self) -> float:
        """Tokens per second that clients received."""
        return self.tokens / self.time_s

    @property
    def gini(self) -> float:
        """Inequality of the peers' load: 0, all are equally busy; 1, one peer does all work."""
        busy = np.sort(np.array(self.utilisation))
        if not len(busy) or busy.sum() == 0:
            return 0.0
        ranks = np.arange(1, len(busy) + 1)
        return float((2 * ranks - len(busy) - 1) @ busy / (len(busy) * busy.sum()))

    def figures(self) -> dict[str, float]:
        """The figures to compare; NaN if no value was measured."""
        return {
            "ttft_p50_s": percentile(self.ttft_ms, 50) / 1000,
            "ttft_p95_s": percentile(self.ttft_ms, 95) / 1000,
            "token_p50_ms": percentile(self.token_ms, 50),
            "token_p95_ms": percentile(self.token_ms, 95),
            "goodput_tokens_per_s": self.goodput,
            "sessions": self.sessions,
            "failed": self.failed,
            "hops_mean": sum(self.hops) / max(1, len(self.hops)),
            "utilisation_max": max(self.utilisation, default=0.0),
            "utilisation_mean": sum(self.utilisation) / max(1, len(self.utilisation)),
            "utilisation_gini": self.gini,
            "foretold_p50": percentile(self.predicted, 50),
            "peer_moves": self.peer_moves,
            "session_moves": self.session_moves,
            "repairs": self.repairs,
            "record_bytes": self.record_bytes,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """NaN if there are no values."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def outcome_of(simulation: Simulation) -> Outcome:
    """The outcome of a simulation that has ended."""
    sessions = simulation.sessions
    finished = [session for session in sessions if session.state == FINISHED]
    several = [session for session in sessions if session.tokens > 1]
    took_ms = {session: (session.last_ms - session.first_ms) / (session.tokens - 1) for session in several}
    return Outcome(
        sessions=len(sessions),
        failed=len(sessions) - len(finished),
        ttft_ms=[session.first_ms - session.arrived_ms for session in sessions if session.tokens],
        token_ms=list(took_ms.values()),
        hops=[len(session.hops) for session in finished],
        utilisation=[
            node.busy_ms / node.served_ms for node in simulation.nodes.values() if node.served_ms >= SETTLED_MS
        ],
        predicted=[
            session.predicted_ms / took
            for session, took in took_ms.items()
            if session.predicted_ms and not session.repairs and not session.moves
        ],
        tokens=simulation.tokens_in_time,
        time_s=simulation.world.settings.duration_s,
        peer_moves=simulation.membership.moves,
        session_moves=sum(session.moves for session in sessions),
        repairs=sum(session.repairs for session in sessions),
        record_bytes=simulation.membership.record_bytes,
    )


def simulate(world: World, policy: str, progress: Callable[[float], None] | None = None) -> Outcome:
    """Simulates the clients of a world under a policy, one of `POLICIES`; deterministic.

    progress: called from time to time with the share of the clients that have arrived.
    """
    chosen = POLICIES[policy]
    world = world.with_rules(**chosen.rules)
    simulation = Simulation(world, chosen.routing(world), chosen.placing(world))
    for share in simulation.run():
        if progress:
            progress(share)
    return outcome_of(simulation)


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """The results of one policy in several worlds, pooled as if they were of one world."""
    totals: dict[str, Any] = {}
    for field in fields(Outcome):
        first, *others = (getattr(outcome, field.name) for outcome in outcomes)
        totals[field.name] = sum(others, first)
    totals["record_bytes"] = max(outcome.record_bytes for outcome in outcomes)
    return Outcome(**totals)


def differences(outcomes: Sequence[Outcome], others: Sequence[Outcome], figure: str) -> tuple[float, float, float]:
    """The share by which a figure of `outcomes` exceeds that of `others` in the same worlds: mean, and 95% interval.

    The mean of the ratios is geometric. A world in which one of the two is 0 or missing does not count; an interval
    over less than two worlds is NaN.
    """
    pairs = [(one.figures()[figure], other.figures()[figure]) for one, other in zip(outcomes, others, strict=True)]
    ratios = np.log([one / other for one, other in pairs if one > 0 and other > 0])
    if not len(ratios):
        return float("nan"), float("nan"), float("nan")
    spread = float("nan")
    if len(ratios) > 1:
        quantile = T_QUANTILES[min(len(ratios) - 1, len(T_QUANTILES)) - 1]
        spread = quantile * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    mean = float(ratios.mean())
    return float(np.expm1(mean)), float(np.expm1(mean - spread)), float(np.expm1(mean + spread))


PAIRS: Final = 20_000

EXACT_PEERS: Final = 2000
"""With more peers than this, a table of all links takes gigabytes, and routes over all peers are left out."""

NARROW: Final = BestOptions(spread=False)
"""As real clients plan."""

PLANS: Final = (
    ("all links known, of all peers", BestOptions(limit=NO_LIMIT, true_links=True, spread=False)),
    ("all links known, of 300 candidates", BestOptions(true_links=True, spread=False)),
    ("all links known, of 100 candidates", BestOptions(limit=100, true_links=True, spread=False)),
    ("coordinates and measured links, of all peers", BestOptions(limit=NO_LIMIT, spread=False)),
    ("coordinates and measured links, of 300 candidates", NARROW),
    ("the same, and the links of the new route asked for, twice", BestOptions(checks=2, spread=False)),
    ("measured links, no coordinates, of all peers", BestOptions(limit=NO_LIMIT, coordinates=False, spread=False)),
)


@dataclass(frozen=True, slots=True)
class CoordinateError:
    """Relative errors of predicted round trips between peers. fell_short: share of pairs predicted too near."""

    median: float
    p90: float
    fell_short: float


@dataclass(frozen=True, slots=True)
class PlanQuality:
    """Quality of one planning method. excess: share by which a token takes longer than with the first method, per
    client.

    plan_ms: median duration of a plan.
    """

    name: str
    excess: Sequence[float]
    plan_ms: float


def coordinate_error(world: World) -> CoordinateError:
    """Errors over random pairs of the initial peers. Raises SplitnetError if there are fewer than two peers."""
    if len(world.coordinates) < 2:
        raise SplitnetError("a single peer has no distances: simulate at least two")
    rng = np.random.default_rng([world.settings.seed, 4])
    here, there = rng.integers(0, len(world.coordinates), (2, PAIRS))
    here, there = here[here != there], there[here != there]
    vectors = np.array([coordinate.vector for coordinate in world.coordinates])
    heights = np.array([coordinate.height_ms for coordinate in world.coordinates])
    predicted = np.sqrt(((vectors[here] - vectors[there]) ** 2).sum(axis=1)) + heights[here] + heights[there]
    pairs: list[tuple[int, int]] = np.stack([here, there], axis=1).tolist()
    true = np.array([2 * world.geography.one_way_ms(one, other) for one, other in pairs])
    errors = np.abs(predicted - true) / true
    return CoordinateError(float(np.median(errors)), float(np.percentile(errors, 90)), float((predicted < true).mean()))


def plan_qualities(world: World, clients: int, clock: Callable[[], float]) -> Iterator[PlanQuality]:
    """Qualities for the first clients of a world: all methods of `PLANS` that fit the swarm's size, and a random route.

    clock: returns the time in seconds, to measure the duration of planning.

    Raises CoverageError if the peers do not serve all blocks.
    """
    simulation = Simulation(world, RandomRoute(world), OwnPlacing(world))
    view = simulation.membership.view
    rng = np.random.default_rng([world.settings.seed, 5])
    requests = world.requests[:clients]
    asking = [new_client(world, request.number, view, rng) for request in requests]
    sparing = world.with_rules(probes=(16, 16))
    measuring_less = [new_client(sparing, request.number, view, rng) for request in requests]

    def costs(routing: Routing, asking: Sequence[SimulatedClient]) -> tuple[list[float], float]:
        took_ms: list[float] = []
        found: list[float] = []
        for client, request in zip(asking, requests, strict=True):
            began = clock()
            try:
                planned = routing.route(_plan(client, request, world), view, random.Random(request.number))
            except NoRoute as error:
                raise no_route_error(error, "simulated", lambda start, end: f"blocks {start}:{end}") from None
            took_ms.append((clock() - began) * 1000)
            found.append(true_ms(planned.hops, client))
        return found, float(np.median(took_ms))

    def true_ms(hops: Sequence[Hop], client: SimulatedClient) -> float:
        peers = {hop.peer: view.records[hop.peer].peer for hop in hops}
        network = TrueNetwork(world.geography, world.names_for(client.number))
        return route_ms(hops, peers, network, positions=1, encodings=world.settings.encodings)

    ways: list[tuple[str, Routing, Sequence[SimulatedClient]]] = [
        *(
            (name, Best(world, options), asking)
            for name, options in PLANS
            if options.limit != NO_LIMIT or len(view.peers) <= EXACT_PEERS
        ),
        ("the client measures 32 links, of 300 candidates", Best(world, NARROW), measuring_less),
        ("random route", RandomRoute(world), asking),
    ]
    best: list[float] = []
    for name, routing, clients_asking in ways:
        found, took_ms = costs(routing, clients_asking)
        best = best or found
        yield PlanQuality(name, [cost / least - 1 for cost, least in zip(found, best, strict=True)], took_ms)


def _plan(client: SimulatedClient, request: SimulatedRequest, world: World) -> RouteTask:
    return RouteTask(client, request, (0, world.settings.num_blocks), CLIENT, CLIENT, frozenset(), request.positions)
