"""The discrete-event simulation: every pass at every peer and every message between them is an event of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

import numpy as np

from scheduler.network import CLIENT
from scheduler.route import NoRoute
from scheduler.simulation.clients import new_client
from scheduler.simulation.events import Events
from scheduler.simulation.membership import Membership
from scheduler.simulation.node import Node, Step
from scheduler.simulation.opening import Replacement, Section, exchange, lost_parts, reserve, round_trip_ms
from scheduler.simulation.placing import Placing
from scheduler.simulation.policies import Plan, Planned, Routing
from scheduler.simulation.replanning import Change, better_route
from scheduler.simulation.session import FAILED, FINISHED, RUNNING, Session
from scheduler.simulation.traffic import Traffic
from scheduler.simulation.world import Request, World

ATTEMPTS: Final = 8
RETRY_MS: Final = 2000.0

DRAIN_S: Final = 600.0
"""How long sessions may still run when no more clients come; those that still run then have failed."""

EVENTS_PER_REPORT: Final = 20_000


class Simulation:
    """A world in which clients route, and peers choose blocks, by one policy. Times in ms.

    Attributes:
        sessions: of all clients that have come so far.
        tokens_in_time: that clients got while others still came.
        membership: all peers.
        events: what is still to happen, and the clock.
    """

    def __init__(self, world: World, routing: Routing, placing: Placing) -> None:
        self.world = world
        self.sessions: list[Session] = []
        self.tokens_in_time = 0
        self.events = Events()
        self.membership = Membership(world, placing, self.events, self._repair)
        self._settings = world.settings
        self._routing = routing
        self._traffic = Traffic(world, self.events, routing.through_client, self._arrived)
        # Streams of their own, so that a policy's choices do not change what the network does to its peers.
        self._rng = np.random.default_rng([world.settings.seed, 3])
        self._choices = random.Random(world.settings.seed + 1)
        for request in world.requests:
            self.events.at(request.at_s * 1000, self._come, request)

    @property
    def nodes(self) -> dict[str, Node]:
        """Of all devices that have joined so far, by id."""
        return self.membership.nodes

    def run(self) -> Iterator[float]:
        """Runs to the end; says from time to time which share of the clients has come, at most 1."""
        coming_ends = self._settings.duration_s * 1000
        while self.events.next_before(coming_ends + DRAIN_S * 1000):
            if self.events.done % EVENTS_PER_REPORT == 0:
                yield min(1.0, self.events.now / coming_ends)
            if self.events.now > coming_ends and all(session.state != RUNNING for session in self.sessions):
                break
        for session in self.sessions:
            if session.state == RUNNING:
                self._end(session, FAILED)
        self.membership.close()

    def _come(self, request: Request) -> None:
        view = self.membership.view
        session = Session(request, new_client(self.world, request.number, view, self._rng), self.events.now)
        self.sessions.append(session)
        self._repair(session)

    def _repair(self, session: Session) -> None:
        """Plans and opens what the session lacks: all of its route at first, later the hops that were lost."""
        if session.state != RUNNING:
            return
        lost = session.lost_hops()
        if session.hops and not lost:
            return
        if session.trouble_since_ms < 0:
            session.trouble_since_ms = self.events.now
        session.epoch += 1
        for index in lost:
            session.banned.add(session.hops[index][0].id)
        try:
            replaced = self._plan(session, lost)
        except NoRoute:
            self._try_later(session, RETRY_MS)
            return
        repairs = bool(session.hops)
        delay = self._open(session, replaced)
        if delay is not None:
            self._try_later(session, delay)
        else:
            session.repairs += repairs

    def _try_later(self, session: Session, delay: float) -> None:
        waited = self.events.now + delay - session.trouble_since_ms
        if waited > self._settings.patience_s * 1000 or session.refusals > ATTEMPTS:
            self._end(session, FAILED)
        else:
            self.events.at(self.events.now + delay, self._repair, session)

    def _plan(self, session: Session, lost: list[int]) -> list[Replacement]:
        """What comes in the place of what was lost, the last hops first."""
        replaced: list[Replacement] = []
        for first, end, blocks, source, target in lost_parts(session, lost, self._settings.num_blocks):
            used = {hop.peer for _, _, hops in replaced for hop in hops} | {node.id for node, _, _ in session.hops}
            planned = self._route(session, blocks, source, target, session.banned | used)
            session.foretold_ms = planned.token_ms if source == target == CLIENT else 0.0  # of the whole route
            session.asked_ms = planned.asked_ms
            replaced.append((first, end, planned.hops))
        return replaced[::-1]

    def _route(self, session: Session, blocks: tuple[int, int], source: str, target: str, exclude: set[str]) -> Planned:
        request = session.request
        prompt = 0 if session.tokens else request.prompt
        plan = Plan(session.client, request, blocks, source, target, exclude, request.positions, prompt)
        return self._routing.route(plan, self.membership.view, self._choices)

    def _open(self, session: Session, replaced: list[Replacement]) -> float | None:
        """Opens new hops and goes on; or says after how many ms the client knows that it must plan anew."""
        rtt_ms = round_trip_ms(session, replaced, self.nodes, self.world.geography)
        refused = reserve(session, replaced, self.nodes, rtt_ms)
        if refused is not None:
            return refused
        sections = exchange(session, replaced, self.nodes)
        self._traffic.connect(session)
        session.trouble_since_ms = -1.0
        session.refusals = 0
        session.watch.begin(session.foretold_ms)
        # Connecting takes a round trip, and so does opening.
        ready = self.events.now + session.asked_ms + 2 * rtt_ms
        if session.tokens == 0:
            self.events.at(ready, self._prefill, (session, session.epoch))
        else:
            session.replays = len(sections)
            self.events.at(ready, self._replay, (session, session.epoch, sections))
        return None

    def _prefill(self, item: tuple[Session, int]) -> None:
        session, epoch = item
        if session.state == RUNNING and session.epoch == epoch:
            self._traffic.send_long(session, 0, len(session.hops) - 1, session.request.prompt, replay=False)

    def _replay(self, item: tuple[Session, int, list[Section]]) -> None:
        session, epoch, sections = item
        if session.state == RUNNING and session.epoch == epoch:
            for first, end in sections:
                self._traffic.send_long(session, first, end - 1, session.context, replay=True)

    def _arrived(self, step: Step) -> None:
        session = step.session
        if step.epoch != session.epoch or session.state != RUNNING:
            return
        if step.replay:
            session.replays -= 1
            if session.replays:
                return
        else:
            session.got_token(self.events.now)
            self.tokens_in_time += self.events.now <= self._settings.duration_s * 1000
            if session.tokens >= session.request.output:
                self._end(session, FINISHED)
                return
        if not self._moved(session):
            session.sent_ms = self.events.now
            self._traffic.send(Step(session, session.epoch, 0, len(session.hops) - 1, 1))

    def _moved(self, session: Session) -> bool:
        """Looks for a better route between two tokens, when it is time to, and goes over to it if that pays."""
        now = self.events.now
        due = self._routing.replans and now - session.looked_ms >= self._settings.replan_s * 1000
        if not due or session.lost_hops():
            return False
        session.looked_ms = now
        change = better_route(session, self._routing, self.membership.view, self._settings, self._choices)
        return change is not None and self._go_over(session, change)

    def _go_over(self, session: Session, change: Change) -> bool:
        session.epoch += 1
        positions = session.request.positions
        old = session.hops[change.first : change.end]
        for node, _, _ in old:
            node.release(session, positions)
        session.asked_ms = change.planned.asked_ms
        foretold_ms, session.foretold_ms = session.foretold_ms, change.planned.token_ms
        if self._open(session, [(change.first, change.end, change.hops)]) is None:
            session.moves += 1
            return True
        session.foretold_ms = foretold_ms
        # A peer refused, as its facts were old. What was released a moment ago is still free.
        for node, _, _ in old:
            node.reserve(session, positions)
        session.refusals = 0
        return False

    def _end(self, session: Session, state: str) -> None:
        session.state = state
        session.ended_ms = self.events.now
        for node, _, _ in session.hops:
            node.release(session, session.request.positions)
