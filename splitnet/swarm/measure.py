"""Facts about peers and links for a client's plans: records, corrected by measurements; and what to measure next."""

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

from scheduler.candidates import measurement_rounds
from scheduler.facts import (
    CLIENT,
    DIMENSIONS,
    PASS_SIZES,
    UNMEASURED,
    Coordinate,
    Link,
    Network,
    NetworkPlace,
    Peer,
    Speed,
    place_among,
)
from scheduler.liveness import ANSWER_S
from scheduler.replan import PredictionErrors
from scheduler.route_search import PINGED_AT_ONCE, PingHistory
from splitnet.directory.record import PeerRecord, facts_of, network_of, place_of
from splitnet.errors import SplitnetError
from splitnet.limits import keep_latest
from splitnet.swarm.client_links import Links
from splitnet.swarm.peer_cache import PeerCache
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import LoadReport

log = logging.getLogger(__name__)

TRUST_S = 60.0  # age up to which measured times of a hop are preferred to its record
STEPS = 3  # decode steps whose median counts, because one step may wait for a busy processor
REMEASURE_S = 30.0  # age from which the round trip of a link is measured again
KEPT_NETWORKS = 8  # sets of peers whose links are kept, such as candidates of a plan, hops, neighbours of a hop
OTHERS_PER_MINUTE = 6
LIKELY_PER_MINUTE = 9
"""Peers that are measured again while sessions are open: any peers, and peers that are most likely on routes.

Before a slow route is planned again, at least one likely peer of each block is measured.
"""
PINGS_PER_MINUTE = 256
ENDS_PINGS = 32  # pings reserved for both ends of a route: two each, and up to eight each for the bandwidth
_PROBE_PINGS = 8
PROBE_AGAIN_S = 180.0  # age from which the bandwidth of a link is measured again, which takes 128 KiB or more
SUSPECTED_AGAIN_S = 25.0  # this age while steps stay slow
IN_USE_S = 300.0  # time after a plan for which records are kept fresh for the next session
MAX_AGE_S = 90.0  # age from which a measured link counts as not measured
KEPT_LINKS = 256
SETTLE_S = 300.0  # older links do not count for the client's place, because a device may move
SETTLE_LINKS = 32  # number of the latest links that count at any age

P = ParamSpec("P")
T = TypeVar("T")


class NetworkCoordinates:
    """Measured links to peers by key text, and the client's network coordinate. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._links: dict[str, tuple[float, Link, Coordinate]] = {}
        self._coordinate = Coordinate()
        self._bytes_per_ms = 0.0
        self._random = random.Random()
        self._lock = threading.Lock()

    @property
    def own_place(self) -> NetworkPlace:
        """The client's place. An error of 1 or more means that the place is unknown."""
        with self._lock:
            return NetworkPlace(self._coordinate, self._bytes_per_ms)

    @property
    def measured_links(self) -> dict[str, Link]:
        """Recently measured links, the latest last; 0 bytes per ms: unknown bandwidth."""
        oldest = self._clock() - MAX_AGE_S
        with self._lock:
            return {key: link for key, (at, link, _) in self._links.items() if at >= oldest}

    def measured(self, record: PeerRecord, link: Link) -> None:
        """Notes a measured link to a peer; with an unmeasured bandwidth (0), the former bandwidth is kept."""
        other = place_of(record).coordinate
        with self._lock:
            _, former, _ = self._links.get(record.key.text, (0.0, link, other))
            link = link if link.bytes_per_ms else Link(link.latency_ms, former.bytes_per_ms)
            keep_latest(self._links, record.key.text, (self._clock(), link, other), KEPT_LINKS)
            self._coordinate = self._coordinate.moved_by(other, 2 * link.latency_ms, self._direction())
            self._bytes_per_ms = max(self._bytes_per_ms, link.bytes_per_ms)

    def settle(self) -> None:
        """Computes the place from the latest links, for a device that measures many links at a time."""
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
        made = self._made  # replaced as a whole, so that threads need no lock
        found = next((each for each in made if each[0] == facts), None)
        if found is None:
            found = facts, self._make(*args, **kwargs)
        if not made or found is not made[0]:
            self._made = (found, *(each for each in made if each is not found))[: self._count]
        return found[1]


@dataclass(slots=True)
class _Observation:
    """The latest decode steps that a hop has run for this client."""

    at: float
    positions: int = 1  # of the last step; most steps have the same number
    block_ms: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    wait_ms: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))


