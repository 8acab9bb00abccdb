"""The discrete-event simulation: every pass at every peer and every message between peers is an event."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np

from scheduler.facts import CLIENT
from simulator.clients import new_client
from simulator.membership import Membership, Placing
from simulator.node import HeldSession, Node, NodeRoute, Parcel
from simulator.policies import Routing
from simulator.session import FAILED, FINISHED, POSITION, RUNNING, SimulatedPlanner, SimulatedSession
from simulator.simulated_directory import Identities, device_at
from simulator.traffic import Calls, ParcelCarrier
from simulator.world import Events, SimulatedRequest, World
from splitnet.session.events import (
    AskAlive,
    AskRoute,
    BanPeer,
    CloseSession,
    Effect,
    Event,
    Note,
    Phase,
    RoutePlanned,
    Send,
    Submit,
    Tick,
    Unban,
    Use,
)
from splitnet.session.requests import StepRequest
from splitnet.wire.messages import Chunk, Open, Replay, Step
from splitnet.wire.messages import Close as CloseMessage
from splitnet.wire.sent_log import REPLAY_POSITIONS

DRAIN_S: Final = 600.0
"""How long sessions may run after the last arrival; sessions that run longer count as failed."""

EVENTS_PER_REPORT: Final = 20_000

RETRY_MS: Final = 2000.0
"""A client whose session was given up retries after this time."""


class Simulation:
    """A world in which clients choose routes, and peers choose blocks, by one policy. Times in ms.

    Attributes:
        sessions: of all clients that have arrived. running: number of sessions that have not ended.
        tokens_in_time: tokens that clients received during the arrival of clients.
        membership: all peers. nodes: peers that have joined, by id.
        events: planned events, and the clock.
    """

    def __init__(self, world: World, routing: Routing, placing: Placing) -> None:
        self.world = world
        self.sessions: list[SimulatedSession] = []
        self._by_client: dict[int, SimulatedSession] = {}
        self._drivers: list[Driver] = []
        self.running = 0
        self.tokens_in_time = 0
        self.events = Events()
        self.membership = Membership(world, placing, self.events, self._leaving)
        self.nodes = self.membership.nodes
        # Separate random streams, so that a policy's choices do not change the network's effect on its peers.
        self._rng = np.random.default_rng([world.settings.seed, 3])
        choices = random.Random(world.settings.seed + 1)
        self._identities = Identities(world.settings.num_blocks)
        self.planning = SimulatedPlanner(
            world, routing, self._identities, lambda: self.membership.view, self.nodes, choices, self._now_s
        )
        self.traffic = ParcelCarrier(world, self.events, self._by_client, routing.through_client)
        self.calls = Calls(world, self.events, self.traffic)
        for request in world.requests:
            self.events.schedule(request.at_s * 1000, self._client_arrives, request)

    def run(self) -> Iterator[float]:
        """Runs to the end. Yields from time to time the share of the clients that have arrived, at most 1."""
        coming_ends = self.world.settings.duration_s * 1000
        while self.events.next_before(coming_ends + DRAIN_S * 1000):
            if self.events.done % EVENTS_PER_REPORT == 0:
                yield min(1.0, self.events.now / coming_ends)
            if self.events.now > coming_ends and not self.running:
                break
        for session, driver in zip(self.sessions, self._drivers, strict=True):
            if session.state == RUNNING:
                driver.end_session(FAILED)
        while self.calls.under_way:  # peers still receive the end of sessions
            self.events.next_before(math.inf)
        self.membership.close()

    def _now_s(self) -> float:
        return self.events.now / 1000

    def _client_arrives(self, request: SimulatedRequest) -> None:
        client = new_client(
            self.world, request.number, self.membership.view, self._rng, self.events.now / 1000, self._load_of
        )
        session = SimulatedSession(request, client, self._identities, self.world, self._now_s)
        self._by_client[client.number] = session
        self.sessions.append(session)
        self._drivers.append(Driver(session, self))
        session.feed(Use())

    def _load_of(self, name: str) -> tuple[float, float]:
        return self.nodes[name].load_at(self.events.now)

    def _leaving(self, node: Node, held: list[HeldSession]) -> None:
        self.calls.say_leaving(node, [(self._by_client[each.client], each.epoch) for each in held])


class Driver:
    """Performs the effects of a session's machine, and simulates the rest of its client. Times in ms."""

    def __init__(self, session: SimulatedSession, simulation: Simulation) -> None:
        session.feed = self.feed
        simulation.running += 1
        self._session = session
        self._simulation = simulation
        self._pending: deque[Event] = deque()
        self._handling = False
        self._wakes_ms = math.inf
        self._requests: tuple[StepRequest, ...] = ()
        """The latest submission, at `_sent_ms`, after `_sent_repairs` recoveries."""
        self._sent_ms = 0.0
        self._sent_repairs = 0
        self._looked_ms = 0.0
        self._retries = False
        self._lost = False
        """Whether the latest planned route replaces a lost one, rather than being better."""

    def feed(self, event: Event) -> None:
        """Passes an event to the machine, and performs the effects."""
        self._pending.append(event)
        if self._handling:
            return
        self._handling = True
        session, machine = self._session, self._session.machine
        while self._pending:
            for effect in machine.handle(self._pending.popleft(), self._simulation.events.now / 1000):
                self._perform(effect)
            if not self._pending and session.state == RUNNING:
                self._take_results()
        if machine.phase is Phase.REPLAYING and not machine.chunk_ms:
            machine.chunk_ms = self._simulation.planning.step_ms(session, REPLAY_POSITIONS)
        self._handling = False
        self._arm()

    def end_session(self, state: str) -> None:
        """Ends the session and releases its reservations."""
        self._session.state = state
        self._simulation.running -= 1
        self._session.ended_ms = self._simulation.events.now
        self._session.route = None
        self.feed(CloseSession())

    def _arm(self) -> None:
        wakes_ms = self._due_ms()
        if wakes_ms < self._wakes_ms:
            self._wakes_ms = wakes_ms
            self._simulation.events.schedule(wakes_ms, self._wake, wakes_ms)

    def _due_ms(self) -> float:
        """When the machine wants a tick, slightly later, so that the time in seconds is not before it."""
        return self._session.machine.wake_at * 1000 + 1e-6

    def _wake(self, planned_ms: float) -> None:
        if planned_ms == self._wakes_ms:
            self._wakes_ms = math.inf
        if self._simulation.events.now >= self._due_ms():
            self.feed(Tick())
        else:
            self._arm()

    def _perform(self, effect: Effect) -> None:
        simulation, session = self._simulation, self._session
        match effect:
            case Send(_, Step() as step):
                self._send_message(step)
            case Send(endpoint, (Open() | CloseMessage() | Replay()) as message):
                if isinstance(message, Open):
                    self._follow_route(message.epoch)
                simulation.calls.send_call(session, simulation.nodes[device_at(endpoint)], message)
            case Send(_, message):
                raise AssertionError(f"no simulated session sends {message}")
            case AskAlive(endpoint):
                simulation.calls.send_call(session, simulation.nodes[device_at(endpoint)], effect)
            case AskRoute():
                answer, planned = simulation.planning.answer_query(session, effect)
                self._lost = True
                if isinstance(answer, RoutePlanned):
                    session.predicted_ms = 0.0 if effect.kept else planned.token_ms
                self._feed_later(planned.asked_ms, answer)
            case BanPeer(name):
                session.bans.ban_peer(name)
            case Unban(name):
                session.bans.lift(name)
            case Note():
                pass

    def _feed_later(self, ms: float, event: Event) -> None:
        if ms:
            self._simulation.events.schedule(self._simulation.events.now + ms, self.feed, event)
        else:
            self.feed(event)

    def _follow_route(self, epoch: int) -> None:
        """Switches to the route that the machine opens."""
        simulation, session, number = self._simulation, self._session, self._session.client.number
        if session.route is not None and session.route.epoch == epoch:
            return
        planned = [hop.planned for hop in session.machine.hops]
        session.hops = hops = [
            (simulation.nodes[device_at(hop.record.endpoint)], hop.start, hop.end) for hop in planned
        ]
        wires = simulation.traffic.wires(hops, number)
        session.route = NodeRoute(number, session.request.positions, epoch, hops, wires)
        stations = [(CLIENT, number), *((node.id, node.number) for node, _, _ in hops), (CLIENT, number)]
        for (sender, here), (receiver, there) in pairwise(stations):
            session.latencies[sender, receiver] = simulation.world.geography.one_way_ms(here, there)
        session.watch.begin_route(session.predicted_ms or simulation.planning.step_ms(session, 1), lost=self._lost)

    def _send_message(self, step: Step) -> None:
        route, (part,) = self._session.route, step.parts
        assert route is not None
        replay = step.replay_until > 0
        last = len(route.hops) - 1
        if replay:
            last = next(index for index, (_, _, end) in enumerate(route.hops) if end == step.replay_until)
        parcel = Parcel(route, step.number, 0, last, part.start, part.length, part.keep, replay=replay)
        self._simulation.traffic.send_parcel(parcel)

    def _take_results(self) -> None:
        """Takes results, and submits the next step."""
        machine = self._session.machine
        if machine.phase is Phase.BROKEN:
            self._requests = ()
            if machine.error is None:  # a hop was lost while no request was under way
                self.feed(Use())
            else:
                self._try_later()
        elif machine.is_open:
            if not all(request.is_done for request in self._requests):
                return
            if self._requests:
                self._got_token()
                if self._session.state != RUNNING:
                    return
            if not self._moves():
                self._submit()

    def _try_later(self) -> None:
        if self._retries:
            return
        simulation, session = self._simulation, self._session
        retry_ms = simulation.events.now + RETRY_MS
        if retry_ms - max(session.arrived_ms, session.last_ms) > simulation.world.settings.wait_limit_s * 1000:
            self.end_session(FAILED)
        else:
            self._retries = True
            simulation.events.schedule(retry_ms, self._try_again, None)

    def _try_again(self, _: None) -> None:
        self._retries = False
        if self._session.state == RUNNING:
            self.feed(Use())

    def _got_token(self) -> None:
        simulation, session, machine = self._simulation, self._session, self._session.machine
        now = simulation.events.now
        if session.tokens == 0:
            session.first_ms = now
        elif self._sent_repairs == len(machine.recoveries):
            ratio = session.watch.observe_step(now - self._sent_ms, now_s=now / 1000)
            machine.usual_ms = session.watch.usual.value
            if ratio is not None:
                session.predictions.add_ratio(tuple(hop.name for hop in machine.hops), ratio)
        session.tokens += 1
        simulation.tokens_in_time += now <= simulation.world.settings.duration_s * 1000
        session.last_ms = now
        self._requests = ()
        if session.tokens >= session.request.output:
            self.end_session(FINISHED)

    def _moves(self) -> bool:
        """Looks for a better route between two tokens, when due, and moves to it if that pays."""
        simulation, session, planning = self._simulation, self._session, self._simulation.planning
        now = simulation.events.now
        due = now - self._looked_ms >= simulation.world.settings.replan_s * 1000
        if not session.tokens or not planning.replans or not due:
            return False
        self._looked_ms = now
        found = planning.better_route(session)
        if found is None:
            return False
        move, planned = found
        session.predicted_ms, self._lost = planned.token_ms, False
        self._feed_later(planned.asked_ms, move)
        return True

    def _submit(self) -> None:
        """Sends the prompt, or the latest token."""
        session, machine, planning = self._session, self._session.machine, self._simulation.planning
        start, end, size, predicted_ms = 0, session.request.prompt, 1, 0.0
        if session.tokens:
            start, end = session.context, session.context + 1
        else:
            size = planning.step_positions(session, end)
            predicted_ms = planning.step_ms(session, min(end, size))
        requests: list[StepRequest] = []
        while start < end:
            count = min(end - start, size)
            keep = int(start + count == end)
            part = Chunk(0, start, count, keep)
            number = machine.next_number()
            step = Step(machine.session, machine.epoch, number, (part,), None, 0, 0, POSITION * count)
            requests.append(StepRequest(step, keep, predicted_ms=predicted_ms))
            start += count
        self._requests = tuple(requests)
        self._sent_ms, self._sent_repairs = self._simulation.events.now, len(machine.recoveries)
        self.feed(Submit(self._requests))
