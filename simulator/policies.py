"""The policies that can be simulated: splitnet's choice of routes, and simple ones with the same facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import ceil
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.candidates import LIMIT, CandidateIndex
from scheduler.cost import move_ms, route_ms
from scheduler.facts import CLIENT, Hop, Link, Network, NetworkPlace, Peer, Route, Speed
from scheduler.replan import changed_hops
from scheduler.route import NoRoute, best_route
from simulator.clients import RouteTask, SimulatedPlan
from simulator.geography import TrueNetwork
from simulator.membership import OwnPlacing, Placing
from simulator.petals import PetalsPlacing, PetalsRouting
from simulator.simulated_directory import DirectoryView
from simulator.world import World

NO_LIMIT: Final = 1_000_000
"""As a limit of candidates: no limit."""

PROMPT_MULTIPLE: Final = 64
"""Lengths of prompts are rounded up to multiples of this many positions, so that candidates are seldom prepared
anew."""


class Routing(Protocol):
    """A method of choosing routes.

    through_client: whether all activations between hops pass through the client. replans: whether sessions look for
    better routes while they run. has_coordinates: whether clients know the coordinates of peers.
    """

    through_client: bool
    replans: bool
    has_coordinates: bool

    def route(self, plan: RouteTask, view: DirectoryView, rng: random.Random) -> SimulatedPlan:
        """A route. Raises NoRoute."""
        ...


@dataclass(frozen=True, slots=True)
class BestOptions:
    """How `Best` plans.

    limit: largest number of candidates. coordinates: whether unmeasured links are predicted from coordinates, or count
    as bad. true_links: whether all true links are known instead. replans: whether sessions look for better routes while
    they run. prompt: whether the length of the prompt counts, too. checks: how often the peers of a new route are asked
    for the latencies between them, followed by a new plan. load: whether queues and batches of the peers count. spread:
    whether the choice among near-equal routes is random.
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
    """`best_route` over candidates, corrected by the observations of the session."""

    through_client = False

    def __init__(self, world: World, options: BestOptions) -> None:
        self.replans = options.replans
        self.has_coordinates = options.coordinates
        self._world = world
        self._options = options
        self._kept: tuple[DirectoryView, CandidateIndex] | None = None

    def route(self, plan: RouteTask, view: DirectoryView, rng: random.Random) -> SimulatedPlan:
        options, encodings = self._options, self._world.settings.encodings
        places = {CLIENT: plan.client.place, **view.network_places.places} if options.coordinates else {}
        prompt = PROMPT_MULTIPLE * ceil(plan.prompt / PROMPT_MULTIPLE) if options.prompt else 0
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

        chain: dict[str, Any] = {"encodings": encodings, "source": plan.source, "target": plan.target}
        chooser = rng if options.spread else None

        def best() -> Route:
            return best_route(
                chosen, plan.blocks, network, kv_needed=plan.kv_needed, prompt=prompt, rng=chooser, **chain
            )

        def cost(hops: Sequence[Hop], prompt: int = prompt) -> float:
            return route_ms(hops, by_id, network, positions=1, prompt=prompt, **chain)

        route = best()
        asked_ms, found = 0.0, [route.hops]
        for _ in range(options.checks):
            pairs = list(pairwise([plan.source, *(hop.peer for hop in route.hops), plan.target]))
            unknown = [pair for pair in pairs if pair not in network.measured]
            if not unknown:
                break
            # The client asks the senders, and each sender sends a message there and back.
            asked_ms += max(
                2 * (self._latency(plan, CLIENT, sender) + self._latency(plan, sender, receiver))
                for sender, receiver in unknown
            )
            links = {pair: Link(self._latency(plan, *pair), network.link(*pair).bytes_per_ms) for pair in unknown}
            network = network.with_links(links)
            route = best()
            found.append(route.hops)
        hops = list(min(found, key=cost))
        planned = SimulatedPlan(hops, cost(hops, 0), asked_ms)
        if not plan.present or any(hop.peer not in by_id for hop in plan.present):
            return planned
        before, changed = changed_hops(plan.present, hops)
        source = before.peer if before else CLIENT
        to_move_ms = (
            move_ms(changed, by_id, network, cached=plan.cached, encodings=encodings, source=source) if changed else 0.0
        )
        return replace(planned, present_ms=cost(plan.present), move_ms=to_move_ms)

    def _crowd(self, view: DirectoryView) -> CandidateIndex:
        """An index of all peers in view, cached until the view changes."""
        if self._kept is None or self._kept[0] is not view:
            peers = view.peers if self._options.load else view.idle_peers
            self._kept = view, CandidateIndex(peers, view.network_places if self._options.coordinates else Network())
        return self._kept[1]

    def _latency(self, plan: RouteTask, sender: str, receiver: str) -> float:
        numbers, client = self._world.number_of, plan.client.number
        return self._world.geography.one_way_ms(numbers.get(sender, client), numbers.get(receiver, client))

    def _known(self, plan: RouteTask, view: DirectoryView) -> dict[str, Peer]:
        """Peers about which pings, or the session itself, show other facts than their records."""
        known: dict[str, Peer] = {}
        if self._options.load:
            told = (
                plan.client.measured_peer(view.records[name])
                for name in plan.client.reported_load
                if name in view.records
            )
            known = {peer.id: peer for peer in told if peer}
        peers = view.peers if self._options.load else view.idle_peers
        for hop in plan.present:
            index = view.index.get(hop.peer)
            if index is None:
                continue
            peer = known.get(hop.peer, peers[index])
            peer = replace(peer, kv_free=max(peer.kv_free, plan.kv_needed))
            if self._options.load and (seen := plan.seen.get(hop.peer)):
                factor = seen.block_ms.value / max(peer.speed.block_ms_at(1 + peer.batch), 1e-6)
                speed = Speed(tuple(ms * factor for ms in peer.speed.block_ms))
                peer = replace(peer, speed=speed, queue_ms=seen.wait_ms.value)
            known[hop.peer] = peer
        return known

    def _network(
        self, plan: RouteTask, view: DirectoryView, places: Mapping[str, NetworkPlace], ids: Collection[str]
    ) -> Network:
        """The links between these peers and the client, including measured ones."""
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
    """Chooses one peer after the other, each for as many blocks as it serves."""

    through_client = False
    replans = False
    has_coordinates = False

    def __init__(self, world: World) -> None:
        self._world = world

    def choose_next(
        self, view: DirectoryView, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random
    ) -> int:
        """The next peer, one of `serving` (indices in the view). sender: number of the device before this peer."""
        raise NotImplementedError

    def route(self, plan: RouteTask, view: DirectoryView, rng: random.Random) -> SimulatedPlan:
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
            index = self.choose_next(view, serving, sender, end, rng)
            stop = min(end, int(view.end[index]))
            hops.append(Hop(view.peers[index].id, block, stop))
            sender = int(view.numbers[index])
            block = stop
        return SimulatedPlan(hops)


