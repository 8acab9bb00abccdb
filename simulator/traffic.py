"""Steps on their way: over links, into queues, through passes."""

from __future__ import annotations

import math
import random
from typing import Final

from scheduler.batching import DECODE_POSITIONS, PASS_POSITIONS
from scheduler.cost import Encoding
from scheduler.facts import Link
from simulator.events import Events
from simulator.node import Awaited, Held, Node, Parcel
from simulator.route import Hops, Route, Wire, wires_of
from simulator.world import World
from splitnet.wire.messages import FailureCode

RESTART_MS: Final = 200.0
"""A connection that was silent for so long, and a round trip more, begins slowly again (RFC 5681, section 4.1)."""


class Stream:
    """What one device sends another over TCP, in slow start (RFC 5681, section 3.1). Times in ms.

    Args:
        window_bytes: that are sent before the first are confirmed (RFC 6928: ten segments).
    """

    __slots__ = ("_free_ms", "_sent_bytes", "_window_bytes")

    def __init__(self, window_bytes: float) -> None:
        self._window_bytes = window_bytes
        self._sent_bytes = 0.0
        self._free_ms = -math.inf

    def sent(self, begin_ms: float, took_ms: float, nbytes: float, link: Link) -> float:
        """When the last of `nbytes` is sent that begin now, and take `took_ms` on a connection at full speed."""
        trip_ms = 2 * link.latency_ms
        if begin_ms - self._free_ms > RESTART_MS + trip_ms:
            self._sent_bytes = 0.0
        window, left, waits_ms = self._window_bytes + self._sent_bytes, nbytes, 0.0
        while left > window and window < link.bytes_per_ms * trip_ms:
            waits_ms += trip_ms - window / link.bytes_per_ms
            left -= window
            window *= 2
        self._sent_bytes += nbytes
        self._free_ms = max(begin_ms, self._free_ms) + took_ms + waits_ms
        return self._free_ms


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
        self._uplink_free_ms: dict[int, float] = {}
        self._streams: dict[tuple[int, int], Stream] = {}

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
        parcel.remaining = parcel.positions
        if (sender := _sender_of(parcel)) is not None:
            sender.sending += 1
        self._send_over((parcel, 0))

    def _send_over(self, item: tuple[Parcel, int]) -> None:
        """Sends a parcel over a link of its wire. Long ones of a device go one after the other; tokens slip in."""
        parcel, index = item
        wire, positions, now = parcel.route.wires[parcel.hop], parcel.positions, self._events.now
        link, encoding = wire.links[index], wire.encodings[index]
        if positions > DECODE_POSITIONS:
            here, there = wire.stations[index], wire.stations[index + 1]
            sent_ms = self._sent(here, there, link, positions, encoding)
        else:
            sent_ms = now + encoding.ms(positions, link.bytes_per_ms)
        arrival = wire.in_order(index, sent_ms + self._latency(link.latency_ms))
        if index + 1 == len(wire.links):
            self._events.at(arrival, self._receive, parcel)
        else:
            self._events.at(arrival, self._send_over, (parcel, index + 1))

    def _sent(self, here: int, there: int, link: Link, positions: int, encoding: Encoding) -> float:
        """When the last of a long step has been sent."""
        took_ms = encoding.ms(positions, link.bytes_per_ms)
        nbytes = positions * encoding.bytes_per_position
        begin = max(self._events.now, self._uplink_free_ms.get(here, 0.0))
        self._uplink_free_ms[here] = begin + min(took_ms, nbytes / float(self._geography.up[here]))
        stream = self._streams.setdefault((here, there), Stream(self._settings.window_bytes))
        return stream.sent(begin, took_ms, nbytes, link)

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
        if (sender := _sender_of(parcel)) is not None:
            sender.sending -= 1
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
            taken, ms = node.next_pass(now, self._uplink_free_ms.get(node.number, 0.0))
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
            self._events.at(wire.in_order(-1, arrival), route.session.answered, parcel)


def _sender_of(parcel: Parcel) -> Held | None:
    """The session at the hop before, in the epoch of a parcel that goes from there to the next."""
    route = parcel.route
    held = route.hops[parcel.hop - 1][0].sessions.get(route.session) if parcel.hop else None
    return held if held is not None and held.epoch == route.epoch else None
