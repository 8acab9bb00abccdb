"""The records that peers have published, the view of clients, and the keys and addresses of the simulated peers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from ipaddress import IPv6Address

import numpy as np
from nacl.signing import SigningKey
from numpy.typing import NDArray

from scheduler.candidates import CandidateIndex
from scheduler.facts import DIMENSIONS, PASS_SIZES, Coordinate, Hop, Link, Network, NetworkPlace, Peer
from scheduler.placement import Spans
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import PublicKey
from splitnet.swarm.plan import PlannedHop
from splitnet.wire.endpoints import Endpoint

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ID_BYTES = 32
"""A public key."""
NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Record:
    """A peer's record.

    number: of the device. links: measured to others, by their ids. sessions: open ones. settled_at_s: when it began to
    serve its blocks.
    """

    number: int
    peer: Peer
    place: NetworkPlace
    links: Mapping[str, Link]
    published_s: float
    sessions: int
    settled_at_s: float

    @property
    def size_bytes(self) -> int:
        """Size of the packed facts, without the address, the signature and the description of the model."""
        own = 2 + len(self.peer.speed.block_ms) + 3 + len(self.place.coordinate.vector) + 3 + 2
        return ID_BYTES + own * NUMBER_BYTES + len(self.links) * (ID_BYTES + 2 * NUMBER_BYTES)


class DirectoryView:
    """All records that clients know between two readings of the directory. Immutable.

    Attributes:
        peers, numbers, start, end, kv_free: of all records, in one order.
        arriving: peers that are moving to other blocks, with their new blocks.
        at_s: when the directory was read.
    """

    def __init__(self, records: Collection[Record], num_blocks: int, arriving: Sequence[Peer], at_s: float) -> None:
        self.arriving = arriving
        self.at_s = at_s
        self.records = {record.peer.id: record for record in records}
        self.peers = [record.peer for record in self.records.values()]
        self.num_blocks = num_blocks
        self.numbers = np.array([record.number for record in records], dtype=np.int64)
        self.start = np.array([peer.start for peer in self.peers], dtype=np.int64)
        self.end = np.array([peer.end for peer in self.peers], dtype=np.int64)
        self.kv_free = np.array([peer.kv_free for peer in self.peers], dtype=np.int64)

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of each peer in this order."""
        return {peer.id: position for position, peer in enumerate(self.peers)}

    @cached_property
    def idle_peers(self) -> list[Peer]:
        """All peers without load."""
        return [replace(peer, queue_ms=0.0, batch=0.0) for peer in self.peers]

    @cached_property
    def serving(self) -> list[Integers]:
        """For each block the indices of the peers that serve it."""
        return [np.flatnonzero((self.start <= block) & (block < self.end)) for block in range(self.num_blocks)]

    @cached_property
    def decode_ms(self) -> Floats:
        """Ms of one block and position, without load."""
        return np.array([peer.speed.block_ms_at(1) for peer in self.peers])

    @cached_property
    def network_places(self) -> Network:
        """The coordinates of all peers, without measured links."""
        return Network(places={name: record.place for name, record in self.records.items()})

    @cached_property
    def idle_crowd(self) -> CandidateIndex:
        """All peers without load, prepared for the choice of candidates."""
        return CandidateIndex(self.idle_peers, self.network_places)

    @cached_property
    def coordinates(self) -> tuple[Floats, Floats]:
        """Vectors and heights of all peers."""
        return points_of([record.place.coordinate for record in self.records.values()])

    def links_behind(self, block: int) -> tuple[Integers, Integers, Floats]:
        """Senders, receivers and one-way ms of all published links from peers whose span ends at this block."""
        ends, senders, receivers, latency_ms = self._links
        links = slice(*np.searchsorted(ends, [block, block + 1]))
        return senders[links], receivers[links], latency_ms[links]

    @cached_property
    def _links(self) -> tuple[Integers, Integers, Integers, Floats]:
        """All published links, sorted by the end of the sender's span: ends, then senders, receivers, ms as above."""
        told = sorted(
            (record.peer.end, self.index[record.peer.id], self.index[name], link.latency_ms)
            for record in self.records.values()
            for name, link in record.links.items()
            if name in self.index
        )
        ends, senders, receivers = (np.array([link[column] for link in told], dtype=np.int64) for column in range(3))
        return ends, senders, receivers, np.array([link[3] for link in told], dtype=np.float64)

    @cached_property
    def spans(self) -> Spans:
        """All peers, as the placement needs them."""
        return Spans.of(self.peers, self.num_blocks)


