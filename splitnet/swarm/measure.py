"""Peers and links as a client plans with them: records, corrected by what was measured, and what to measure next."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Generic, ParamSpec, TypeVar

from scheduler.candidates import measured_first
from scheduler.facts import (
    CLIENT,
    DIMENSIONS,
    PASS_SIZES,
    UNMEASURED,
    Coordinate,
    Link,
    Network,
    Peer,
    Place,
    Speed,
    place_among,
)
from scheduler.liveness import ANSWER_S
from scheduler.replan import PredictionErrors
from scheduler.route_search import PINGED_AT_ONCE, Answers
from splitnet.directory.record import PeerRecord, facts_of, network_of, place_of
from splitnet.errors import SplitnetError
from splitnet.limits import keep_latest
from splitnet.swarm.links import Links
from splitnet.swarm.peer_cache import PeerCache
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import LoadReport

log = logging.getLogger(__name__)

TRUST_S = 60.0  # how long measured times of a hop count more than its record
STEPS = 3  # of so many steps the median counts: one that had to wait for a busy processor says nothing of its hop
REMEASURE_S = 30.0
KEPT_NETWORKS = 8  # a session asks for links of peers that it plans with, of its hops, and of those around each
OTHERS_PER_MINUTE = 6
LIKELY_PER_MINUTE = 9
"""Of the peers that are measured again while sessions are open: any, and those that routes most likely go through.

Before a route is planned anew, as the present one seems slow, it is one of each block at least.
"""
PINGS_PER_MINUTE = 256
ENDS_PINGS = 32  # of these, to the ends of a route: two, and up to eight that measure the bandwidth, to each
_PROBE_PINGS = 8
PROBE_AGAIN_S = 180.0  # after so long the bandwidth of a link is measured again: it takes 128 KiB and more
SUSPECTED_AGAIN_S = 25.0  # if steps stay slow
IN_USE_S = 300.0  # so long after a plan another session is expected, which should not wait for the directory
MAX_AGE_S = 90.0  # a link that was measured longer ago counts as not measured
KEPT_LINKS = 256
SETTLE_S = 300.0  # a place is found anew from the links of so long ago at most: one may have moved
SETTLE_LINKS = 32  # but from so many at least

P = ParamSpec("P")
T = TypeVar("T")


class NetworkCoordinates:
    """Measured links to peers by key text, and the coordinate that they make. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._links: dict[str, tuple[float, Link, Coordinate]] = {}
        self._coordinate = Coordinate()
        self._bytes_per_ms = 0.0
        self._random = random.Random()
        self._lock = threading.Lock()

    @property
    def place(self) -> Place:
        """As of now; an error of 1 and more says that it is not known yet."""
        with self._lock:
            return Place(self._coordinate, self._bytes_per_ms)

    @property
    def links(self) -> dict[str, Link]:
        """Links that were measured lately, the latest last; with 0 bytes per ms those of unknown bandwidth."""
        oldest = self._clock() - MAX_AGE_S
        with self._lock:
            return {key: link for key, (at, link, _) in self._links.items() if at >= oldest}

    def measured(self, record: PeerRecord, link: Link) -> None:
        """Takes in a link to a peer; of one whose bandwidth was not measured this time (0) the former one counts."""
        other = place_of(record).coordinate
        with self._lock:
            _, former, _ = self._links.get(record.key.text, (0.0, link, other))
            link = link if link.bytes_per_ms else Link(link.latency_ms, former.bytes_per_ms)
            keep_latest(self._links, record.key.text, (self._clock(), link, other), KEPT_LINKS)
            self._coordinate = self._coordinate.moved(other, 2 * link.latency_ms, self._direction())
            self._bytes_per_ms = max(self._bytes_per_ms, link.bytes_per_ms)

    def settle(self) -> None:
        """Finds the place anew from the latest links, for a device that measures many at a time."""
        oldest = self._clock() - SETTLE_S
        with self._lock:
            links = list(self._links.values())
            young = sum(at >= oldest for at, _, _ in links)
            measured = [(other, 2 * link.latency_ms) for _, link, other in links[-max(young, SETTLE_LINKS) :]]
            self._coordinate = place_among(measured, self._direction())

    def _direction(self) -> tuple[float, ...]:
        return tuple(self._random.gauss(0.0, 1.0) for _ in range(DIMENSIONS))


class Latest(Generic[P, T]):
    """Calls `make`, and keeps the results of the last `count` different arguments. Thread-safe.

    Arguments must not be changed afterwards; they are compared, so they need not be hashable.
    """

    def __init__(self, make: Callable[P, T], count: int) -> None:
        self._make = make
        self._count = count
        self._made: tuple[tuple[object, T], ...] = ()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        facts = (args, kwargs)
        made = self._made  # replaced as a whole, so that other threads may do so meanwhile
        found = next((each for each in made if each[0] == facts), None)
        if found is None:
            found = facts, self._make(*args, **kwargs)
        if not made or found is not made[0]:
            self._made = (found, *(each for each in made if each is not found))[: self._count]
        return found[1]


