"""Steps on their way: over links, into queues, through passes."""

from __future__ import annotations

import random

from scheduler.packing import DECODE_POSITIONS, PASS_POSITIONS
from splitnet.net.messages import FailureCode
from splitnet.simulation.events import Events
from splitnet.simulation.node import Awaited, Node, Parcel
from splitnet.simulation.route import Hops, Route, Wire, wires_of
from splitnet.simulation.session import Session
from splitnet.simulation.world import World

Pass = tuple[Node, int, list[tuple[Parcel, int]], float]
"""A pass under way: at which node, in which generation of it, how many positions of each parcel, and its ms."""


class Traffic:
    """Carries parcels from hop to hop. Times in ms.

    through_client: whether the client carries everything between two hops.
    """

    def __init__(self, world: World, events: Events, through_client: bool) -> None:
        self._geography = world.geography
        self._settings = world.settings
        self._encodings = world.settings.encodings
        self._events = events
        self.through_client = through_client
        self._jitter = random.Random(world.settings.seed)

    def wires(self, hops: Hops, client: int) -> list[Wire]:
        """The wires along a client's hops."""
        return wires_of(hops, client, self._geography, self._encodings, through_client=self.through_client)

    def replay(self, route: Route, first: int, last: int, positions: int, number: int) -> None:
        """Has the hop before hop `first` send so many positions again, in steps that fit a pass."""
        start = 0
        while start < positions:
            count = min(positions - start, PASS_POSITIONS)
            final = start + count == positions
            self.send(Parcel(route, number if final else 0, first, last, start, count, final=final, replay=True))
            start += count

    def send(self, parcel: Parcel) -> None:
        """Sends a parcel to its hop from whoever comes before it."""
        wire = parcel.route.wires[parcel.hop]
        if parcel.positions == 1:
            arrival = self._events.now + wire.token_ms
        elif parcel.positions <= DECODE_POSITIONS:
            arrival = self._events.now + wire.ms(parcel.positions, self._encodings)
        else:
            arrival = self._sent(parcel, wire.ms(parcel.positions, self._encodings))
        parcel.remaining = parcel.positions
        self._events.at(wire.in_order(arrival + self._latency(wire.latency_ms)), self._receive, parcel)

    def _sent(self, parcel: Parcel, took_ms: float) -> float:
        """When a long step has been sent: those of one sender go one after the other; tokens slip in between."""
        session = parcel.route.session
        wire = parcel.route.wires[parcel.hop]
        sender = session if wire.sender is None or self.through_client else wire.sender
        number = session.client.number if isinstance(sender, Session) else sender.number
        rate = float(self._geography.up[number])
        begin = max(self._events.now, sender.uplink_free_ms)
        sender.uplink_free_ms = begin + min(took_ms, wire.uplink_ms(parcel.positions, self._encodings, rate))
        return begin + took_ms

    def _latency(self, ms: float) -> float:
        if self._settings.jitter:
            ms *= 1 + self._jitter.expovariate(1 / self._settings.jitter)
        if self._settings.loss and self._jitter.random() < self._settings.loss:
            ms += 2 * ms + 20.0
        return ms

    def _receive(self, parcel: Parcel) -> None:
        route = parcel.route
        session = route.session
        if session.route is not route:
            return
        node = route.hops[parcel.hop][0]
        held = node.sessions.get(session)
        if held is None:
            if not node.gone:
                self._say_no_session(parcel)
        elif held.epoch == route.epoch:
            parcel.follows = held.waiting > 0
            held.waiting += 1
            node.arrived(parcel, self._events.now)
            if not node.running:
                self._begin_pass(node)

    def _say_no_session(self, parcel: Parcel) -> None:
        """A hop that does not hold the session says so to who sent the step, who passes it on to the client."""
        route, client = parcel.route, parcel.route.session.client.number
        node = teller = route.hops[parcel.hop][0]
        delay_ms = 0.0
        if parcel.hop:
            teller = route.hops[parcel.hop - 1][0]
            delay_ms = self._geography.one_way_ms(node.number, teller.number)
        delay_ms += self._geography.one_way_ms(teller.number, client)
        failure = route.session.failure(teller, route.epoch, parcel.number, FailureCode.UNKNOWN_SESSION)
        self._events.at(self._events.now + delay_ms, route.session.feed, failure)

    def _begin_pass(self, node: Node) -> None:
        now = self._events.now
        for parcel in [parcel for parcel in node.ready if parcel.route is not parcel.route.session.route]:
            node.ready.remove(parcel)
            node.left(parcel, now)
        if node.ready:
            taken, ms = node.next_pass(now)
            if taken:
                self._events.at(now + ms, self._end_pass, (node, node.generation, taken, ms))
            else:
                self._events.at(now + ms, self._end_wait, (node, node.awaited))

    def _end_wait(self, item: tuple[Node, Awaited | None]) -> None:
        node, awaited = item
        if node.awaited is awaited:
            self._begin_pass(node)

    def _end_pass(self, item: Pass) -> None:
        node, generation, taken, took_ms = item
        if node.generation != generation:
            return
        now = self._events.now
        node.ran(taken, took_ms, now)
        for parcel, done in taken:
            route = parcel.route
            parcel.remaining -= done
            held = node.sessions.get(route.session)
            if held is None or route.session.route is not route:
                node.left(parcel, now)
                continue
            held.done += done
            if parcel.remaining:
                node.ready.append(parcel)
                continue
            node.left(parcel, now)
            held.waiting -= 1
            held.last = max(held.last, parcel.number)
            held.cached = max(held.cached, parcel.start + parcel.positions)
            self._forward(parcel)
        if node.ready:
            self._begin_pass(node)

    def _forward(self, parcel: Parcel) -> None:
        if parcel.hop < parcel.last_hop:
            parcel.hop += 1
            parcel.passed_over = 0
            self.send(parcel)
        elif parcel.final:
            # Of a prompt only its last position comes back; of a replay nothing but the news.
            route = parcel.route
            wire = route.wires[-1]
            latency_ms, payload_ms = wire.latency_ms, wire.token_ms if parcel.keep else 0.0
            if parcel.last_hop + 1 < len(route.hops):
                number = route.hops[parcel.last_hop][0].number
                latency_ms = self._geography.one_way_ms(number, route.session.client.number)
            arrival = self._events.now + payload_ms + self._latency(latency_ms)
            self._events.at(wire.in_order(arrival), route.session.answered, parcel)
