"""Steps in transit over links, through queues and passes, and the other messages of clients and peers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

from scheduler.batching import DECODE_POSITIONS, PASS_POSITIONS
from scheduler.cost import Encoding, fastest_encoding
from scheduler.facts import Link
from scheduler.liveness import PingAnswer
from simulator.clients import CONNECT_TRIPS
from simulator.node import AwaitedClient, HeldSession, Hops, Node, NodeRoute, Parcel, Wire
from simulator.session import RUNNING, SimulatedSession
from simulator.world import Events, World
from splitnet.errors import PeerLost
from splitnet.session.events import AskAlive, Event, LinkFailed, Received
from splitnet.swarm.peer_cache import LOOK_S
from splitnet.transport.pool import KEEP_S
from splitnet.wire.messages import Close, FailureCode, Open, Opened, Replay

RESTART_MS: Final = 200.0
"""After this silence and a round trip, a connection starts slowly again (RFC 5681, section 4.1)."""


class Stream:
    """A TCP connection from one device to another, in slow start (RFC 5681, section 3.1). Times in ms.

    Args:
        window_bytes: sent before the first confirmation (RFC 6928: ten segments).
    """

    __slots__ = ("_free_ms", "_sent_bytes", "_window_bytes")

    def __init__(self, window_bytes: float) -> None:
        self._window_bytes = window_bytes
        self._sent_bytes = 0.0
        self._free_ms = -math.inf

    def sent(self, begin_ms: float, took_ms: float, nbytes: float, link: Link) -> float:
        """When the last of `nbytes` is sent, from `begin_ms` on; at full speed the transfer would take `took_ms`."""
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
"""A running pass: its node, the node's generation, the number of positions of each parcel, and the pass's ms."""


class ParcelCarrier:
    """Transfers parcels from hop to hop. Times in ms.

    sessions: by the number of the client. through_client: whether all activations between two hops pass through the
    client.
    """

    def __init__(
        self, world: World, events: Events, sessions: Mapping[int, SimulatedSession], through_client: bool
    ) -> None:
        self._sessions = sessions
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
        wires: list[Wire] = []
        stations: list[Node | None] = [None, *(node for node, _, _ in hops), None]
        for sender, receiver in pairwise(stations):
            passed = [sender.number if sender else client, receiver.number if receiver else client]
            if self.through_client and sender and receiver:
                passed.insert(1, client)
            links = tuple(self._geography.link(here, there) for here, there in pairwise(passed))
            chosen = tuple(fastest_encoding(self._encodings, link.bytes_per_ms) for link in links)
            token_ms = sum(encoding.ms(1, link.bytes_per_ms) for encoding, link in zip(chosen, links, strict=True))
            latency_ms, last_ms = sum(link.latency_ms for link in links), [0.0] * len(links)
            wires.append(Wire(latency_ms, token_ms, tuple(passed), links, chosen, last_ms))
        return wires

    def replay(self, route: NodeRoute, first: int, last: int, positions: int, number: int) -> None:
        """The hop before hop `first` sends `positions` positions again, in steps that fit a pass."""
        start = 0
        while start < positions:
            count = min(positions - start, PASS_POSITIONS)
            final = start + count == positions
            self.send_parcel(Parcel(route, number if final else 0, first, last, start, count, final=final, replay=True))
            start += count

    def send_parcel(self, parcel: Parcel) -> None:
        """Sends a parcel to its hop from the previous hop."""
        parcel.remaining = parcel.positions
        if (sender := _sender_of(parcel)) is not None:
            sender.sending += 1
        self._send_over((parcel, 0))

    def _send_over(self, item: tuple[Parcel, int]) -> None:
        """Sends a parcel over a link of its wire. Long parcels of a device queue up; decode steps need not wait."""
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
            self._events.schedule(arrival, self._receive_parcel, parcel)
        else:
            self._events.schedule(arrival, self._send_over, (parcel, index + 1))

    def _sent(self, here: int, there: int, link: Link, positions: int, encoding: Encoding) -> float:
        """When the last byte of a long step has been sent."""
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

    def _receive_parcel(self, parcel: Parcel) -> None:
        route = parcel.route
        if not self._is_present(route):
            return
        if (sender := _sender_of(parcel)) is not None:
            sender.sending -= 1
        node = route.hops[parcel.hop][0]
        held = node.sessions.get(route.client)
        if held is None:
            if not node.gone:
                self._say_no_session(parcel)
        elif held.epoch == route.epoch:
            parcel.follows = held.waiting > 0
            held.waiting += 1
            node.add_parcel(parcel, self._events.now)
            if not node.running:
                self._begin_pass(node)

    def _say_no_session(self, parcel: Parcel) -> None:
        """A hop without the session reports this to the sender of the step, which forwards it to the client."""
        route, session = parcel.route, self._sessions[parcel.route.client]
        node = teller = route.hops[parcel.hop][0]
        delay_ms = 0.0
        if parcel.hop:
            teller = route.hops[parcel.hop - 1][0]
            delay_ms = self._geography.one_way_ms(node.number, teller.number)
        delay_ms += self._geography.one_way_ms(teller.number, route.client)
        failure = session.failure(teller, route.epoch, parcel.number, FailureCode.UNKNOWN_SESSION)
        self._events.schedule(self._events.now + delay_ms, session.feed, failure)

    def _is_present(self, route: NodeRoute) -> bool:
        """Whether the session still uses this route."""
        return self._sessions[route.client].route is route

    def _begin_pass(self, node: Node) -> None:
        now = self._events.now
        for parcel in [parcel for parcel in node.ready if not self._is_present(parcel.route)]:
            node.ready.remove(parcel)
            node.remove_parcel(parcel, now)
        if node.ready:
            taken, ms = node.next_pass(now, self._uplink_free_ms.get(node.number, 0.0))
            if taken:
                block_ms = node.block_ms(sum(count for _, count in taken))
                for parcel, _ in taken:
                    if parcel.positions <= DECODE_POSITIONS and not parcel.follows:
                        wait_ms = 0.0 if node.device.lies else now - parcel.arrived_ms
                        self._sessions[parcel.owner].observe_hop(node, node.told_ms(block_ms), wait_ms)
                self._events.schedule(now + ms, self._end_pass, (node, node.generation, taken, ms))
            else:
                self._events.schedule(now + ms, self._end_wait, (node, node.awaited))

    def _end_wait(self, item: tuple[Node, AwaitedClient | None]) -> None:
        node, awaited = item
        if node.awaited is awaited:
            self._begin_pass(node)

    def _end_pass(self, item: Pass) -> None:
        node, generation, taken, took_ms = item
        if node.generation != generation:
            return
        now = self._events.now
        node.end_pass(taken, took_ms, now)
        for parcel, done in taken:
            route = parcel.route
            parcel.remaining -= done
            held = node.sessions.get(route.client)
            if held is None or not self._is_present(route):
                node.remove_parcel(parcel, now)
                continue
            held.done += done
            if parcel.remaining:
                node.ready.append(parcel)
                continue
            node.remove_parcel(parcel, now)
            held.waiting -= 1
            held.last = max(held.last, parcel.number)
            held.cached = max(held.cached, parcel.start + parcel.positions)
            self._forward_parcel(parcel)
        if node.ready:
            self._begin_pass(node)

    def _forward_parcel(self, parcel: Parcel) -> None:
        if parcel.hop < parcel.last_hop:
            parcel.hop += 1
            parcel.passed_over = 0
            self.send_parcel(parcel)
        elif parcel.final:
            # A prompt returns only its last position; a replay returns no outputs.
            route = parcel.route
            wire = route.wires[-1]
            latency_ms, payload_ms = wire.latency_ms, wire.token_ms if parcel.keep else 0.0
            if parcel.last_hop + 1 < len(route.hops):
                number = route.hops[parcel.last_hop][0].number
                latency_ms = self._geography.one_way_ms(number, route.client)
            arrival = self._events.now + payload_ms + self._latency(latency_ms)
            self._events.schedule(wire.in_order(-1, arrival), self._answer_client, parcel)

    def _answer_client(self, parcel: Parcel) -> None:
        """Notifies the client that a request, or a replay, is done."""
        if self._is_present(parcel.route):
            session = self._sessions[parcel.owner]
            session.feed(session.result(parcel))


def _sender_of(parcel: Parcel) -> HeldSession | None:
    """The session at the hop before a parcel, if it is in the parcel's epoch."""
    route = parcel.route
    held = route.hops[parcel.hop - 1][0].sessions.get(route.client) if parcel.hop else None
    return held if held is not None and held.epoch == route.epoch else None