class Measurements:
    """A client's measurements of peers and links. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.answers = PingHistory()  # peers that have answered measurements
        self.network_coordinates = NetworkCoordinates(clock)
        self._clock = clock
        self._hops: dict[str, _Observation] = {}
        self._loads: dict[str, tuple[float, LoadReport]] = {}  # with the time of the report
        self._links: dict[tuple[str, str], tuple[float, float]] = {}
        self._probed: dict[str, float] = {}  # when the bandwidth of the link was measured
        self._predictions = PredictionErrors()
        self._told = Latest(_told_network, KEPT_NETWORKS)
        self._lock = threading.Lock()

    @property
    def now_s(self) -> float:
        """The present time of the clock, in seconds."""
        return self._clock()

    def hop_seen(self, key: str, positions: int, block_ms: float, wait_ms: float) -> None:
        """Notes the times of a decode step of `positions` at a hop: ms per block, and ms until its pass began."""
        now = self._clock()
        with self._lock:
            seen = self._hops.get(key)
            if seen is None or now - seen.at >= TRUST_S:
                seen = self._hops[key] = _Observation(now)
            seen.at, seen.positions = now, positions
            seen.block_ms.append(block_ms)
            seen.wait_ms.append(wait_ms)
        self.answers.record_step(key, now)

    def link_seen(self, sender: str, receiver: str, rtt_ms: float) -> None:
        """Notes the round trip between two hops."""
        with self._lock:
            self._links[sender, receiver] = (self._clock(), rtt_ms)

    def add_prediction(self, route: Hashable, ratio: float) -> None:
        """Notes the ratio of a route's measured time to its predicted time."""
        with self._lock:
            self._predictions.add_ratio(route, ratio)

    @property
    def prediction_error(self) -> float:
        """Factor by which recent routes were slower than predicted, at least 1."""
        with self._lock:
            return self._predictions.error

    def peers(self, records: Sequence[PeerRecord]) -> list[Peer]:
        """The peers of these records."""
        hops, loads = self._seen_lately()
        return [_corrected(record, hops.get(record.key.text), loads.get(record.key.text)) for record in records]

    def corrected_peers(self, records: Mapping[str, PeerRecord]) -> dict[str, Peer]:
        """The peers with measurements or load reports, by name, with their records corrected."""
        hops, loads = self._seen_lately()
        names = (hops.keys() | loads.keys()) & records.keys()
        return {name: _corrected(records[name], hops.get(name), loads.get(name)) for name in names}

    def _seen_lately(self) -> tuple[dict[str, _Observation], dict[str, LoadReport]]:
        oldest = self._clock() - TRUST_S
        with self._lock:
            hops = {key: seen for key, seen in self._hops.items() if seen.at >= oldest}
            return hops, {key: told for key, (at, told) in self._loads.items() if at >= oldest}

    def network(self, records: Sequence[PeerRecord]) -> Network:
        """All links, with the client's own links."""
        network = self._told(
            tuple(records), self.network_coordinates.measured_links, self.network_coordinates.own_place
        )
        names = {record.key.text for record in records}
        oldest = self._clock() - TRUST_S
        with self._lock:
            self._links = {pair: seen for pair, seen in self._links.items() if seen[0] >= oldest}
            seen = {pair: rtt_ms for pair, (_, rtt_ms) in self._links.items() if names.issuperset(pair)}
        between = {pair: Link(rtt_ms / 2, network.link(*pair).bytes_per_ms) for pair, rtt_ms in seen.items()}
        return network.with_links(between) if between else network

    def unknown(self, records: Sequence[PeerRecord], exclude: Collection[str] = ()) -> list[PeerRecord]:
        """The peers whose links were never asked for a measurement, without the names in `exclude`."""
        known = self.answers.asked_s().keys() | set(exclude)
        return [record for record in records if record.key.text not in known]

    def unprobed(self, records: Sequence[PeerRecord], again_s: float = math.inf) -> list[PeerRecord]:
        """The answering peers whose bandwidth was not measured within `again_s`."""
        oldest = self._clock() - again_s
        with self._lock:
            known = {key for key, at in self._probed.items() if at >= oldest}
        known |= self.silent_peers()
        return [record for record in records if record.key.text not in known]

    def silent_peers(self, *, lately: bool = False) -> set[str]:
        """Names of peers that did not answer the last measurement; lately: only recent measurements
        count."""
        return self.answers.silent_peers(self._clock(), lately=lately)

    def stale(self, records: Sequence[PeerRecord]) -> list[PeerRecord]:
        """The peers whose last measurement, answered or not, is older than `REMEASURE_S`; the oldest first."""
        oldest = self._clock() - REMEASURE_S
        asked_s = self.answers.asked_s()
        tried = [(asked_s.get(record.key.text, -math.inf), record) for record in records]
        return [record for at, record in sorted(tried, key=lambda each: each[0]) if at < oldest]

    def links_measured(
        self,
        tried: Mapping[Endpoint, PeerRecord],
        links: Mapping[Endpoint, Link],
        loads: Mapping[Endpoint, LoadReport] | None = None,
    ) -> None:
        """Notes a measurement: the peers that were asked, measured links (0 bytes per ms: unmeasured), and loads."""
        now = self._clock()
        with self._lock:
            for endpoint, record in tried.items():
                key = record.key.text
                self._loads.pop(key, None)
                if loads and endpoint in loads:
                    self._loads[key] = now, loads[endpoint]
                if endpoint in links and links[endpoint].bytes_per_ms:
                    self._probed[key] = now
                for forgotten in self.answers.record_ping(key, now, answered=endpoint in links):
                    self._loads.pop(forgotten, None)
                    self._probed.pop(forgotten, None)
        for endpoint, link in links.items():
            self.network_coordinates.measured(tried[endpoint], link)
        self.network_coordinates.settle()


