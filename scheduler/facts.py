"""Facts about a swarm: the blocks, speeds and loads of peers, and the links between them. All objects are immutable."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.batching import PASS_POSITIONS

PASS_SIZES: Final = (1, 4, 16, 64, 256)  # positions of a pass through the blocks at which a peer states its speed
MAX_WATTS: Final = 1e5  # highest power in watts that a peer may state


@dataclass(frozen=True, slots=True)
class Speed:
    """Ms per block of one pass, by its number of positions: the decode tokens of a batch, or a chunk of a prefill.

    block_ms: one value for each of `PASS_SIZES`; another number of values raises ValueError. Between two sizes the ms
    are interpolated linearly; beyond the last size they grow in proportion.
    """

    block_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.block_ms) != len(PASS_SIZES):
            raise ValueError(f"a speed has {len(PASS_SIZES)} values, one for each of {PASS_SIZES}")

    @classmethod
    def of(cls, decode_ms: float, prefill_ms: float) -> Speed:
        """The speed of a device that reads a block's weights in `decode_ms` and computes a position in `prefill_ms`."""
        return cls(tuple(max(decode_ms, size * prefill_ms) for size in PASS_SIZES))

    def block_ms_at(self, positions: float) -> float:
        if positions <= PASS_SIZES[0]:
            return self.block_ms[0]
        if positions >= PASS_SIZES[-1]:
            return self.block_ms[-1] * positions / PASS_SIZES[-1]
        above = bisect_left(PASS_SIZES, positions)
        low, high = PASS_SIZES[above - 1], PASS_SIZES[above]
        share = (positions - low) / (high - low)
        return self.block_ms[above - 1] * (1 - share) + self.block_ms[above] * share


CONTEXTS: Final = (1024, 8192, 32768)  # positions in a row for which a peer states the time to read them


@dataclass(frozen=True, slots=True)
class ContextCost:
    """Additional ms of a pass through one block for reading the keys and values of earlier positions.

    ms: for a pass of one position and a pass of `PASS_POSITIONS`, at each of the `CONTEXTS` that were measured. Between
    two contexts the ms are interpolated linearly; beyond the last one they grow in proportion. Empty: the
    cost is unknown, and counts as 0.
    """

    ms: tuple[tuple[float, float], ...] = ()

    def ms_at(self, positions: float, context: float) -> float:
        """Ms for a pass of `positions` after `context` positions, all of one row."""
        if not self.ms or context <= 0:
            return 0.0
        above = min(bisect_left(CONTEXTS, context), len(self.ms) - 1)
        high = CONTEXTS[above]
        low, before = (CONTEXTS[above - 1], self.ms[above - 1]) if above and context < high else (0, (0.0, 0.0))
        share = (context - low) / (high - low)
        step_ms, chunk_ms = (a + share * (b - a) for a, b in zip(before, self.ms[above], strict=True))
        return max(0.0, step_ms + (chunk_ms - step_ms) * (positions - 1) / (PASS_POSITIONS - 1))


UNKNOWN_PAST: Final = ContextCost()


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that serves the blocks [start, end)."""

    id: str
    start: int
    end: int
    speed: Speed  # as observed
    queue_ms: float = 0.0  # wait of a step until its pass starts
    batch: float = 0.0  # positions of other sessions that share the pass of a decode step
    kv_free: int = 0  # positions that new sessions may still reserve
    watts: float = 0.0  # power of the device while it computes; 0: unknown
    sending_ms: float = 0.0  # time for which the output of one position occupies the peer's uplink; 0: unknown
    context_cost: ContextCost = UNKNOWN_PAST
    kv_capacity: int = 0  # positions that one session may reserve on an idle peer; 0: unknown
    stored_prefix: int = 0  # positions of the session's prompt that the peer has stored, and does not compute again


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks [start, end) that a peer runs on a route."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover all blocks in order and visit each peer once. cost_ms: cost under the objective of the plan."""

    hops: tuple[Hop, ...]
    cost_ms: float


def coverage(peers: Iterable[Peer], num_blocks: int) -> list[int]:
    """How many peers serve each of the blocks 0 .. num_blocks - 1."""
    change = [0] * (num_blocks + 1)
    for peer in peers:
        start, end = max(peer.start, 0), min(peer.end, num_blocks)
        if start < end:
            change[start] += 1
            change[end] -= 1
    replicas = 0
    return [replicas := replicas + step for step in change[:num_blocks]]


