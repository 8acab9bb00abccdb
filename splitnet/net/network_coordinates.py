"""Where this device stands among the peers, from the links that it has measured."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from scheduler.coordinates import DIMENSIONS, Coordinate, place_among
from scheduler.network import Link, Place
from splitnet.net.facts import place_of
from splitnet.net.records import PeerRecord

MAX_AGE_S = 90.0
"""A link that was measured longer ago counts as not measured."""

KEPT_LINKS = 256

SETTLE_S = 300.0
SETTLE_LINKS = 32
"""A place is found anew from the links of the last minutes, or from so many if these are fewer: one may have moved."""


class NetworkCoordinates:
    """Measured links to peers by key text, and the coordinate that they make. Thread-safe.

    Args:
        clock: seconds.
    """

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

    def age_s(self, key: str) -> float:
        """How long ago the link to a peer was measured; infinite: never."""
        with self._lock:
            at, *_ = self._links.get(key, (float("-inf"),))
        return self._clock() - at

    def measured(self, record: PeerRecord, link: Link) -> None:
        """Takes in a link to a peer; of one whose bandwidth was not measured this time (0) the former one counts."""
        other = place_of(record).coordinate
        with self._lock:
            _, former, _ = self._links.pop(record.key.text, (0.0, link, other))
            link = link if link.bytes_per_ms else Link(link.latency_ms, former.bytes_per_ms)
            self._links[record.key.text] = (self._clock(), link, other)
            while len(self._links) > KEPT_LINKS:
                del self._links[next(iter(self._links))]
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
