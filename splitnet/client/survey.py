"""Peers and links as a client plans with them: what they say of themselves, corrected by what it has seen."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

from scheduler.network import CLIENT, UNMEASURED, Link, Network, Place
from scheduler.replan import Forecasts
from scheduler.swarm import PASS_SIZES, Peer, Speed
from splitnet.client.latest import Latest
from splitnet.net.endpoints import Endpoint
from splitnet.net.facts import facts_of, network_of
from splitnet.net.messages import ToldLoad
from splitnet.net.network_coordinates import NetworkCoordinates
from splitnet.net.records import PeerRecord

TRUST_S = 60.0
"""How long what was seen of a hop counts more than what it says."""

STEPS = 3
"""Of so many steps the median counts: one that had to wait for a busy processor says nothing of its hop."""

REMEASURE_S = 30.0
SILENT_S = 60.0
"""Who has answered before and was late is left out of routes for so long: it may have been busy, or the link. Whoever
never did may not exist."""

KEPT_NETWORKS = 8
"""A session asks for the links of the peers that it plans with, of its own hops, and of those at both ends of each."""

KEPT_TRIED = 4096
"""Of so many peers it is known when their links were measured; records of ever new peers cost nothing."""


@dataclass(slots=True)
class _Seen:
    """The latest decode steps that a hop has run for this client."""

    at: float
    positions: int = 1
    """Of the last one; most have the same number."""
    block_ms: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    wait_ms: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))


class Survey:
    """Thread-safe.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.network_coordinates = NetworkCoordinates(clock)
        self._clock = clock
        self._hops: dict[str, _Seen] = {}
        self._loads: dict[str, ToldLoad] = {}
        self._links: dict[tuple[str, str], tuple[float, float]] = {}
        self._tried: dict[str, float] = {}
        self._silent: set[str] = set()
        """Of those that were tried."""
        self._heard: set[str] = set()
        """Of those that were tried, who has ever answered."""
        self._probed: dict[str, float] = {}
        """Of those that were tried, with the bandwidth of the link, and when."""
        self._forecasts = Forecasts()
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

    def link_seen(self, sender: str, receiver: str, rtt_ms: float) -> None:
        """Takes in the round trip between two hops."""
        with self._lock:
            self._links[sender, receiver] = (self._clock(), rtt_ms)

    def forecast_came(self, route: Hashable, ratio: float) -> None:
        """Takes in by what factor a route was slower than predicted."""
        with self._lock:
            self._forecasts.came(route, ratio)

    @property
    def prediction_error(self) -> float:
        """By what factor routes have been slower than predicted lately, at least 1."""
        with self._lock:
            return self._forecasts.error

    def peers(self, records: Sequence[PeerRecord]) -> list[Peer]:
        """The peers of these records."""
        hops, loads = self._seen_lately()
        return [_corrected(record, hops.get(record.key.text), loads.get(record.key.text)) for record in records]

    def corrected(self, records: Mapping[str, PeerRecord]) -> dict[str, Peer]:
        """Those of the peers, by their names, of which something else was seen or told than their records say."""
        hops, loads = self._seen_lately()
        names = (hops.keys() | loads.keys()) & records.keys()
        return {name: _corrected(records[name], hops.get(name), loads.get(name)) for name in names}

    def _seen_lately(self) -> tuple[dict[str, _Seen], dict[str, ToldLoad]]:
        oldest = self._clock() - TRUST_S
        with self._lock:
            hops = {key: seen for key, seen in self._hops.items() if seen.at >= oldest}
            return hops, {key: told for key, told in self._loads.items() if self._tried[key] >= oldest}

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
        """Those of the peers, but for those with the names `exclude`, whose link nobody tried to measure yet."""
        with self._lock:
            known = self._tried.keys() | set(exclude)
        return [record for record in records if record.key.text not in known]

    def unprobed(self, records: Sequence[PeerRecord], again_s: float = math.inf) -> list[PeerRecord]:
        """Those of the peers to which the bandwidth of the link was not measured, as far as they answer.

        again_s: what was measured longer ago does not count.
        """
        oldest = self._clock() - again_s
        with self._lock:
            known = {key for key, at in self._probed.items() if at >= oldest}
        known |= self.silent()
        return [record for record in records if record.key.text not in known]

    def silent(self, *, lately: bool = False) -> set[str]:
        """Names of peers that did not answer when their links were measured: perhaps there are none such.

        lately: those alone that were tried a moment ago; else also those that never answered.
        """
        oldest = self._clock() - SILENT_S
        with self._lock:
            never: set[str] = set() if lately else self._silent - self._heard
            return never | {key for key in self._silent if self._tried[key] >= oldest}

    def met_since(self, since_s: float) -> tuple[set[str], set[str]]:
        """Names of those that were silent when they were asked since then, and of others from which something came."""
        with self._lock:
            asked = {key for key, at in self._tried.items() if at >= since_s}
            stepped = {key for key, seen in self._hops.items() if seen.at >= since_s}
            return asked & self._silent, (stepped | asked) - self._silent

    def stale(self, records: Sequence[PeerRecord], age_s: float = REMEASURE_S) -> list[PeerRecord]:
        """Those of the peers whose link nobody tried to measure for so long; the one tried longest ago first."""
        oldest = self._clock() - age_s
        with self._lock:
            tried = {record.key.text: self._tried.get(record.key.text, float("-inf")) for record in records}
        return sorted(
            (record for record in records if tried[record.key.text] < oldest),
            key=lambda record: tried[record.key.text],
        )

    def links_measured(
        self,
        tried: Mapping[Endpoint, PeerRecord],
        links: Mapping[Endpoint, Link],
        loads: Mapping[Endpoint, ToldLoad] | None = None,
    ) -> None:
        """Takes in which links the client tried to measure, and what came of it; 0 bytes per ms: not measured.

        loads: how busy the peers said that they are.
        """
        now = self._clock()
        with self._lock:
            for endpoint, record in tried.items():
                key = record.key.text
                self._tried.pop(key, None)
                self._tried[key] = now
                (self._silent.discard if endpoint in links else self._silent.add)(key)
                self._loads.pop(key, None)
                if loads and endpoint in loads:
                    self._loads[key] = loads[endpoint]
                if endpoint in links:
                    self._heard.add(key)
                if endpoint in links and links[endpoint].bytes_per_ms:
                    self._probed[key] = now
            while len(self._tried) > KEPT_TRIED:
                oldest = next(iter(self._tried))
                del self._tried[oldest]
                self._silent.discard(oldest)
                self._heard.discard(oldest)
                self._loads.pop(oldest, None)
                self._probed.pop(oldest, None)
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


def _corrected(record: PeerRecord, seen: _Seen | None, told: ToldLoad | None) -> Peer:
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