@dataclass(slots=True)
class _Seen:
    """The latest decode steps that a hop has run for this client."""

    at: float
    positions: int = 1  # of the last one; most have the same number
    block_ms: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    wait_ms: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))


class Measurements:
    """What a client has measured of peers and links. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.answers = Answers()  # which peers answered when their links were measured
        self.network_coordinates = NetworkCoordinates(clock)
        self._clock = clock
        self._hops: dict[str, _Seen] = {}
        self._loads: dict[str, tuple[float, LoadReport]] = {}  # with the time at which it was told
        self._links: dict[tuple[str, str], tuple[float, float]] = {}
        self._probed: dict[str, float] = {}  # when the bandwidth of the link was measured
        self._predictions = PredictionErrors()
        self._told = Latest(_told_network, KEPT_NETWORKS)
        self._lock = threading.Lock()

    @property
    def now_s(self) -> float:
        """By its clock."""
        return self._clock()

    def hop_seen(self, key: str, positions: int, block_ms: float, wait_ms: float) -> None:
        """Takes in what a decode step of `positions` met at a hop: ms per block, and ms until its pass began."""
        now = self._clock()
        with self._lock:
            seen = self._hops.get(key)
            if seen is None or now - seen.at >= TRUST_S:
                seen = self._hops[key] = _Seen(now)
            seen.at, seen.positions = now, positions
            seen.block_ms.append(block_ms)
            seen.wait_ms.append(wait_ms)
        self.answers.stepped(key, now)

    def link_seen(self, sender: str, receiver: str, rtt_ms: float) -> None:
        """Takes in the round trip between two hops."""
        with self._lock:
            self._links[sender, receiver] = (self._clock(), rtt_ms)

    def prediction_came(self, route: Hashable, ratio: float) -> None:
        """Takes in by what factor a route was slower than predicted."""
        with self._lock:
            self._predictions.came(route, ratio)

    @property
    def prediction_error(self) -> float:
        """By what factor routes have been slower than predicted lately, at least 1."""
        with self._lock:
            return self._predictions.error

    def peers(self, records: Sequence[PeerRecord]) -> list[Peer]:
        """The peers of these records."""
        hops, loads = self._seen_lately()
        return [_corrected(record, hops.get(record.key.text), loads.get(record.key.text)) for record in records]

    def corrected(self, records: Mapping[str, PeerRecord]) -> dict[str, Peer]:
        """The peers, by name, of which measurements or load reports differ from their records."""
        hops, loads = self._seen_lately()
        names = (hops.keys() | loads.keys()) & records.keys()
        return {name: _corrected(records[name], hops.get(name), loads.get(name)) for name in names}

    def _seen_lately(self) -> tuple[dict[str, _Seen], dict[str, LoadReport]]:
        oldest = self._clock() - TRUST_S
        with self._lock:
            hops = {key: seen for key, seen in self._hops.items() if seen.at >= oldest}
            return hops, {key: told for key, (at, told) in self._loads.items() if at >= oldest}

    def network(self, records: Sequence[PeerRecord]) -> Network:
        """All links, the client's own among them."""
        network = self._told(tuple(records), self.network_coordinates.links, self.network_coordinates.place)
        names = {record.key.text for record in records}
        oldest = self._clock() - TRUST_S
        with self._lock:
            self._links = {pair: seen for pair, seen in self._links.items() if seen[0] >= oldest}
            seen = {pair: rtt_ms for pair, (_, rtt_ms) in self._links.items() if names.issuperset(pair)}
        between = {pair: Link(rtt_ms / 2, network.link(*pair).bytes_per_ms) for pair, rtt_ms in seen.items()}
        return network.with_links(between) if between else network

    def unknown(self, records: Sequence[PeerRecord], exclude: Collection[str] = ()) -> list[PeerRecord]:
        """The peers, without those named `exclude`, whose link was never tried to be measured."""
        known = self.answers.asked_s().keys() | set(exclude)
        return [record for record in records if record.key.text not in known]

    def unprobed(self, records: Sequence[PeerRecord], again_s: float = math.inf) -> list[PeerRecord]:
        """The peers that answer, and to which the bandwidth was not measured within `again_s`."""
        oldest = self._clock() - again_s
        with self._lock:
            known = {key for key, at in self._probed.items() if at >= oldest}
        known |= self.silent()
        return [record for record in records if record.key.text not in known]

    def silent(self, *, lately: bool = False) -> set[str]:
        """Names of peers that did not answer when their links were measured; lately: only those tried a moment ago."""
        return self.answers.silent(self._clock(), lately=lately)

    def stale(self, records: Sequence[PeerRecord], age_s: float = REMEASURE_S) -> list[PeerRecord]:
        """The peers whose link was not tried to be measured for so long; the one tried longest ago first."""
        oldest = self._clock() - age_s
        asked_s = self.answers.asked_s()
        tried = [(asked_s.get(record.key.text, -math.inf), record) for record in records]
        return [record for at, record in sorted(tried, key=lambda each: each[0]) if at < oldest]

    def links_measured(
        self,
        tried: Mapping[Endpoint, PeerRecord],
        links: Mapping[Endpoint, Link],
        loads: Mapping[Endpoint, LoadReport] | None = None,
    ) -> None:
        """Takes in which links were tried, those that were measured (0 bytes per ms: not), and loads of peers."""
        now = self._clock()
        with self._lock:
            for endpoint, record in tried.items():
                key = record.key.text
                self._loads.pop(key, None)
                if loads and endpoint in loads:
                    self._loads[key] = now, loads[endpoint]
                if endpoint in links and links[endpoint].bytes_per_ms:
                    self._probed[key] = now
                for forgotten in self.answers.asked(key, now, answered=endpoint in links):
                    self._loads.pop(forgotten, None)
                    self._probed.pop(forgotten, None)
        for endpoint, link in links.items():
            self.network_coordinates.measured(tried[endpoint], link)
        self.network_coordinates.settle()


