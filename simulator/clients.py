"""A client: its place, its measured links, the observations of its session, and its requests for routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from scheduler.batching import MovingAverage
from scheduler.candidates import measurement_rounds
from scheduler.facts import CLIENT, DIMENSIONS, Coordinate, Hop, Link, NetworkPlace, Peer, place_among
from scheduler.liveness import ANSWER_S
from scheduler.route_search import PingHistory
from simulator.simulated_directory import DirectoryView, Record
from simulator.world import SimulatedRequest, World
from splitnet.swarm.measure import PINGS_PER_MINUTE
from splitnet.wire.messages import LoadReport

CONNECT_TRIPS: Final = 4
"""Round trips until a connection is up: one of TCP, one of ZeroMQ's greetings, two of CurveZMQ."""

ENDS_PINGS: Final = 20
"""Number of pings per minute that are reserved for the two ends of a route."""

PING_TRIPS: Final = CONNECT_TRIPS + 2
"""Round trips of a measurement that includes opening the link."""


SHARE: Final = 0.5
"""Weight of the latest token in the averages of a session's observations."""


def _idle(_: str) -> tuple[float, float]:
    return 0.0, 0.0


@dataclass(slots=True)
class SimulatedClient:
    """A client. number: its number in the geography. links: measured links to and from peers.

    answers: which peers answered the measurements. told: the load that these peers reported then. load_of: returns the
    ms that a step waits at a peer at present, and the positions of others in its pass.
    """

    number: int
    place: NetworkPlace
    links: dict[tuple[str, str], Link] = field(default_factory=dict[tuple[str, str], Link])
    answers: PingHistory = field(default_factory=lambda: PingHistory(silent_s=math.inf))
    """Never expires: in the short life of a simulated client no peer returns."""
    reported_load: dict[str, LoadReport] = field(default_factory=dict[str, LoadReport])
    load_of: Callable[[str], tuple[float, float]] = _idle

    def measure_links(self, world: World, names: Collection[str], now_s: float, luck: Callable[[], float]) -> float:
        """Measures links, each up to 10% too long. Returns the ms that this takes, including connecting. luck: random,
        0 to 1."""
        took_ms = 0.0
        for name in names:
            number = world.number_of[name]
            late = 1 + 0.1 * luck()
            is_there = world.devices[number].leaves_s > now_s
            self.answers.record_ping(name, now_s, answered=is_there)
            if not is_there:
                self.reported_load.pop(name, None)
                took_ms = ANSWER_S * 1000
                continue
            self.reported_load[name] = LoadReport(*self.load_of(name), now_s)
            for sender, receiver, pair in (
                (self.number, number, (CLIENT, name)),
                (number, self.number, (name, CLIENT)),
            ):
                link = world.geography.link(sender, receiver)
                self.links[pair] = Link(link.latency_ms * late, link.bytes_per_ms)
            took_ms = max(took_ms, 2 * PING_TRIPS * self.links[CLIENT, name].latency_ms)
        return took_ms

    def measured_peer(self, record: Record) -> Peer | None:
        """The facts of a peer when it was measured, if it was measured after its record was published; else None."""
        told = self.reported_load.get(record.peer.id)
        if told is None or told.at <= record.published_s:
            return None
        return replace(record.peer, queue_ms=told.wait_ms, batch=told.batch)

    def likely_peers(self, world: World, view: DirectoryView, limit: int, exclude: Collection[str]) -> list[str]:
        """The `limit` peers that the client's routes use most likely."""
        near = view.idle_crowd.near(
            [self.place],
            (0, world.settings.num_blocks),
            encodings=world.settings.encodings,
            kv_needed=1,
            exclude=exclude,
            limit=limit,
            everywhere=False,
        )
        return [peer.id for peer in near]

    def pings_left(self, now_s: float) -> int:
        """Pings left in this minute, without those for the ends of a route. A silent peer costs none."""
        _, answered = self.answers.met_since(now_s - 60.0)
        return max(0, PINGS_PER_MINUTE - ENDS_PINGS - 2 * len(answered))


def new_client(
    world: World,
    number: int,
    view: DirectoryView,
    rng: np.random.Generator,
    now_s: float = 0.0,
    load_of: Callable[[str], tuple[float, float]] = _idle,
) -> SimulatedClient:
    """A client that has measured its links to random peers, and then to likely peers of its routes."""
    settings, count = world.settings, len(view.peers)
    random_probes, *likely = measurement_rounds(count) if settings.probes is None else settings.probes
    client = SimulatedClient(number, NetworkPlace(Coordinate(), float(world.geography.up[number])), load_of=load_of)

    def measure(names: Sequence[str]) -> None:
        client.measure_links(world, names, now_s, rng.random)
        silent = client.answers.silent_peers(now_s)
        measured = [
            (view.records[name].place.coordinate, 2 * client.links[CLIENT, name].latency_ms)
            for name in client.answers.asked_s()
            if name not in silent
        ]
        client.place = replace(
            client.place, coordinate=place_among(measured, tuple(rng.normal(size=DIMENSIONS).tolist()))
        )

    chosen: list[int] = rng.choice(count, min(random_probes, count), replace=False).tolist()
    measure([view.peers[index].id for index in chosen])
    for limit in likely:
        measure(client.likely_peers(world, view, limit, client.answers.asked_s()))
    return client


@dataclass(slots=True)
class SeenHop:
    """Observations of a session at a hop, averaged over its latest tokens: ms per block of a pass, ms of waiting."""

    block_ms: MovingAverage = field(default_factory=lambda: MovingAverage(SHARE))
    wait_ms: MovingAverage = field(default_factory=lambda: MovingAverage(SHARE))


@dataclass(frozen=True, slots=True)
class RouteTask:
    """A request for a plan. blocks: [start, end). source, target: the client, or the peers next to a part of a route.

    exclude: peers that must not be used. kv_needed: free positions that each hop needs. prompt: positions before the
    first token. present: the session's present route, if it asks for a better one. cached: positions that new hops
    would have to replay. seen: observations at the hops of the session; latencies: between them.
    """

    client: SimulatedClient
    request: SimulatedRequest
    blocks: tuple[int, int]
    source: str
    target: str
    exclude: Collection[str]
    kv_needed: int
    prompt: int = 0
    present: Sequence[Hop] = ()
    cached: int = 0
    seen: Mapping[str, SeenHop] = field(default_factory=dict[str, SeenHop])
    latencies: Mapping[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])


@dataclass(frozen=True, slots=True)
class SimulatedPlan:
    """A planned route. token_ms: predicted ms of a token; 0: not known. asked_ms: duration of the planning.

    present_ms: predicted ms of a token on the present route; 0: not known. move_ms: duration of the move to this route.
    """

    hops: list[Hop]
    token_ms: float = 0.0
    asked_ms: float = 0.0
    present_ms: float = 0.0
    move_ms: float = 0.0
