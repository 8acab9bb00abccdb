"""A peer looks around: it measures its links to other peers, so that clients can plan with them."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait

from peers.next_hops import NextHops
from scheduler.coordinates import MIN_HEIGHT_MS
from splitnet.errors import SplitnetError
from splitnet.net.endpoints import Endpoint
from splitnet.net.identity import PublicKey
from splitnet.net.network_coordinates import NetworkCoordinates
from splitnet.net.prober import PING_TIMEOUT_S, Prober
from splitnet.net.records import KEY_PREFIX_BYTES, MAX_SEEN_LINKS, PeerRecord, SeenLink

log = logging.getLogger(__name__)

MEASURED_AT_ONCE = 8
ASKED_AT_ONCE = 32
HEARD_S = 600.0
"""After which a peer that has answered is asked again."""
KEPT_HEARD = 4096


class Neighbours:
    """Measures links to a few peers at a time: those that it knows least about.

    Args:
        others: looks up all other peers.
        links: opened for a measurement as for a session.
        prober: sends the pings.
    """

    def __init__(self, others: Callable[[], Sequence[PeerRecord]], links: NextHops, prober: Prober) -> None:
        self.network_coordinates = NetworkCoordinates()
        self._others = others
        self._links = links
        self._prober = prober
        self._random = random.Random()
        self._heard_at: dict[Endpoint, float] = {}
        self._asked_at: dict[Endpoint, float] = {}
        self._lock = threading.Lock()

    def heard(self, endpoint: Endpoint) -> None:
        """A peer has answered a ping."""
        with self._lock:
            _note(self._heard_at, endpoint)

    def answering(self, records: Sequence[PeerRecord]) -> list[PeerRecord]:
        """Those whose peers have answered a ping, which proves their key; takes 1 s while there are others.

        Anybody can announce peers that do not exist. At most `ASKED_AT_ONCE` are asked in one call: first those whose
        keys have cost work, then those that were asked longest ago. Who has answered counts until it is asked again,
        after `HEARD_S`, and is silent.
        """
        begin = time.monotonic()
        due = [record for record in records if begin - self._heard_at.get(record.endpoint, -math.inf) > HEARD_S]
        due.sort(key=lambda record: (not record.is_proven, self._asked_at.get(record.endpoint, 0.0)))
        asked = [record.endpoint for record in due[:ASKED_AT_ONCE] if self._links.acquire(record.endpoint)]
        try:
            wait([self._prober.ping(endpoint) for endpoint in asked], timeout=PING_TIMEOUT_S)
        finally:
            for endpoint in asked:
                self._links.release(endpoint)
        with self._lock:
            for endpoint in asked:
                _note(self._asked_at, endpoint)
                if self._heard_at.get(endpoint, begin) < begin:
                    del self._heard_at[endpoint]
            return [record for record in records if record.endpoint in self._heard_at]

    def look_around(self) -> None:
        """Measures some links; takes a few round trips, a few seconds at most."""
        try:
            others = list(self._others())
        except SplitnetError as error:
            log.warning("could not look for other peers: %s", error)
            return
        self._random.shuffle(others)
        others.sort(key=lambda record: -self.network_coordinates.age_s(record.key.text))
        chosen = {record.endpoint: record for record in others[:MEASURED_AT_ONCE]}
        borrowed = [endpoint for endpoint in chosen if self._links.acquire(endpoint)]
        try:
            for endpoint, link in self._prober.measure(borrowed).items():
                self.network_coordinates.measured(chosen[endpoint], link)
        finally:
            for endpoint in borrowed:
                self._links.release(endpoint)

    @property
    def seen_links(self) -> tuple[SeenLink, ...]:
        """The latest measurements, as they are published."""
        latest = list(self.network_coordinates.links.items())[-MAX_SEEN_LINKS:]
        return tuple(
            SeenLink(PublicKey.parse(key).raw[:KEY_PREFIX_BYTES], 2 * link.latency_ms, link.bytes_per_ms)
            for key, link in latest
        )

    @property
    def coordinate(self) -> tuple[tuple[float, ...], float]:
        """Vector with the height behind it, and the relative error, as they are published."""
        coordinate = self.network_coordinates.place.coordinate
        return (*coordinate.vector, max(coordinate.height_ms, MIN_HEIGHT_MS)), coordinate.error


def _note(times: dict[Endpoint, float], endpoint: Endpoint) -> None:
    times.pop(endpoint, None)
    times[endpoint] = time.monotonic()
    while len(times) > KEPT_HEARD:
        del times[next(iter(times))]