def _told_network(records: tuple[PeerRecord, ...], measured: dict[str, Link], place: Place) -> Network:
    rates = {record.key.text: record.bytes_per_ms for record in records}
    links: dict[tuple[str, str], Link] = {}
    for key, link in measured.items():
        told = [rate for rate in (place.bytes_per_ms, rates.get(key, 0.0)) if rate]
        rate = link.bytes_per_ms or min(told, default=UNMEASURED.bytes_per_ms)
        links[CLIENT, key] = links[key, CLIENT] = Link(link.latency_ms, rate)
    return network_of(records, links, {CLIENT: place} if place.coordinate.error < 1.0 else {})


def _corrected(record: PeerRecord, seen: _Seen | None, told: LoadReport | None) -> Peer:
    peer = facts_of(record)
    if told is not None and told.at >= record.issued_at:
        peer = replace(peer, queue_ms=told.wait_ms, batch=told.batch)
    if seen is None:
        return peer
    told_ms = max(peer.speed.at(seen.positions + peer.batch), 1e-6)
    usual_ms = _usual(seen.block_ms, told_ms)
    factor = usual_ms / told_ms
    # More positions take no less than was seen, even of a peer that says that they take no time.
    block_ms = tuple(
        max(ms * factor, usual_ms if size >= seen.positions + peer.batch else 0.0)
        for size, ms in zip(PASS_SIZES, peer.speed.block_ms, strict=True)
    )
    queue_ms = _usual(seen.wait_ms, peer.queue_ms)
    return replace(peer, speed=Speed(block_ms), queue_ms=queue_ms)


def _usual(seen: Sequence[float], told: float) -> float:
    """The median; before there are `STEPS` values, what the hop says is one of them."""
    return median_low(seen if len(seen) == STEPS else [told, *seen])


