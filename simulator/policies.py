"""Ways to choose a route, all from the same facts: that of splitnet, and simple ones to compare it with."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.candidates import LIMIT, Crowd
from scheduler.cost import move_ms, route_ms
from scheduler.facts import CLIENT, Hop, Link, Network, Peer, Place, Route, Speed
from scheduler.load import MovingAverage
from scheduler.replan import changed_hops
from scheduler.route import NoRoute, best_route
from simulator.clients import Client
from simulator.directory import View
from simulator.geography import TrueNetwork
from simulator.world import Request, World

SHARE: Final = 0.5
"""Weight of the latest token in the averages of what a session met."""

GRAIN: Final = 64
"""To multiples of so many positions prompts are rounded up, so that the peers are prepared seldom for the choice."""


@dataclass(slots=True)
class SeenHop:
    """What a session met at a hop, averaged over its last tokens: ms per block of a pass, and ms until it began."""

    block_ms: MovingAverage = field(default_factory=lambda: MovingAverage(SHARE))
    wait_ms: MovingAverage = field(default_factory=lambda: MovingAverage(SHARE))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to plan. blocks: [start, end). source, target: the client, or the peers beside a part of a route.

    exclude: peers that must not be used. kv_needed: positions that each hop must have room for.
    prompt: positions that come before the first token.
    present: the route that the session has, if it asks for a better one. cached: positions that new hops would have to
    be given. seen: what the session met at its hops; latencies: and between them.
    """

    client: Client
    request: Request
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
class Planned:
    """A route. token_ms: what a token is expected to take; 0: not known. asked_ms: time that the plan itself took.

    present_ms: what a token is expected to take on the present route; 0: not known. move_ms: what it takes to leave
    that for this one.
    """

    hops: list[Hop]
    token_ms: float = 0.0
    asked_ms: float = 0.0
    present_ms: float = 0.0
    move_ms: float = 0.0


class Routing(Protocol):
    """A way to choose routes.

    through_client: whether the client carries everything from hop to hop. replans: whether sessions look for better
    routes while they run. has_coordinates: whether clients know where peers stand.
    """

    through_client: bool
    replans: bool
    has_coordinates: bool

    def route(self, plan: Plan, view: View, rng: random.Random) -> Planned:
        """A route. Raises NoRoute."""
        ...


@dataclass(frozen=True, slots=True)
class BestOptions:
    """How `Best` plans.

    limit: to how many candidates. coordinates: whether links that were not measured are predicted from coordinates, or
    count as bad. true_links: whether instead all links are known as they are. replans: whether sessions look for better
    routes while they run. prompt: whether the length of the prompt counts, too.
    checks: how often the peers of a new route are asked for the latencies between them, and the route is planned again.
    load: whether queues and batches of the peers count. spread: whether the choice among near-equal routes is random.
    """

    limit: int = LIMIT
    coordinates: bool = True
    true_links: bool = False
    replans: bool = True
    prompt: bool = True
    checks: int = 0
    load: bool = True
    spread: bool = True


