"""What it costs a client's route that links are predicted, and that not all peers are planned with.

All routes are planned with the facts with which a world begins, in which no peer is busy, and judged by the links as
they are. So what is told here is the planning alone; what becomes of the sessions, `Simulation` tells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from scheduler.cost import route_ms
from scheduler.facts import CLIENT, Hop
from scheduler.route import NoRoute
from simulator.clients import Client, new_client
from simulator.engine import Simulation
from simulator.geography import TrueNetwork
from simulator.placing import OwnPlacing
from simulator.policies import Best, BestOptions, Plan, RandomRoute, Routing
from simulator.variants import EVERYBODY
from simulator.world import Request, World
from splitnet.errors import SplitnetError
from splitnet.swarm.plan import no_route_error

PAIRS: Final = 20_000

EXACT_PEERS: Final = 2000
"""Above that a table of all links takes gigabytes: routes over all peers are left out."""

NARROW: Final = BestOptions(spread=False)
"""As clients plan."""

PLANS: Final = (
    ("all links known, of all peers", BestOptions(limit=EVERYBODY, true_links=True, spread=False)),
    ("all links known, of 300 candidates", BestOptions(true_links=True, spread=False)),
    ("all links known, of 100 candidates", BestOptions(limit=100, true_links=True, spread=False)),
    ("coordinates and measured links, of all peers", BestOptions(limit=EVERYBODY, spread=False)),
    ("coordinates and measured links, of 300 candidates", NARROW),
    ("the same, and the links of the new route asked for, twice", BestOptions(checks=2, spread=False)),
    ("measured links, no coordinates, of all peers", BestOptions(limit=EVERYBODY, coordinates=False, spread=False)),
)


@dataclass(frozen=True, slots=True)
class CoordinateError:
    """Relative errors of round trips predicted between peers. fell_short: share of pairs predicted too near."""

    median: float
    p90: float
    fell_short: float


@dataclass(frozen=True, slots=True)
class PlanQuality:
    """Of one way to plan. excess: by how much a token takes longer than with the first way of all, for each client.

    plan_ms: median of the time that a plan took.
    """

    name: str
    excess: Sequence[float]
    plan_ms: float


def coordinate_error(world: World) -> CoordinateError:
    """Over random pairs of the peers that are there from the start. Raises SplitnetError if there are no two."""
    if len(world.coordinates) < 2:
        raise SplitnetError("one peer is nowhere: simulate two and more")
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
    """For the first clients of a world each way of `PLANS` that the swarm is small enough for, and a random route.

    clock: gives the time in seconds, to measure how long planning takes.

    Raises CoverageError if the peers do not serve all blocks.
    """
    simulation = Simulation(world, RandomRoute(world), OwnPlacing(world))
    view = simulation.membership.view
    rng = np.random.default_rng([world.settings.seed, 5])
    requests = world.requests[:clients]
    asking = [new_client(world, request.number, view, rng) for request in requests]
    sparing = world.under(probes=(16, 16))
    measuring_less = [new_client(sparing, request.number, view, rng) for request in requests]

    def costs(routing: Routing, asking: Sequence[Client]) -> tuple[list[float], float]:
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

    def true_ms(hops: Sequence[Hop], client: Client) -> float:
        peers = {hop.peer: view.records[hop.peer].peer for hop in hops}
        network = TrueNetwork(world.geography, world.names_for(client.number))
        return route_ms(hops, peers, network, positions=1, encodings=world.settings.encodings)

    ways: list[tuple[str, Routing, Sequence[Client]]] = [
        *(
            (name, Best(world, options), asking)
            for name, options in PLANS
            if options.limit != EVERYBODY or len(view.peers) <= EXACT_PEERS
        ),
        ("the client measures 32 links, of 300 candidates", Best(world, NARROW), measuring_less),
        ("random route", RandomRoute(world), asking),
    ]
    best: list[float] = []
    for name, routing, clients_asking in ways:
        found, took_ms = costs(routing, clients_asking)
        best = best or found
        yield PlanQuality(name, [cost / least - 1 for cost, least in zip(found, best, strict=True)], took_ms)


def _plan(client: Client, request: Request, world: World) -> Plan:
    return Plan(client, request, (0, world.settings.num_blocks), CLIENT, CLIENT, frozenset(), request.positions)