class RandomRoute(Stepwise):
    """A random peer that serves the next block."""

    def choose_next(
        self, view: DirectoryView, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random
    ) -> int:
        return int(serving[rng.randrange(len(serving))])


class FewestHops(Stepwise):
    """The peer whose span ends last; a random one among equals."""

    def choose_next(
        self, view: DirectoryView, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random
    ) -> int:
        furthest_end = np.minimum(view.end[serving], end)
        best = serving[furthest_end == furthest_end.max()]
        return int(best[rng.randrange(len(best))])


class Nearest(Stepwise):
    """The peer with the least true latency from the previous device."""

    def choose_next(
        self, view: DirectoryView, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random
    ) -> int:
        latency = self._world.geography.one_way_from(sender, view.numbers[serving])
        return int(serving[latency.argmin()])


@dataclass(frozen=True, slots=True)
class Policy:
    """How clients choose routes and peers choose blocks. rules: settings that differ from those of the world."""

    label: str
    routing: Callable[[World], Routing]
    placing: Callable[[World], Placing] = OwnPlacing
    rules: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _best(**options: Any) -> Callable[[World], Routing]:
    return lambda world: Best(world, BestOptions(**options))


def _petals(push: bool) -> Callable[[World], Routing]:
    return lambda world: PetalsRouting(world, push=push)


BASELINES: Final = ("own", "no-prompt", "no-replan", "petals-push", "petals", "fewest-hops", "nearest", "random")
AGAINST: Final = ("own", "no-load", "petals-push", "petals", "fewest-hops", "nearest", "random", "oracle")
ABLATIONS: Final = (
    "own", "no-prompt", "few-probes", "own-checks", "uncorrected", "no-replan", "no-moves", "no-load", "stale",
    "no-coordinates", "true-links", "no-distance", "petals-routing", "petals-placement",
)  # fmt: skip

POLICIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {
        "own": Policy("own", _best()),
        "no-prompt": Policy("own, the prompt ignored", _best(prompt=False)),
        "own-checks": Policy("own, links of the new route asked for", _best(checks=2)),
        "true-links": Policy("own, all links known", _best(true_links=True)),
        "oracle": Policy(
            "oracle: all links known, facts of 3 s ago",
            _best(true_links=True),
            rules={"refresh_s": 2.0, "record_ttl_s": 6.0, "view_s": 1.0},
        ),
        "no-coordinates": Policy("own, measured links only", _best(coordinates=False)),
        "few-probes": Policy("own, clients measure 32 links", _best(), rules={"probes": (16, 16)}),
        "no-replan": Policy("own, no re-planning", _best(replans=False)),
        "uncorrected": Policy("own, predictions never corrected", _best(), rules={"corrects": False}),
        "no-moves": Policy("own, peers never move", _best(), rules={"moves": False}),
        "no-distance": Policy("own, blocks chosen wherever peers are", _best(), partial(OwnPlacing, by_distance=False)),
        "no-load": Policy("own, load ignored", _best(load=False)),
        "stale": Policy(
            "own, facts four times as old",
            _best(),
            rules={"refresh_s": 120.0, "look_s": 120.0, "record_ttl_s": 360.0, "view_s": 120.0},
        ),
        "all-candidates": Policy("own, over all peers", _best(limit=NO_LIMIT)),
        "random": Policy("random route", RandomRoute),
        "fewest-hops": Policy("fewest hops", FewestHops),
        "nearest": Policy("nearest next", Nearest),
        "petals": Policy("Petals, through the client", _petals(push=False), PetalsPlacing),
        "petals-push": Policy("Petals, pushing", _petals(push=True), PetalsPlacing),
        "petals-routing": Policy("Petals' routing, own placement", _petals(push=True)),
        "petals-placement": Policy("own routing, Petals' placement", _best(), PetalsPlacing),
    }
)
