"""The places of devices, and the latencies of messages between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.facts import Link, LinkTable, Network
from splitnet.errors import SplitnetError

CITIES: Final[Sequence[tuple[float, float, float]]] = (
    # Latitude, longitude, share of the devices
    (40.7, -74.0, 7), (42.4, -71.1, 2), (38.9, -77.0, 3), (33.7, -84.4, 2), (25.8, -80.2, 2), (41.9, -87.6, 3),
    (32.8, -96.8, 3), (39.7, -105.0, 1), (47.6, -122.3, 3), (37.5, -122.2, 5), (34.1, -118.2, 4), (43.7, -79.4, 3),
    (45.5, -73.6, 1), (19.4, -99.1, 2), (4.7, -74.1, 1), (-23.6, -46.6, 4), (-34.6, -58.4, 2), (-33.4, -70.7, 1),
    (51.5, -0.1, 6), (53.3, -6.3, 1), (48.9, 2.4, 5), (52.4, 4.9, 3), (50.1, 8.7, 5), (52.5, 13.4, 3),
    (48.1, 11.6, 2), (47.4, 8.5, 1), (48.2, 16.4, 1), (52.2, 21.0, 3), (50.1, 14.4, 1), (59.3, 18.1, 2),
    (60.2, 24.9, 1), (55.7, 12.6, 1), (40.4, -3.7, 2), (38.7, -9.1, 1), (45.5, 9.2, 2), (38.0, 23.7, 1),
    (44.4, 26.1, 1), (41.0, 29.0, 2), (50.5, 30.5, 2), (55.8, 37.6, 3), (32.1, 34.8, 1), (25.2, 55.3, 1),
    (30.0, 31.2, 1), (6.5, 3.4, 1), (-1.3, 36.8, 1), (-26.2, 28.0, 1), (19.1, 72.9, 4), (12.9, 77.6, 3),
    (28.6, 77.2, 3), (1.35, 103.8, 3), (-6.2, 106.8, 2), (13.8, 100.5, 1), (22.3, 114.2, 2), (25.0, 121.5, 2),
    (31.2, 121.5, 4), (39.9, 116.4, 4), (37.6, 127.0, 3), (35.7, 139.7, 5), (34.7, 135.5, 2), (-33.9, 151.2, 2),
    (-37.8, 145.0, 1), (-36.8, 174.8, 1),
)  # fmt: skip
"""Rounded places and rough shares, generated for the simulator: only continents and coasts matter."""

NETWORKS_PER_CITY: Final = 4
EARTH_KM: Final = 6371.0
FIBRE_KM_PER_MS: Final = 200.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Access:
    """The connection of a device. delay_ms: one-way delay of the access link. Rates in bytes per ms."""

    delay_ms: float
    up_bytes_per_ms: float
    down_bytes_per_ms: float


class Geography:
    """One-way latencies and bandwidths between devices, by their number, without a table of pairs of devices.

    The path between two access networks is longer than the great circle by a factor of the pair, and some paths have a
    detour; so a path through a third device is sometimes shorter (as on the Internet: Savage et al., 1999).
    """

    def __init__(self, rng: np.random.Generator, accesses: Sequence[Access]) -> None:
        count = len(accesses)
        cities = np.array(CITIES)
        city = rng.choice(len(cities), size=count, p=cities[:, 2] / cities[:, 2].sum())
        latitude = np.radians(cities[city, 0] + rng.normal(0.0, 0.4, count))
        longitude = np.radians(cities[city, 1] + rng.normal(0.0, 0.4, count))
        self.points: Floats = np.stack(
            [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
        )
        self.network_of = city * NETWORKS_PER_CITY + rng.integers(NETWORKS_PER_CITY, size=count)
        self._set_accesses(accesses)

        networks = len(cities) * NETWORKS_PER_CITY
        factor = 1.3 + rng.lognormal(-0.7, 0.6, (networks, networks))
        detour = np.where(rng.random((networks, networks)) < 0.05, rng.uniform(10.0, 80.0, (networks, networks)), 0.0)
        upper = np.triu(np.ones((networks, networks), dtype=bool))
        self.factor: Floats = np.where(upper, factor, factor.T)
        self.detour: Floats = np.where(upper, detour, detour.T)
        np.fill_diagonal(self.detour, 0.0)
        self._points = [tuple(map(float, point)) for point in self.points]
        self._network_of = [int(network) for network in self.network_of]
        self._factor: list[list[float]] = self.factor.tolist()
        self._detour: list[list[float]] = self.detour.tolist()

    def _set_accesses(self, accesses: Sequence[Access]) -> None:
        self.delay = np.array([access.delay_ms for access in accesses])
        self.up = np.array([access.up_bytes_per_ms for access in accesses])
        self.down = np.array([access.down_bytes_per_ms for access in accesses])
        self._delay = [float(delay) for delay in self.delay]

    def is_european(self, device: int) -> bool:
        """Whether the device is between the Atlantic and the Urals."""
        x, y, z = self._points[device]
        latitude, longitude = math.degrees(math.asin(z)), math.degrees(math.atan2(y, x))
        return latitude > 36.0 and -12.0 < longitude < 45.0

    def one_way_ms(self, sender: int, receiver: int) -> float:
        """Latency between two devices, the same in both directions, without jitter."""
        chord = math.dist(self._points[sender], self._points[receiver])
        kilometres = 2 * EARTH_KM * math.asin(min(1.0, chord / 2))
        here, there = self._network_of[sender], self._network_of[receiver]
        way = kilometres / FIBRE_KM_PER_MS * self._factor[here][there] + self._detour[here][there]
        return self._delay[sender] + self._delay[receiver] + way

    def link(self, sender: int, receiver: int) -> Link:
        """The link between two devices: as fast as the sender's uplink and the receiver's downlink allow."""
        return Link(self.one_way_ms(sender, receiver), float(min(self.up[sender], self.down[receiver])))

    def one_way_from(self, sender: int, receivers: NDArray[np.int64]) -> Floats:
        """`one_way_ms` to each of `receivers`."""
        return self.latencies(np.array([sender]), receivers)[0]

    def latencies(self, senders: NDArray[np.int64], receivers: NDArray[np.int64]) -> Floats:
        """`one_way_ms` of all pairs `[senders, receivers]`."""
        cosine = np.clip(self.points[senders] @ self.points[receivers].T, -1.0, 1.0)
        kilometres = 2 * EARTH_KM * np.arcsin(np.sqrt((1 - cosine) / 2))
        networks = np.ix_(self.network_of[senders], self.network_of[receivers])
        way = kilometres / FIBRE_KM_PER_MS * self.factor[networks] + self.detour[networks]
        return np.add.outer(self.delay[senders], self.delay[receivers]) + way


class MeasuredGeography(Geography):
    """Round trips measured between the nodes of a network. Each device is at one node.

    Args:
        rtt_ms: `[nodes, nodes]`, see `read_latencies`. With more devices than nodes, some devices share a node.
    """

    def __init__(self, rng: np.random.Generator, accesses: Sequence[Access], rtt_ms: Floats) -> None:
        self._set_accesses(accesses)
        self._node_of = np.resize(rng.permutation(len(rtt_ms)), len(accesses))
        self._way_ms = rtt_ms / 2

    def is_european(self, device: int) -> bool:
        raise SplitnetError("measured latencies do not show where the devices are: leave out the scenario dark")

    def one_way_ms(self, sender: int, receiver: int) -> float:
        way = self._way_ms[self._node_of[sender], self._node_of[receiver]]
        return self._delay[sender] + self._delay[receiver] + float(way)

    def latencies(self, senders: NDArray[np.int64], receivers: NDArray[np.int64]) -> Floats:
        way = self._way_ms[np.ix_(self._node_of[senders], self._node_of[receivers])]
        return np.add.outer(self.delay[senders], self.delay[receivers]) + way


def read_latencies(path: Path) -> Floats:
    """Round trips in ms, `[nodes, nodes]`, from a text file with a square table of numbers.

    Round trips that differ by direction are averaged. Values of 0 or less were not measured, and are replaced by the
    shortest path through a third node.

    Raises:
        SplitnetError: the file has no such table, or no path between some pair.
    """
    try:
        lines = [line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [line for line in lines if line]
        if odd := next((row for row in rows if len(row) != len(rows) or len(rows) < 2), None):
            raise ValueError(f"{len(rows)} lines, one of them with {len(odd)} numbers")
        rtt_ms = np.array(rows, dtype=np.float64)
        if not rows or not np.isfinite(rtt_ms).all():
            raise ValueError("a value is infinite or no number" if rows else "it is empty")
    except (OSError, ValueError) as error:
        raise SplitnetError(f"{path} has no square table of round trips: {error}") from error
    rtt_ms = np.where(rtt_ms > 0, rtt_ms, np.inf)
    rtt_ms = np.where(np.isinf(rtt_ms + rtt_ms.T), np.minimum(rtt_ms, rtt_ms.T), (rtt_ms + rtt_ms.T) / 2)
    np.fill_diagonal(rtt_ms, 0.0)
    missing = np.argwhere(np.isinf(rtt_ms))
    by_others = [(rtt_ms[here] + rtt_ms[:, there]).min() for here, there in missing]
    for (here, there), way_ms in zip(missing, by_others, strict=True):
        if math.isinf(way_ms):
            raise SplitnetError(f"{path} has no path between the nodes {here + 1} and {there + 1}")
        rtt_ms[here, there] = way_ms
    return rtt_ms


class TrueNetwork(Network):
    """A network in which all true links are known, unlike for any real client. number_of: devices by their names."""

    def __init__(self, geography: Geography, number_of: dict[str, int]) -> None:
        super().__init__()
        self._geography = geography
        self._number_of = number_of

    def link(self, sender: str, receiver: str) -> Link:
        return self._geography.link(self._number_of[sender], self._number_of[receiver])

    def _fill_table(self, ids: tuple[str, ...]) -> LinkTable:
        numbers = np.array([self._number_of[name] for name in ids])
        rates = np.minimum.outer(self._geography.up[numbers], self._geography.down[numbers])
        return LinkTable(self._geography.latencies(numbers, numbers), 1.0 / rates)
