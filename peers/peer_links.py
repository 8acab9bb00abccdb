"""The links of a peer to other peers: sending, links that stay open, and measurements."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peers.counters import TrafficCounter
from scheduler.candidates import by_use
from scheduler.facts import MIN_HEIGHT_MS, Link, Network
from scheduler.liveness import ANSWER_TRIPS, FIRST_TRIPS
from splitnet.directory.record import KEY_PREFIX_BYTES, MAX_SEEN_LINKS, PeerRecord, SeenLink, facts_of, place_of
from splitnet.errors import SplitnetError
from splitnet.limits import keep_latest
from splitnet.security.identity import PublicKey
from splitnet.swarm.measure import NetworkCoordinates
from splitnet.transport.pool import KEEP_S, LinkPool
from splitnet.transport.prober import Prober
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Destination, Endpoint
from splitnet.wire.messages import Message, encode

log = logging.getLogger(__name__)

MAX_NEXT_HOPS = 64  # maximum number of links that a peer opens to others
PROBE_S = 2.0  # interval between pings on links that sessions use
# Number of links measured in one round: half of them the least known, for network coordinates, half for routes.
MEASURED_AT_ONCE = 8
USEFUL_S = 600.0  # maximum age of a link's measurement that is used
RENEW_S = 60.0  # age after which a published measurement is renewed
ASKED_AT_ONCE = 32  # maximum number of peers that are pinged in one call
HEARD_S = 600.0  # time after a peer's answer until the peer is pinged again
KEPT_HEARD = 4096  # maximum number of peers whose last answers are remembered


class ReplyTarget(Protocol):
    """A sender of answers."""

    def send(self, destination: Destination, message: Message) -> None: ...


class Outbox:
    """Encodes, counts and sends the messages of a peer; has the link methods of its transport and prober."""

    def __init__(self, transport: Transport, traffic: TrafficCounter) -> None:
        self._transport = transport
        self._traffic = traffic
        self.prober = Prober(self.send, transport.is_taken)
        self.connect, self.disconnect, self.link_state = transport.connect, transport.disconnect, transport.link_state
        self.together, self.unsent = transport.together, transport.unsent
        self.probe, self.answered, self.rtt_ms = self.prober.probe, self.prober.last_answered, self.prober.rtt_ms

    def send(self, destination: Destination, message: Message) -> None:
        """Sends a message, which must not be changed afterwards."""
        frames = encode(message)
        self._traffic.count(destination, message, frames, sent=True)
        self._transport.send(destination, frames)

    def answer_limit_s(self, endpoint: Endpoint, *, connects: bool) -> float:
        """Seconds to wait for a pong, longer for long round trips. connects: whether the link must come up first."""
        return self.prober.answer_limit_s(endpoint, trips=FIRST_TRIPS if connects else ANSWER_TRIPS)


class NextHops(LinkPool):
    """The links of a peer to the next hops of its sessions. Thread-safe."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(outbox, most=MAX_NEXT_HOPS, keep_s=KEEP_S)
        self._outbox = outbox
        self._probe_at = 0.0

    def tick(self, now: float) -> None:
        """Closes unused links, and pings the peers of all other links."""
        super().tick(now)
        if now >= self._probe_at:
            self._probe_at = now + PROBE_S
            for endpoint in self.in_use:
                self._outbox.probe(endpoint)