def _told_network(records: tuple[PeerRecord, ...], measured: dict[str, Link], place: NetworkPlace) -> Network:
    rates = {record.key.text: record.bytes_per_ms for record in records}
    links: dict[tuple[str, str], Link] = {}
    for key, link in measured.items():
        told = [rate for rate in (place.bytes_per_ms, rates.get(key, 0.0)) if rate]
        rate = link.bytes_per_ms or min(told, default=UNMEASURED.bytes_per_ms)
        links[CLIENT, key] = links[key, CLIENT] = Link(link.latency_ms, rate)
    return network_of(records, links, {CLIENT: place} if place.coordinate.error < 1.0 else {})


def _corrected(record: PeerRecord, seen: _Observation | None, told: LoadReport | None) -> Peer:
    peer = facts_of(record)
    if told is not None and told.at >= record.issued_at:
        peer = replace(peer, queue_ms=told.wait_ms, batch=told.batch)
    if seen is None:
        return peer
    told_ms = max(peer.speed.block_ms_at(seen.positions + peer.batch), 1e-6)
    usual_ms = _usual(seen.block_ms, told_ms)
    factor = usual_ms / told_ms
    # More positions take at least the measured time, even if the peer reports none.
    block_ms = tuple(
        max(ms * factor, usual_ms if size >= seen.positions + peer.batch else 0.0)
        for size, ms in zip(PASS_SIZES, peer.speed.block_ms, strict=True)
    )
    queue_ms = _usual(seen.wait_ms, peer.queue_ms)
    return replace(peer, speed=Speed(block_ms), queue_ms=queue_ms)


def _usual(seen: Sequence[float], told: float) -> float:
    """The median of the measured values; with fewer than `STEPS` values, the reported value is added."""
    return median_low(seen if len(seen) == STEPS else [told, *seen])


