"""The links of a swarm: those that were measured, and what is predicted or assumed of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.coordinates import DIMENSIONS, Coordinate

CLIENT: Final = ""
"""Stands for the client where a peer's id is expected."""


@dataclass(frozen=True, slots=True)
class Link:
    """A directed connection. latency_ms: one way. bytes_per_ms: bandwidth."""

    latency_ms: float
    bytes_per_ms: float


UNMEASURED: Final = Link(latency_ms=100.0, bytes_per_ms=1250.0)
"""Between two of whom nothing is known: across the world, 10 Mbit/s. Pessimistic, so that measured links win."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one device says of all its links at once. bytes_per_ms: the best it has seen; 0: it has seen none."""

    coordinate: Coordinate
    bytes_per_ms: float


class Network:
    """Links by (sender, receiver). Immutable.

    A link that was measured is taken as it is. Between two devices whose places are known the latency is predicted from
    their coordinates and raised by their errors, and the bandwidth is the smaller of the two. Any other link counts as
    `unmeasured`.
    """

    def __init__(
        self,
        links: Mapping[tuple[str, str], Link] | None = None,
        unmeasured: Link = UNMEASURED,
        places: Mapping[str, Place] | None = None,
    ) -> None:
        self.measured: Mapping[tuple[str, str], Link] = MappingProxyType(dict(links or {}))
        self.places: Mapping[str, Place] = MappingProxyType(dict(places or {}))
        self.unmeasured = unmeasured
        self._table = lru_cache(maxsize=2)(self._fill_table)

    def link(self, sender: str, receiver: str) -> Link:
        """The link from `sender` to `receiver`; either may be `CLIENT`."""
        link = self.measured.get((sender, receiver))
        if link is not None:
            return link
        here, there = self.places.get(sender), self.places.get(receiver)
        if here is None or there is None:
            return self.unmeasured
        rate = min(here.bytes_per_ms, there.bytes_per_ms) or self.unmeasured.bytes_per_ms
        error = (here.coordinate.error + there.coordinate.error) / 2
        return Link(here.coordinate.rtt_ms(there.coordinate) / 2 * (1 + error), rate)

    def with_links(self, links: Mapping[tuple[str, str], Link]) -> Network:
        """The same network with some links measured anew."""
        network = Network({**self.measured, **links}, self.unmeasured, self.places)

        def fill_table(ids: tuple[str, ...]) -> LinkTable:
            return self.table(ids).with_links(ids, links)

        network._table = lru_cache(maxsize=2)(fill_table)
        return network

    def with_places(self, places: Mapping[str, Place]) -> Network:
        """The same network with some places known anew."""
        return Network(self.measured, self.unmeasured, {**self.places, **places})

    def table(self, ids: Sequence[str]) -> LinkTable:
        """All links between these devices; the last tables are kept."""
        return self._table(tuple(ids))

    def _fill_table(self, ids: tuple[str, ...]) -> LinkTable:
        count = len(ids)
        places = [self.places.get(device) for device in ids]
        known = np.array([place is not None for place in places], dtype=bool)
        nowhere = Place(Coordinate(), 0.0)
        coordinates = [(place or nowhere).coordinate for place in places]
        vectors = np.array([coordinate.vector for coordinate in coordinates]).reshape(count, DIMENSIONS)
        heights = np.array([coordinate.height_ms for coordinate in coordinates])
        errors = np.array([coordinate.error for coordinate in coordinates])
        rates = np.array([(place or nowhere).bytes_per_ms for place in places])

        latency = np.zeros((count, count))
        for axis in range(DIMENSIONS):
            difference = np.subtract.outer(vectors[:, axis], vectors[:, axis])
            latency += difference * difference
        np.sqrt(latency, out=latency)
        latency += np.add.outer(heights, heights)
        latency *= np.add.outer(0.25 * (1 + errors), 0.25 * (1 + errors))
        slowest = np.minimum.outer(rates, rates)
        slowest[slowest == 0] = self.unmeasured.bytes_per_ms
        if not known.all():
            latency[~known, :] = latency[:, ~known] = self.unmeasured.latency_ms
            slowest[~known, :] = slowest[:, ~known] = self.unmeasured.bytes_per_ms

        return LinkTable(latency, 1.0 / slowest).with_links(ids, self.measured)


@dataclass(frozen=True, eq=False, slots=True)
class LinkTable:
    """Links between devices in their order, `[senders, receivers]`. Not to be written to."""

    latency_ms: NDArray[np.float64]
    ms_per_byte: NDArray[np.float64]

    def with_links(self, ids: Sequence[str], links: Mapping[tuple[str, str], Link]) -> LinkTable:
        """The table of these devices with some links measured anew."""
        index = {device: position for position, device in enumerate(ids)}
        latency_ms, ms_per_byte = self.latency_ms.copy(), self.ms_per_byte.copy()
        for (sender, receiver), link in links.items():
            row, column = index.get(sender), index.get(receiver)
            if row is not None and column is not None:
                latency_ms[row, column] = link.latency_ms
                ms_per_byte[row, column] = 1.0 / link.bytes_per_ms
        return LinkTable(latency_ms, ms_per_byte)