class Best:
    """`best_route` over `candidates`, corrected by what the session itself has seen."""

    through_client = False

    def __init__(self, world: World, options: BestOptions) -> None:
        self.replans = options.replans
        self.has_coordinates = options.coordinates
        self._world = world
        self._options = options
        self._kept: tuple[View, Crowd] | None = None

    def route(self, plan: Plan, view: View, rng: random.Random) -> Planned:
        options, encodings = self._options, self._world.settings.encodings
        places = {CLIENT: plan.client.place, **view.places.places} if options.coordinates else {}
        prompt = GRAIN * ceil(plan.prompt / GRAIN) if options.prompt else 0
        known = self._known(plan, view)
        outside = [places[name] for name in (plan.source, plan.target) if name in places]
        chosen = (
            self._crowd(view)
            .corrected(known.values())
            .near(
                outside,
                plan.blocks,
                encodings=encodings,
                kv_needed=plan.kv_needed,
                prompt=prompt,
                exclude=plan.exclude,
                limit=options.limit,
            )
        )
        by_id = {peer.id: peer for peer in chosen}
        by_id |= {hop.peer: known[hop.peer] for hop in plan.present if hop.peer in known}
        chosen = list(by_id.values())
        network = self._network(plan, view, places, by_id.keys())

        def best() -> Route:
            return best_route(
                chosen,
                plan.blocks,
                network,
                encodings=encodings,
                kv_needed=plan.kv_needed,
                prompt=prompt,
                source=plan.source,
                target=plan.target,
                rng=rng if options.spread else None,
            )

        def cost(hops: Sequence[Hop], prompt: int = prompt) -> float:
            return route_ms(
                hops,
                by_id,
                network,
                positions=1,
                prompt=prompt,
                encodings=encodings,
                source=plan.source,
                target=plan.target,
            )

        route = best()
        asked_ms, found = 0.0, [route.hops]
        for _ in range(options.checks):
            pairs = list(pairwise([plan.source, *(hop.peer for hop in route.hops), plan.target]))
            unknown = [pair for pair in pairs if pair not in network.measured]
            if not unknown:
                break
            # The client asks the senders, each of which sends something there and back.
            asked_ms += max(
                2 * (self._latency(plan, CLIENT, sender) + self._latency(plan, sender, receiver))
                for sender, receiver in unknown
            )
            links = {pair: Link(self._latency(plan, *pair), network.link(*pair).bytes_per_ms) for pair in unknown}
            network = network.with_links(links)
            route = best()
            found.append(route.hops)
        hops = list(min(found, key=cost))
        planned = Planned(hops, cost(hops, 0), asked_ms)
        if not plan.present or any(hop.peer not in by_id for hop in plan.present):
            return planned
        before, changed = changed_hops(plan.present, hops)
        source = before.peer if before else CLIENT
        to_move_ms = (
            move_ms(changed, by_id, network, cached=plan.cached, encodings=encodings, source=source) if changed else 0.0
        )
        return replace(planned, present_ms=cost(plan.present), move_ms=to_move_ms)

    def _crowd(self, view: View) -> Crowd:
        """Of all peers in view, kept until there is another view."""
        if self._kept is None or self._kept[0] is not view:
            peers = view.peers if self._options.load else view.idle_peers
            self._kept = view, Crowd(peers, view.places if self._options.coordinates else Network())
        return self._kept[1]

    def _latency(self, plan: Plan, sender: str, receiver: str) -> float:
        numbers, client = self._world.number_of, plan.client.number
        return self._world.geography.one_way_ms(numbers.get(sender, client), numbers.get(receiver, client))

    def _known(self, plan: Plan, view: View) -> dict[str, Peer]:
        """Of whom something else is known than what is published: by pings, and by what the session has seen."""
        known: dict[str, Peer] = {}
        if self._options.load:
            told = (plan.client.corrected(view.records[name]) for name in plan.client.told if name in view.records)
            known = {peer.id: peer for peer in told if peer}
        peers = view.peers if self._options.load else view.idle_peers
        for hop in plan.present:
            index = view.index.get(hop.peer)
            if index is None:
                continue
            peer = known.get(hop.peer, peers[index])
            peer = replace(peer, kv_free=max(peer.kv_free, plan.kv_needed))
            if self._options.load and (seen := plan.seen.get(hop.peer)):
                factor = seen.block_ms.value / max(peer.speed.at(1 + peer.batch), 1e-6)
                speed = Speed(tuple(ms * factor for ms in peer.speed.block_ms))
                peer = replace(peer, speed=speed, queue_ms=seen.wait_ms.value)
            known[hop.peer] = peer
        return known

    def _network(self, plan: Plan, view: View, places: Mapping[str, Place], ids: Collection[str]) -> Network:
        """The links between some peers and the client, with those that were measured."""
        if self._options.true_links:
            return TrueNetwork(self._world.geography, self._world.names_for(plan.client.number))
        names = {plan.source, plan.target, *ids}
        links: dict[tuple[str, str], Link] = {}
        for name in names & view.records.keys():
            for other, link in view.records[name].links.items():
                if other in names:
                    links[name, other] = link
                    links.setdefault((other, name), link)
        links.update(plan.client.links)
        network = Network(links, places={name: places[name] for name in names if name in places})
        if not plan.latencies:
            return network
        seen = {pair: Link(latency_ms, network.link(*pair).bytes_per_ms) for pair, latency_ms in plan.latencies.items()}
        return network.with_links(seen)


class Stepwise:
    """Chooses one peer after the other, each for as many blocks as it has."""

    through_client = False
    replans = False
    has_coordinates = False

    def __init__(self, world: World) -> None:
        self._world = world

    def choose(self, view: View, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random) -> int:
        """Which of `serving` (indices in the view) comes next. sender: number of who sends to it."""
        raise NotImplementedError

    def route(self, plan: Plan, view: View, rng: random.Random) -> Planned:
        first, end = plan.blocks
        hops: list[Hop] = []
        block = first
        excluded = np.array([view.index[name] for name in plan.exclude if name in view.index], dtype=np.int64)
        numbers = self._world.number_of
        sender = numbers.get(plan.source, plan.client.number)
        while block < end:
            serving = view.serving[block]
            serving = serving[view.kv_free[serving] >= plan.kv_needed]
            serving = np.setdiff1d(serving, excluded, assume_unique=True)
            if not len(serving):
                raise NoRoute([(block, block + 1)], [])
            index = self.choose(view, serving, sender, end, rng)
            stop = min(end, int(view.end[index]))
            hops.append(Hop(view.peers[index].id, block, stop))
            sender = int(view.numbers[index])
            block = stop
        return Planned(hops)


class RandomRoute(Stepwise):
    """Any peer that serves the next block."""

    def choose(self, view: View, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random) -> int:
        return int(serving[rng.randrange(len(serving))])


class FewestHops(Stepwise):
    """The peer whose span goes farthest; any of them, if there are several."""

    def choose(self, view: View, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random) -> int:
        reach = np.minimum(view.end[serving], end)
        best = serving[reach == reach.max()]
        return int(best[rng.randrange(len(best))])


class Nearest(Stepwise):
    """The peer with the least latency from the one before, which it knows exactly."""

    def choose(self, view: View, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random) -> int:
        latency = self._world.geography.one_way_from(sender, view.numbers[serving])
        return int(serving[latency.argmin()])