@dataclass(eq=False)
class Measurer:
    """Keeps measurements and records fresh in the background while they are in use. Thread-safe. Must be closed.

    links: the links of the client, which are measured repeatedly while sessions are open. likely: chooses, from all
    peers and a subset, a number of the subset's peers that are most likely on routes; True: at least one per block.
    """

    known: PeerCache
    measurements: Measurements
    links: Links
    likely: Callable[[Sequence[PeerRecord], Sequence[PeerRecord], int, bool], Sequence[PeerRecord]]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.news = 0  # number of refreshes of the facts
        self._used_at = -math.inf
        self._pinged_at: deque[float] = deque()  # times of pings, except to silent peers, which get none
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._look = threading.Event()
        self._suspects: Sequence[PeerRecord] = ()
        self._suspects_probed_s = PROBE_AGAIN_S
        self._watcher = threading.Thread(target=self._watch, name="splitnet-watch", daemon=True)
        self._watcher.start()

    def stop_measuring(self) -> None:
        """Stops the work in the background."""
        self._closing.set()
        self._look.set()

    def close(self) -> None:
        """Ends the thread, after the answers that the thread awaits."""
        self.stop_measuring()
        self._watcher.join(ANSWER_S)

    def look_again(self, suspects: Sequence[PeerRecord], *, probe: bool = False) -> None:
        """Refreshes the facts soon, in the background, and measures the links to `suspects`.

        probe: also measure the bandwidth, unless it was measured a moment ago; for steps that stay slow without a
        known reason.
        """
        self._suspects, self._suspects_probed_s = suspects, SUSPECTED_AGAIN_S if probe else PROBE_AGAIN_S
        self._look.set()

    def used(self) -> None:
        """Notes that the facts are in use, or soon may be."""
        self._used_at = self.clock()

    def measure_first(self, records: Sequence[PeerRecord], exclude: Collection[str] = ()) -> None:
        """Measures links to unmeasured peers if few links are known, without the names in `exclude`.

        The first peers are arbitrary and give the client's place; the others are most likely on routes.
        """
        anyone, *likely = measurement_rounds(len(records))
        if len(self.measurements.network_coordinates.measured_links) < anyone:
            unknown = sorted(self.measurements.unknown(records, exclude), key=lambda record: not record.is_proven)
            self.look_at(unknown[:anyone])
            for count in likely:
                self.look_at(self.likely(records, self.measurements.unknown(records, exclude), count, False))

    def look_at(self, records: Sequence[PeerRecord]) -> None:
        """Measures the round trips to these peers in order, until the pings of this minute are used up."""
        self.measure_peers((), records[: max(0, self._pings_left() - ENDS_PINGS) // 2])

    def measure_peers(
        self, records: Sequence[PeerRecord], others: Sequence[PeerRecord] = (), again_s: float = PROBE_AGAIN_S
    ) -> bool:
        """Measures the links to these peers in order, until the pings of this minute are used up.

        For `records` also measures the bandwidth, if the last value is older than `again_s`. Returns whether any
        peer was measured.
        """
        left = self._pings_left()
        chosen = {record.endpoint: record for record in records[: left // (2 + _PROBE_PINGS)]}
        due = {record.endpoint for record in self.measurements.unprobed(list(chosen.values()), again_s)}
        left -= 2 * len(chosen) + _PROBE_PINGS * len(due)
        chosen |= {record.endpoint: record for record in others[: max(0, min(left // 2, PINGED_AT_ONCE))]}
        if chosen:
            links = self.links.prober.measure_links(chosen, ANSWER_S, probed=due, loads=chosen)
            self._pinged(2 * len(links) + _PROBE_PINGS * len(due & links.keys()))
            self._take_in(chosen, links)
        return bool(chosen)

    def _take_in(self, tried: Mapping[Endpoint, PeerRecord], links: Mapping[Endpoint, Link]) -> None:
        """Notes results. A peer on a busy link does not count as silent, because its ping may wait in a queue."""
        told = {each: record for each, record in tried.items() if each in links or not self.links.is_busy(each)}
        loads = {each: load for each in tried.keys() & links.keys() if (load := self.links.prober.loads.get(each))}
        self.measurements.links_measured(told, links, loads)

    def _pings_left(self) -> int:
        """Pings left in this minute; other threads may have exceeded the limit."""
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
        """Some peers that are likely on routes. everywhere: one of each block, before a route is planned."""
        count = self._at_once(LIKELY_PER_MINUTE)
        likely = self.likely(records, among, count, True)
        return likely if everywhere else random.sample(likely, min(len(likely), count))

    def _at_once(self, per_minute: int) -> int:
        return round(per_minute * self.known.look_s / 60)

    def _watch(self) -> None:
        """Keeps records fresh, and links while sessions are open, so that sessions find better routes."""
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
                records = self.known.refresh(fresh=self.known.is_old)
                if has_sessions:
                    used = self.links.pool.in_use
                    self.look_at([record for record in self.measurements.stale(records) if record.endpoint in used])
                    self.measure_peers(suspects, again_s=self._suspects_probed_s)
                    stale = self.measurements.stale(records)
                    self.look_at(stale[: self._at_once(OTHERS_PER_MINUTE)])
                    self.look_at(self._some_likely(records, self.measurements.stale(stale), everywhere=bool(suspects)))
                    self.news += 1
                else:  # measures now, so that the next session does not wait
                    self.look_at(self._some_likely(records, self.measurements.unknown(records)))
            except SplitnetError as error:
                log.info("the facts about peers could not be refreshed: %s", error)