@dataclass(eq=False)
class Neighbours:
    """Measures links to a few peers at a time, the least known first."""

    others: Callable[[], Sequence[PeerRecord]]  # looks up the records of all other peers
    links: NextHops  # open the links to measure
    prober: Prober
    own: Callable[[], PeerRecord | None] = lambda: None  # the peer's own record; None: its blocks are not chosen yet

    def __post_init__(self) -> None:
        self.network_coordinates = NetworkCoordinates()
        self._seen: dict[str, tuple[float, Link]] = {}  # time and result of measurements, by key text
        self._used: dict[str, tuple[float, float]] = {}  # time and round trip in ms on links of sessions, by key text
        self._answered: dict[Endpoint, int] = {}  # number of the last answered ping on links of sessions
        self._tried_at: dict[str, float] = {}  # time of the last attempt, answered or not, by key text
        self._useful: Sequence[str] = ()  # key texts of measured peers that can follow in a route, best first
        self._random = random.Random()
        self._heard_at: dict[Endpoint, float] = {}
        self._asked_at: dict[Endpoint, float] = {}
        self._lock = threading.Lock()

    def message_received(self, endpoint: Endpoint) -> None:
        with self._lock:
            keep_latest(self._heard_at, endpoint, time.monotonic(), KEPT_HEARD)

    def answering(self, records: Sequence[PeerRecord]) -> list[PeerRecord]:
        """The records whose peers have answered a ping, which proves their keys. Takes a second if a peer is silent.

        A record may name a peer that does not exist. One call pings at most `ASKED_AT_ONCE` peers: keys with a proof of
        work first, then peers by the time of their last ping. An answer counts until a ping after `HEARD_S` fails.
        """
        begin = time.monotonic()
        due = [record for record in records if begin - self._heard_at.get(record.endpoint, -math.inf) > HEARD_S]
        due.sort(key=lambda record: (not record.is_proven, self._asked_at.get(record.endpoint, 0.0)))
        asked = [record.endpoint for record in due[:ASKED_AT_ONCE] if self.links.acquire(record.endpoint)]
        try:
            self.prober.answering(asked)
        finally:
            for endpoint in asked:
                self.links.release(endpoint)
        with self._lock:
            for endpoint in asked:
                keep_latest(self._asked_at, endpoint, time.monotonic(), KEPT_HEARD)
                if self._heard_at.get(endpoint, begin) < begin:
                    del self._heard_at[endpoint]
            return [record for record in records if record.endpoint in self._heard_at]

    def hear_used(self) -> None:
        """Records the round trips of links of sessions with a ping that was answered since the last call."""
        now, before = time.monotonic(), self._answered
        self._answered = {endpoint: self.prober.last_answered(endpoint) for endpoint in self.links.in_use}
        heard = [endpoint for endpoint, number in self._answered.items() if number > before.get(endpoint, number)]
        used = {endpoint.key.text: (now, self.prober.rtt_ms(endpoint)) for endpoint in heard}
        self._used = {name: seen for name, seen in (self._used | used).items() if name in self._seen and seen[1]}

    def look_around(self) -> None:
        """Measures some links; takes a few round trips, at most a few seconds."""
        try:
            others = list(self.others())
        except SplitnetError as error:
            log.warning("could not look for other peers: %s", error)
            return
        self._random.shuffle(others)
        others.sort(key=lambda record: -self._age_s(record.key.text))
        useful = self._by_use(others)
        by_name = {record.key.text: record for record in others}
        began, half = time.monotonic(), MEASURED_AT_ONCE // 2
        self._tried_at = {name: at for name, at in self._tried_at.items() if began - at < USEFUL_S}
        published = [name for name in useful if name in self._seen][:MAX_SEEN_LINKS]
        published.sort(key=lambda name: -self._age_s(name))
        renewed = [name for name in published if self._age_s(name) > RENEW_S][: half // 2]
        fresh = [name for name in useful if name not in self._tried_at][: half - len(renewed)]
        names = list(dict.fromkeys([*renewed, *fresh, *by_name]))[:MEASURED_AT_ONCE]
        self._tried_at |= dict.fromkeys(names, began)
        seen = dict(self._seen)
        chosen = {by_name[name].endpoint: by_name[name] for name in names}
        borrowed = [endpoint for endpoint in chosen if self.links.acquire(endpoint)]
        try:
            for endpoint, link in self.prober.measure_links(borrowed).items():
                self.network_coordinates.measured(chosen[endpoint], link)
                seen[chosen[endpoint].key.text] = time.monotonic(), link
        finally:
            for endpoint in borrowed:
                self.links.release(endpoint)
        self._seen = {name: (at, link) for name, (at, link) in seen.items() if began - at < USEFUL_S}
        self._useful = self._by_use([record for record in others if record.key.text in self._seen])

    def _link(self, name: str, seen: tuple[float, Link]) -> Link:
        """The latest measurement of a link, by a separate measurement (`seen`: its time and result) or by sessions."""
        at, link = seen
        used_at, rtt_ms = self._used.get(name, (at, 0.0))
        return Link(rtt_ms / 2, link.bytes_per_ms) if used_at > at else link

    def _age_s(self, name: str) -> float:
        at, _ = self._seen.get(name, (-math.inf, None))
        return time.monotonic() - at

    def _by_use(self, others: Sequence[PeerRecord]) -> list[str]:
        """Key texts of the peers that can follow this one in a route, the most useful first."""
        own = self.own()
        if own is None or not others:
            return []
        place = self.network_coordinates.own_place
        links = {(own.key.text, name): self._link(name, seen) for name, seen in self._seen.items()}
        places = {record.key.text: place_of(record) for record in others if record.coordinate_error < 1.0}
        if place.coordinate.error < 1.0:
            places[own.key.text] = place
        useful = by_use(
            facts_of(own), [facts_of(record) for record in others], own.num_blocks, Network(links, places=places)
        )
        return [peer.id for peer in useful]

    @property
    def seen_links(self) -> tuple[SeenLink, ...]:
        """The measurements to publish: first the links that routes need, then the latest."""
        seen = self._seen
        latest = sorted(seen, key=self._age_s)
        best = dict.fromkeys([*(name for name in self._useful if name in seen), *latest])
        links = ((name, self._link(name, seen[name])) for name in list(best)[:MAX_SEEN_LINKS])
        return tuple(
            SeenLink(PublicKey.parse(name).raw[:KEY_PREFIX_BYTES], 2 * link.latency_ms, link.bytes_per_ms)
            for name, link in links
        )

    @property
    def coordinate(self) -> tuple[tuple[float, ...], float]:
        """The network coordinate to publish: the vector with the height as last element, and the relative error."""
        coordinate = self.network_coordinates.own_place.coordinate
        return (*coordinate.vector, max(coordinate.height_ms, MIN_HEIGHT_MS)), coordinate.error
