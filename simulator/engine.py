"""The discrete-event simulation: every pass at every peer and every message between them is an event of its own."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Final

import numpy as np

from simulator.calls import Calls
from simulator.clients import new_client
from simulator.events import Events
from simulator.identities import Identities
from simulator.membership import Membership
from simulator.node import Held, Node
from simulator.placing import Placing
from simulator.planning import Planning
from simulator.policies import Routing
from simulator.session import FAILED, RUNNING, Session, Surroundings
from simulator.traffic import Traffic
from simulator.world import Request, World

DRAIN_S: Final = 600.0
"""How long sessions may still run when no more clients come; those that still run then have failed."""

EVENTS_PER_REPORT: Final = 20_000


class Simulation:
    """A world in which clients route, and peers choose blocks, by one policy. Times in ms.

    Attributes:
        sessions: of all clients that have come so far.
        membership: all peers.
        events: what is still to happen, and the clock.
    """

    def __init__(self, world: World, routing: Routing, placing: Placing) -> None:
        self.world = world
        self.sessions: list[Session] = []
        self.events = Events()
        self.membership = Membership(world, placing, self.events, self._leaving)
        # Streams of their own, so that a policy's choices do not change what the network does to its peers.
        self._rng = np.random.default_rng([world.settings.seed, 3])
        choices = random.Random(world.settings.seed + 1)
        identities = Identities(world.settings.num_blocks)
        planning = Planning(
            world,
            routing,
            identities,
            lambda: self.membership.view,
            self.membership.nodes,
            choices,
            lambda: self.events.now / 1000,
        )
        traffic = Traffic(world, self.events, routing.through_client)
        self._calls = Calls(world, self.events, traffic)
        self._around = Surroundings(
            world, self.events, identities, self.membership.nodes, planning, traffic, self._calls
        )
        for request in world.requests:
            self.events.at(request.at_s * 1000, self._come, request)

    @property
    def tokens_in_time(self) -> int:
        """That clients got while others still came."""
        return self._around.tokens_in_time

    @property
    def nodes(self) -> dict[str, Node]:
        """Of all devices that have joined so far, by id."""
        return self.membership.nodes

    def run(self) -> Iterator[float]:
        """Runs to the end; says from time to time which share of the clients has come, at most 1."""
        coming_ends = self.world.settings.duration_s * 1000
        while self.events.next_before(coming_ends + DRAIN_S * 1000):
            if self.events.done % EVENTS_PER_REPORT == 0:
                yield min(1.0, self.events.now / coming_ends)
            if self.events.now > coming_ends and not self._around.running:
                break
        for session in self.sessions:
            if session.state == RUNNING:
                session.end(FAILED)
        while self._calls.under_way:  # peers are still told that sessions have ended
            self.events.next_before(math.inf)
        self.membership.close()

    def _come(self, request: Request) -> None:
        client = new_client(
            self.world, request.number, self.membership.view, self._rng, self.events.now / 1000, self._load_of
        )
        session = Session(request, client, self._around)
        self.sessions.append(session)
        session.begin()

    def _load_of(self, name: str) -> tuple[float, float]:
        return self.nodes[name].load_at(self.events.now)

    def _leaving(self, node: Node, held: list[Held]) -> None:
        self._calls.say_leaving(node, held)