Call = Open | Close | Replay | AskAlive


class Calls:
    """Transfers calls and their answers. Times in ms.

    Attributes:
        under_way: calls and answers that have not arrived.
    """

    def __init__(self, world: World, events: Events, traffic: ParcelCarrier) -> None:
        self.under_way = 0
        self._users: dict[tuple[int, ...], list[SimulatedSession]] = {}
        """Sessions that use a connection, by its owners: a client, or a peer and its next hop."""
        self._up_ms: dict[tuple[int, int], float] = {}
        """When a peer's connection to its next hop is up."""
        self._geography = world.geography
        self._events = events
        self._traffic = traffic

    def send_call(self, session: SimulatedSession, node: Node, call: Call) -> None:
        """Sends a call to a peer; the first call may have to connect first.

        A client that has run for a while has measured its links to likely peers, and so is connected to them.
        """
        one_way_ms, now = self._one_way_ms(session, node), self._events.now
        if node not in session.contacts:
            up_ms = now + 2 * CONNECT_TRIPS * one_way_ms
            for user in (*self._share_connection((session.client.number,), session), session):
                looked = now - user.arrived_ms > LOOK_S * 1000
                up_ms = min(up_ms, user.contacts.get(node, now if looked else up_ms))
            session.contacts[node] = up_ms
        waits_ms = max(0.0, session.contacts[node] - now)
        self._later(waits_ms + one_way_ms, self._arrived, (session, node, call))

    def _share_connection(self, key: tuple[int, ...], session: SimulatedSession) -> list[SimulatedSession]:
        """Other sessions that use this connection, or did until it was closed. Adds the session to its users."""
        now = self._events.now
        others = [
            each
            for each in self._users.get(key, ())
            if each is not session and (each.state == RUNNING or now - each.ended_ms < KEEP_S * 1000)
        ]
        self._users[key] = [*others, session]
        return others

    def say_leaving(self, node: Node, held: Iterable[tuple[SimulatedSession, int]]) -> None:
        """A leaving peer notifies the clients of these sessions, each with its epoch, or its links end."""
        for session, epoch in held:
            if node.gone and node.device.crashes:
                endpoint = session.endpoint(node)
                error = PeerLost(f"the peer at {endpoint.address} is gone")
                self._feed_answer(session, node, LinkFailed(endpoint, error))
            else:
                self._feed_answer(session, node, session.failure(node, epoch, 0, FailureCode.LEAVING))

    def _one_way_ms(self, session: SimulatedSession, node: Node) -> float:
        return self._geography.one_way_ms(session.client.number, node.number)

    def _later(self, ms: float, act: Callable[[Any], None], subject: Any) -> None:
        self.under_way += 1
        self._events.schedule(self._events.now + ms, self._run_delayed, (act, subject))

    def _run_delayed(self, item: tuple[Callable[[Any], None], Any]) -> None:
        self.under_way -= 1
        act, subject = item
        act(subject)

    def _feed_answer(self, session: SimulatedSession, node: Node, event: Event) -> None:
        self._later(self._one_way_ms(session, node), session.feed, event)

    def _arrived(self, item: tuple[SimulatedSession, Node, Call]) -> None:
        session, node, call = item
        if node.gone:
            # A crashed device is silent. A device that left has no listener, which a client sees when it connects.
            if isinstance(call, Open) and not node.device.is_silent:
                endpoint = session.endpoint(node)
                error = PeerLost(f"nobody listens at {endpoint.address}: it may have ended")
                self._feed_answer(session, node, LinkFailed(endpoint, error))
            return
        match call:
            case Open():
                self._opens(session, node, call)
            case Close():
                node.release_session(session.client.number)
            case Replay():
                self._replays(session, node, call)
            case AskAlive():
                held = node.sessions.get(session.client.number)
                progress = (held.waiting or held.sending, held.done, held.last) if held else (0, 0, 0)
                alive = PingAnswer(session.endpoint(node), float(node.running), held is not None, *progress)
                self._feed_answer(session, node, alive)

    def _opens(self, session: SimulatedSession, node: Node, call: Open) -> None:
        refusal = node.open_session(session.client.number, call.epoch, (call.start, call.end), call.reservation)
        if refusal is not None:
            self._feed_answer(session, node, session.failure(node, call.epoch, 0, refusal))
            return
        opened = Opened(call.session, call.epoch, True, node.sessions[session.client.number].cached)
        answer = Received(session.endpoint(node), opened)
        self._later(self._connect_ms(session, node) + self._one_way_ms(session, node), session.feed, answer)

    def _connect_ms(self, session: SimulatedSession, node: Node) -> float:
        """Ms that a peer needs to connect to its next hop before it reports that it is open."""
        following = next((after for (hop, _, _), (after, _, _) in pairwise(session.hops) if hop is node), None)
        if following is None or self._traffic.through_client:
            return 0.0
        pair, now = (node.number, following.number), self._events.now
        if not self._share_connection(pair, session):
            self._up_ms[pair] = now + 2 * CONNECT_TRIPS * self._geography.one_way_ms(*pair)
        return max(0.0, self._up_ms[pair] - now)

    def _replays(self, session: SimulatedSession, node: Node, call: Replay) -> None:
        held, route = node.sessions.get(session.client.number), session.route
        if held is None:
            failure = session.failure(node, call.epoch, call.number, FailureCode.UNKNOWN_SESSION)
            self._feed_answer(session, node, failure)
        elif route is not None and held.epoch == route.epoch == call.epoch:
            first = 1 + next(index for index, hop in enumerate(route.hops) if hop[0] is node)
            last = next(index for index, hop in enumerate(route.hops) if hop[2] == call.until)
            self._traffic.replay(route, first, last, held.cached, call.number)
