"""Ways to choose a route. All know the same facts; those that need no planning are here, Petals' in a file of its own."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.candidates import candidates
from scheduler.network import CLIENT, Link, Network
from scheduler.route import NoRoute, best_route
from scheduler.simulation.clients import Client
from scheduler.simulation.directory import View
from scheduler.simulation.geography import TrueNetwork
from scheduler.simulation.world import Request, World
from scheduler.swarm import Hop


@dataclass(frozen=True, slots=True)
class Plan:
    """What to plan. blocks: [start, end). source, target: the client, or the peers beside a part of a route.

    exclude: peers that must not be used. kv_needed: positions that each hop must have room for.
    """

    client: Client
    request: Request
    blocks: tuple[int, int]
    source: str
    target: str
    exclude: Collection[str]
    kv_needed: int


class Routing(Protocol):
    """A way to choose routes."""

    through_client: bool
    """Whether the client carries everything from hop to hop."""

    def route(self, plan: Plan, view: View, rng: random.Random) -> tuple[list[Hop], float]:
        """The hops, and what a token is expected to take in ms; 0: not known. Raises NoRoute."""
        ...


class Best:
    """`best_route` over `candidates`.

    coordinates: whether links that were not measured are foretold from coordinates, or count as bad. true_links:
    whether instead all links are known as they are. prompt: whether the length of the prompt counts, too.
    """

    through_client = False

    def __init__(
        self, world: World, *, limit: int, coordinates: bool = True, true_links: bool = False, prompt: bool = False
    ) -> None:
        self._world = world
        self._limit = limit
        self._coordinates = coordinates
        self._true_links = true_links
        self._prompt = prompt

    def route(self, plan: Plan, view: View, rng: random.Random) -> tuple[list[Hop], float]:
        everywhere = view.places.with_places({CLIENT: plan.client.place}) if self._coordinates else Network()
        encodings = self._world.settings.encodings
        request = plan.request
        positions = 1 + request.prompt // request.output if self._prompt else 1
        chosen = candidates(
            view.peers,
            plan.blocks,
            everywhere,
            encodings=encodings,
            kv_needed=plan.kv_needed,
            positions=positions,
            source=plan.source,
            target=plan.target,
            exclude=plan.exclude,
            limit=self._limit,
        )
        names = {plan.source, plan.target, *(peer.id for peer in chosen)}
        if self._true_links:
            network: Network = TrueNetwork(self._world.geography, self._world.names_for(plan.client.number))
        else:
            links: dict[tuple[str, str], Link] = {}
            for name in names & view.records.keys():
                for other, link in view.records[name].links.items():
                    if other in names:
                        links[name, other] = link
            links.update(plan.client.links)
            known = {name: everywhere.places[name] for name in names if name in everywhere.places}
            network = Network(links, places=known)
        route = best_route(
            chosen,
            plan.blocks,
            network,
            encodings=encodings,
            kv_needed=plan.kv_needed,
            positions=positions,
            source=plan.source,
            target=plan.target,
            rng=rng,
        )
        return list(route.hops), route.cost_ms


class Stepwise:
    """Chooses one peer after the other, each for as many blocks as it has."""

    through_client = False

    def __init__(self, world: World) -> None:
        self._world = world

    def choose(self, view: View, serving: NDArray[np.int64], sender: int, end: int, rng: random.Random) -> int:
        """Which of `serving` (indices in the view) comes next. sender: number of who sends to it."""
        raise NotImplementedError

    def route(self, plan: Plan, view: View, rng: random.Random) -> tuple[list[Hop], float]:
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
        return hops, 0.0


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


def names_of(hops: Sequence[Hop]) -> list[str]:
    """The peers of a route."""
    return [hop.peer for hop in hops]