def missing_blocks(peers: Iterable[Peer], num_blocks: int, first: int = 0) -> list[tuple[int, int]]:
    """The ranges [start, end) of blocks that no peer serves, in order, from block `first` on."""
    ranges: list[tuple[int, int]] = []
    for block, replicas in enumerate(coverage(peers, num_blocks)):
        if replicas or block < first:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


def most_positions(peers: Sequence[Peer], blocks: tuple[int, int], held: Callable[[Peer], int]) -> int:
    """The longest session that fits into a peer for each of the blocks [start, end). Every block needs a peer.

    held: the number of positions for which a peer has memory.
    """
    return min(max(held(peer) for peer in peers if peer.start <= block < peer.end) for block in range(*blocks))


Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
CLIENT: Final = ""  # the client's id where the id of a peer is expected


@dataclass(frozen=True, slots=True)
class Link:
    """A directed link. latency_ms: one-way latency. bytes_per_ms: bandwidth."""

    latency_ms: float
    bytes_per_ms: float


# Assumed for a link that was not measured: a link across the world with 10 Mbit/s, so that routes prefer measured
# links.
UNMEASURED: Final = Link(100.0, 1250.0)


DIMENSIONS: Final = 3
TUNING: Final = 0.25  # the paper's constants c_e and c_c: how far one measurement moves the error and the coordinate
# Rounds over the measured round trips of a new device; after one round its coordinate is still far off.
PASSES: Final = 5
MIN_HEIGHT_MS: Final = 0.01
MAX_ERROR: Final = 1.5