@dataclass(eq=False)
class Measurer:
    """Keeps measurements and records fresh, in the background while they are in use. Thread-safe; close it when done.

    links: of the client. While sessions use some, known ones are measured again and again. likely: of all peers and
    some of them so many of the latter through which routes most likely go; True: at least one for each block.
    """

    known: PeerCache
    measurements: Measurements
    links: Links
    likely: Callable[[Sequence[PeerRecord], Sequence[PeerRecord], int, bool], Sequence[PeerRecord]]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.news = 0  # counts up when facts were refreshed
        self._used_at = -math.inf
        self._pinged_at: deque[float] = deque()  # once for each ping to a peer that answers: to others nothing is sent
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._look = threading.Event()
        self._suspects: Sequence[PeerRecord] = ()
        self._suspects_probed_s = PROBE_AGAIN_S
        self._watcher = threading.Thread(target=self._watch, name="splitnet-watch", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Begins nothing in the background any more."""
        self._closing.set()
        self._look.set()

    def close(self) -> None:
        """Ends the thread, after the answers that it waits for."""
        self.stop()
        self._watcher.join(ANSWER_S)

    def look_again(self, suspects: Sequence[PeerRecord], *, probe: bool = False) -> None:
        """Refreshes the facts soon, in the background; the links to `suspects` are measured in any case.

        probe: steps stay slow, and no fact says why: the bandwidth is measured unless that was a moment ago.
        """
        self._suspects, self._suspects_probed_s = suspects, SUSPECTED_AGAIN_S if probe else PROBE_AGAIN_S
        self._look.set()

    def used(self) -> None:
        """Somebody plans with the facts, or may have to."""
        self._used_at = self.clock()

    def measure_first(self, records: Sequence[PeerRecord], exclude: Collection[str] = ()) -> None:
        """If few links are known, measures links to peers that were never tried, without those in `exclude`.

        The first are any peers, which tell the client's place; the others those through which routes most likely go.
        """
        anyone, *likely = measured_first(len(records))
        if len(self.measurements.network_coordinates.links) < anyone:
            unknown = sorted(self.measurements.unknown(records, exclude), key=lambda record: not record.is_proven)
            self.look_at(unknown[:anyone])
            for count in likely:
                self.look_at(self.likely(records, self.measurements.unknown(records, exclude), count, False))

    def look_at(self, records: Sequence[PeerRecord]) -> None:
        """Measures the round trips to the first of these peers, as far as a minute has pings for that."""
        self.measure((), records[: max(0, self._pings_left() - ENDS_PINGS) // 2])

    def measure(
        self, records: Sequence[PeerRecord], others: Sequence[PeerRecord] = (), again_s: float = PROBE_AGAIN_S
    ) -> bool:
        """Measures the links to the first of these peers, of `records` the bandwidth too, after `again_s` again.

        As far as a minute has pings for that; whether it had any.
        """
        left = self._pings_left()
        chosen = {record.endpoint: record for record in records[: left // (2 + _PROBE_PINGS)]}
        due = {record.endpoint for record in self.measurements.unprobed(list(chosen.values()), again_s)}
        left -= 2 * len(chosen) + _PROBE_PINGS * len(due)
        chosen |= {record.endpoint: record for record in others[: max(0, min(left // 2, PINGED_AT_ONCE))]}
        if chosen:
            links = self.links.prober.measure(chosen, ANSWER_S, probed=due, loads=chosen)
            self._pinged(2 * len(links) + _PROBE_PINGS * len(due & links.keys()))
            self._take_in(chosen, links)
        return bool(chosen)

    def _take_in(self, tried: Mapping[Endpoint, PeerRecord], links: Mapping[Endpoint, Link]) -> None:
        """Nobody is silent because what waits on the way to it holds up a ping."""
        told = {each: record for each, record in tried.items() if each in links or not self.links.is_busy(each)}
        loads = {each: load for each in tried.keys() & links.keys() if (load := self.links.prober.loads.get(each))}
        self.measurements.links_measured(told, links, loads)

    def _pings_left(self) -> int:
        """In this minute; other threads that measure may have overdrawn it."""
        now = self.clock()
        with self._counting:
            while self._pinged_at and now - self._pinged_at[0] > 60.0:
                self._pinged_at.popleft()
            return max(0, PINGS_PER_MINUTE - len(self._pinged_at))

    def _pinged(self, count: int) -> None:
        with self._counting:
            self._pinged_at.extend([self.clock()] * count)

    def _some_likely(
        self, records: Sequence[PeerRecord], among: Sequence[PeerRecord], *, everywhere: bool = False
    ) -> Sequence[PeerRecord]:
        """Some through which routes likely go; `everywhere`: one of each block, for a route that is to be planned."""
        count = self._at_once(LIKELY_PER_MINUTE)
        likely = self.likely(records, among, count, True)
        return likely if everywhere else random.sample(likely, min(len(likely), count))

    def _at_once(self, per_minute: int) -> int:
        return round(per_minute * self.known.look_s / 60)

    def _watch(self) -> None:
        """Keeps records fresh, and while sessions are open links: so they can tell when a better route exists."""
        while True:
            self._look.wait(self.known.look_s)
            if self._closing.is_set():
                return
            self._look.clear()
            has_sessions = self.links.has_sessions
            if has_sessions:
                self.used()
            if self.clock() - self._used_at > IN_USE_S:
                continue
            suspects, self._suspects = self._suspects, ()
            try:
                records = self.known.look(fresh=self.known.is_old)
                if has_sessions:
                    used = self.links.pool.in_use
                    self.look_at([record for record in self.measurements.stale(records) if record.endpoint in used])
                    self.measure(suspects, again_s=self._suspects_probed_s)
                    stale = self.measurements.stale(records)
                    self.look_at(stale[: self._at_once(OTHERS_PER_MINUTE)])
                    self.look_at(self._some_likely(records, self.measurements.stale(stale), everywhere=bool(suspects)))
                    self.news += 1
                else:  # so that the next session need not wait for that either
                    self.look_at(self._some_likely(records, self.measurements.unknown(records)))
            except SplitnetError as error:
                log.info("the facts about peers could not be refreshed: %s", error)