class SimulatedDirectory:
    """Records by the id of their peer. A record that is not renewed stays until it expires."""

    def __init__(self, ttl_s: float, num_blocks: int) -> None:
        self._ttl_s = ttl_s
        self._num_blocks = num_blocks
        self._records: dict[str, Record] = {}
        self._arriving: dict[str, tuple[Peer, float]] = {}

    def publish(self, record: Record) -> None:
        self._records[record.peer.id] = record
        self._arriving.pop(record.peer.id, None)

    def announce_move(self, peer: Peer, until_s: float) -> None:
        """Announces that a peer is moving to the blocks of `peer`."""
        self.withdraw(peer.id)
        self._arriving[peer.id] = peer, until_s

    def withdraw(self, peer: str) -> None:
        self._records.pop(peer, None)

    def view(self, now_s: float) -> DirectoryView:
        """All records that have not expired."""
        for name in [name for name, record in self._records.items() if now_s - record.published_s > self._ttl_s]:
            del self._records[name]
        for name in [name for name, (_, until_s) in self._arriving.items() if now_s > until_s]:
            del self._arriving[name]
        arriving = [peer for peer, _ in self._arriving.values()]
        return DirectoryView(list(self._records.values()), self._num_blocks, arriving, now_s)


def points_of(places: Sequence[Coordinate]) -> tuple[Floats, Floats]:
    """Vectors `[places, DIMENSIONS]` and heights of these places."""
    vectors = np.array([place.vector for place in places]).reshape(len(places), DIMENSIONS)
    return vectors, np.array([place.height_ms for place in places])


def one_way_ms(place: Coordinate, vectors: Floats, heights: Floats) -> Floats:
    """Predicted one-way ms from one place to these points."""
    apart = np.sqrt(((vectors - np.array(place.vector)) ** 2).sum(axis=1))
    return (apart + heights + place.height_ms) / 2


MODEL = "5eed" * 8


class Identities:
    """Keys, addresses and records of devices by their ids; constant for each device."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._keys: dict[str, PublicKey] = {}
        self._ids: dict[str, str] = {}
        self._records: dict[tuple[str, float], PeerRecord] = {}

    def endpoint(self, device: str) -> Endpoint:
        return Endpoint(_address(device), self._key(device))

    def device(self, name: str) -> str:
        """The id of the device with this key, which was issued before."""
        return self._ids[name]

    def hop(self, hop: Hop, record: Record) -> PlannedHop:
        """A hop through the peer that published the record."""
        return PlannedHop(self._record(hop.peer, record.settled_at_s), hop.start, hop.end)

    def _key(self, device: str) -> PublicKey:
        key = self._keys.get(device)
        if key is None:
            key = PublicKey(bytes(SigningKey(sha256(device.encode()).digest()).verify_key))
            self._keys[device] = key
            self._ids[key.text] = device
        return key

    def _record(self, device: str, placed_at: float) -> PeerRecord:
        record = self._records.get((device, placed_at))
        if record is None:
            record = self._records[device, placed_at] = PeerRecord.idle(
                key=self._key(device),
                model=MODEL,
                model_name="simulated",
                address=_address(device),
                num_blocks=self._num_blocks,
                codecs=("none",),
                block_ms=(1.0,) * len(PASS_SIZES),
                placed_at=placed_at,
                serves=True,
                coordinate_error=1.0,
            )
        return record


def device_at(endpoint: Endpoint) -> str:
    """The id of the device at this endpoint."""
    return IPv6Address(endpoint.address.removeprefix("tcp://[").removesuffix("]:1")).packed.lstrip(b"\0").decode()


def _address(device: str) -> str:
    """Endpoints name IP addresses only, so the id of at most 16 bytes becomes one."""
    packed = device.encode().rjust(16, b"\0")
    return f"tcp://[{IPv6Address(packed)}]:1"