MOST_OFF_MS: Final = 1000.0  # largest prediction error that counts: no two devices on Earth are farther apart
CONTRADICTION: Final = 2.0
CONTRADICTION_MS: Final = 50.0
"""Two devices contradict each other if the distance between their coordinates exceeds `CONTRADICTION` times the path
through a device that has measured both, plus `CONTRADICTION_MS`: then one of the two states a wrong position."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """The position of a device in a space of round-trip times, which predicts the delay between any two devices.

    Vivaldi with height vectors (Dabek, Cox, Kaashoek and Morris: "Vivaldi: A Decentralized Network Coordinate System",
    SIGCOMM 2004, sections 3 and 5.4).
    """

    vector: tuple[float, ...] = (0.0,) * DIMENSIONS  # in ms
    height_ms: float = MIN_HEIGHT_MS  # delay of the access link, which every path to the device includes
    # Expected relative error of round trips predicted from this coordinate; 1 or more: the coordinate says nothing.
    error: float = 1.0

    def rtt_ms(self, other: Coordinate) -> float:
        return math.dist(self.vector, other.vector) + self.height_ms + other.height_ms

    def moved_by(self, other: Coordinate, rtt_ms: float, direction: tuple[float, ...]) -> Coordinate:
        """The coordinate after a round trip of `rtt_ms` to `other`.

        direction: the direction of the move if both are at the same point; `DIMENSIONS` numbers, preferably random.
        """
        rtt_ms = max(rtt_ms, 2 * MIN_HEIGHT_MS)
        predicted = self.rtt_ms(other)
        own, theirs = max(self.error, 1e-3), max(other.error, 1e-3)
        weight = own / (own + theirs)
        share = TUNING * weight
        error = min(MAX_ERROR, abs(predicted - rtt_ms) / rtt_ms * share + self.error * (1 - share))
        away = tuple(here - there for here, there in zip(self.vector, other.vector, strict=True))
        apart = math.hypot(*away)
        force = share * max(-MOST_OFF_MS, min(MOST_OFF_MS, rtt_ms - predicted))
        if apart < 1e-6:
            # At the same point, the coordinate can only be pushed away, in any direction.
            away, apart, push = direction, math.hypot(*direction) or 1.0, max(0.0, force)
        else:
            push = max(force, -apart)  # stop at the other coordinate: beyond it, further movement would lead away
        vector = tuple(here + push * value / apart for here, value in zip(self.vector, away, strict=True))
        # The distance contains the difference of the vectors and the sum of the heights (section 5.4 of the paper).
        height = self.height_ms + force * (self.height_ms + other.height_ms) / max(predicted, 1e-6)
        return Coordinate(vector, max(height, MIN_HEIGHT_MS), error)


def place_among(measured: Sequence[tuple[Coordinate, float]], direction: tuple[float, ...]) -> Coordinate:
    """The coordinate of a device, from the coordinates of other devices and its round trips to them in ms.

    The search begins at the nearest device, because from the origin it may not reach a far corner. It runs over
    all devices several times. The error of the result is the median over the devices, and is raised if there are
    few devices. Devices with unknown coordinates are ignored, unless all coordinates are unknown; devices whose
    coordinates contradict most of the others are ignored, too.

    direction: see `Coordinate.moved_by`.
    """
    if not measured:
        return Coordinate()
    measured = _believable([(other, rtt_ms) for other, rtt_ms in measured if other.error < 1.0] or measured)
    nearest, _ = min(measured, key=lambda pair: pair[1])
    place = Coordinate(nearest.vector)
    for _ in range(PASSES):
        for other, rtt_ms in measured:
            place = place.moved_by(other, rtt_ms, direction)
    off = median(abs(place.rtt_ms(other) - rtt_ms) / max(rtt_ms, MIN_HEIGHT_MS) for other, rtt_ms in measured)
    return replace(place, error=min(MAX_ERROR, off + 1 / len(measured)))


def _believable(measured: Sequence[tuple[Coordinate, float]]) -> Sequence[tuple[Coordinate, float]]:
    """Devices whose stated coordinates agree with the round trips of most other devices; all devices, if no device
    does."""
    vectors = np.array([other.vector for other, _ in measured])
    heights = np.array([other.height_ms for other, _ in measured])
    rtt_ms = np.array([rtt_ms for _, rtt_ms in measured])
    squares = ((vectors[:, None, :] - vectors[None, :, :]) ** 2).sum(axis=2)
    said_ms = np.sqrt(squares) + np.add.outer(heights, heights)
    contradicted = (said_ms > CONTRADICTION * np.add.outer(rtt_ms, rtt_ms) + CONTRADICTION_MS).sum(axis=1)
    return [pair for pair, others in zip(measured, contradicted, strict=True) if 2 * others < len(measured)] or measured


@dataclass(frozen=True, slots=True)
class NetworkPlace:
    """What a device states about all its links. bytes_per_ms: its highest measured bandwidth; 0: no link was
    measured."""

    coordinate: Coordinate
    bytes_per_ms: float


class Network:
    """Links by (sender, receiver). Immutable.

    A measured link is used unchanged. Between two devices with known places, the latency is predicted from their
    coordinates and raised by their errors, and the bandwidth is the smaller one of the two devices. Any other link
    counts as `unmeasured`.
    """

    def __init__(
        self,
        links: Mapping[tuple[str, str], Link] | None = None,
        unmeasured: Link = UNMEASURED,
        places: Mapping[str, NetworkPlace] | None = None,
    ) -> None:
        self.measured: Mapping[tuple[str, str], Link] = MappingProxyType(dict(links or {}))
        self.places: Mapping[str, NetworkPlace] = MappingProxyType(dict(places or {}))
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
        network = Network({**self.measured, **links}, self.unmeasured, self.places)

        def fill_table(ids: tuple[str, ...]) -> LinkTable:
            return self.table(ids).with_links(ids, links)

        network._table = lru_cache(maxsize=2)(fill_table)
        return network

    def table(self, ids: Sequence[str]) -> LinkTable:
        """All links between these devices. The last two tables are cached."""
        return self._table(tuple(ids))

    def _fill_table(self, ids: tuple[str, ...]) -> LinkTable:
        count = len(ids)
        places = [self.places.get(device) for device in ids]
        known = np.array([place is not None for place in places], dtype=bool)
        nowhere = NetworkPlace(Coordinate(), 0.0)
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
    """The links between devices, as arrays `[senders, receivers]` in the order of the ids. Read-only."""

    latency_ms: Floats
    ms_per_byte: Floats

    def with_links(self, ids: Sequence[str], links: Mapping[tuple[str, str], Link]) -> LinkTable:
        index = {device: position for position, device in enumerate(ids)}
        latency_ms, ms_per_byte = self.latency_ms.copy(), self.ms_per_byte.copy()
        for (sender, receiver), link in links.items():
            row, column = index.get(sender), index.get(receiver)
            if row is not None and column is not None:
                latency_ms[row, column] = link.latency_ms
                ms_per_byte[row, column] = 1.0 / link.bytes_per_ms
        return LinkTable(latency_ms, ms_per_byte)
