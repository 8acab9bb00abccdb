"""The interface of a directory of peers, which may be a DHT or peers that are asked, and the storage of records."""

from __future__ import annotations

import heapq
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Final, Self, TypeVar

from splitnet.directory.record import PeerRecord
from splitnet.errors import DirectoryError
from splitnet.limits import Places
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.messages import MAX_DEPTH

T = TypeVar("T")

OWN_DEPTH: Final = MAX_DEPTH + 1  # depth of a question of this process itself; peers that it asks get `MAX_DEPTH`


class SwarmDirectory(ABC):
    """The records of peers. All methods may be called from any thread, and block for at most 10 s. addresses:
    multiaddrs with which others can join; empty if this is not a listening node of a DHT."""

    addresses: list[str]

    @abstractmethod
    def store_record(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        """Publishes a valid record until it expires. False: it is refused, because there is a later record of its key
        or no room, or because a clock is wrong.

        packed: the signed record. depth: over how many peers the record may be passed on; 0: it is only kept by this
        process. Raises DirectoryError: the directory does not answer.
        """

    @abstractmethod
    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        """The latest verified record of each peer of a model, also of peers that have left.

        model: fingerprint; empty: returns one record of each model. depth: over how many peers the question may be
        passed on; 0: returns only records that this process keeps. Raises DirectoryError: the directory does not
        answer, or no peer is found and the initial nodes are silent.
        """

    @abstractmethod
    def close(self) -> None:
        """Leaves the directory. May be called more than once."""

    def pause(self) -> None:  # noqa: B027 (most directories have nothing to end)
        """Stops network traffic until the next request."""

    def address_changed(self) -> None:  # noqa: B027 (most directories notice by themselves)
        """Replaces connections from the machine's former address, after the address has changed. May take seconds."""

    def announce(self, record: PeerRecord, identity: Identity) -> bool:
        """Signs `record`, and publishes it until it expires. Must be called again before the expiry. See
        `store_record`."""
        return self.store_record(record, record.pack(identity))

    def withdraw(self, record: PeerRecord, identity: Identity) -> bool:
        """Replaces the announced `record` by a record that says that the peer has left."""
        return self.announce(record.farewell(), identity)

    def peers(self, model: str) -> list[PeerRecord]:
        """The verified record of each peer that serves the model with this fingerprint. See `records`."""
        return [record for record in self.records(model) if not record.has_left]

    def models(self) -> dict[str, str]:
        """Names of the models in the swarm, by fingerprint. A name is a claim of one peer. See `records`."""
        return {record.model: record.model_name for record in self.records("") if record.is_of_model}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JoinedDirectories(SwarmDirectory):
    """Several directories of one swarm, used as one directory. Their answers are merged, and errors count only if
    no directory answers."""

    def __init__(self, directories: Sequence[SwarmDirectory]) -> None:
        self.directories = directories
        self.addresses = [address for directory in directories for address in directory.addresses]

    def store_record(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        return any(self._answers(lambda directory: directory.store_record(record, packed, depth)))

    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        return latest(model, self._answers(lambda directory: directory.records(model, depth)))

    def _answers(self, ask: Callable[[SwarmDirectory], T]) -> list[T]:
        answers = list[T]()
        error: DirectoryError | None = None
        for directory in self.directories:
            try:
                answers.append(ask(directory))
            except DirectoryError as silent:
                error = silent
        if error is not None and not answers:
            raise error
        return answers

    def pause(self) -> None:
        for directory in self.directories:
            directory.pause()

    def address_changed(self) -> None:
        for directory in self.directories:
            directory.address_changed()
        self.addresses = [address for directory in self.directories for address in directory.addresses]

    def close(self) -> None:
        for directory in self.directories:
            with suppress(DirectoryError):
                directory.close()


def latest(model: str, found: Iterable[Sequence[PeerRecord]]) -> list[PeerRecord]:
    """Merges records from several sources: the latest record of each peer of a model, or of each model if `model` is
    empty. Records of the sources alternate, so that a flood in one source cannot push records of others to the end."""
    now = time.time()
    kept: dict[PublicKey | str, PeerRecord] = {}
    for row in zip_longest(*found):
        for record in filter(None, row):
            if not record.is_valid_at(now) or (record.model != model if model else record.has_left):
                continue
            name = record.key if model else record.model
            if name not in kept or record.issued_at > kept[name].issued_at:
                kept[name] = record
    return list(kept.values())


# The records of a node are bounded, because keys and records are cheap to make.
RECORDS_PER_KEY: Final = 256
"""Records under one key of the DHT. A record has at most 3 KiB, so a message has room for several times as many."""
RECORDS_PER_IDENTITY: Final = 16  # records of one peer's key; a peer of one model needs two
MAX_RECORDS: Final = 16384  # records of a node: 48 MiB

Place = tuple[bytes, str]  # a key of the DHT, and a subkey


class RecordTable:
    """The records of one node. When the table is full, a new record with a proof of work replaces a record without
    a proof; other new records are refused. Not thread-safe."""

    def __init__(self) -> None:
        self.held: defaultdict[bytes, dict[str, PeerRecord]] = defaultdict(dict)
        """By key of the DHT and subkey; records may have expired."""
        self.places = Places(MAX_RECORDS, key=RECORDS_PER_KEY, identity=RECORDS_PER_IDENTITY)
        self._unproven: dict[Place, None] = {}  # places of records without a proof of work, in order of arrival
        self._expiring: list[tuple[float, Place]] = []

    def add_record(self, place: Place, record: PeerRecord, now: float) -> list[Place] | None:
        """Adds a verified record at `now`, Unix time in seconds. Returns the places of records that it replaces; None:
        the record is refused."""
        while self._expiring and self._expiring[0][0] < now:
            expired_at, gone = heapq.heappop(self._expiring)
            there = self.held.get(gone[0], {}).get(gone[1])
            if there is not None and there.expires_at == expired_at:
                self._free(gone)
        key, subkey = place
        held = self.held.get(key, {}).get(subkey)
        if held is not None and held.expires_at >= record.expires_at:
            return None
        own = held is not None and held.key == record.key
        if not own and (
            self.places.has_most("identity", record.key)
            or (held is not None and held.is_proven and not record.is_proven)
        ):
            return None
        freed: list[Place] = []
        if held is None and (self.places.is_full or self.places.has_most("key", key)):
            victim = self._first_unproven(key) if record.is_proven else None
            if victim is None:
                return None
            freed.append(victim)
        for taken in (*freed, *([place] if held is not None else ())):
            self._free(taken)
        self.places.take_place(key=key, identity=record.key)
        self.held[key][subkey] = record
        if not record.is_proven:
            self._unproven[place] = None
        heapq.heappush(self._expiring, (record.expires_at, place))
        if len(self._expiring) > 2 * self.places.taken + RECORDS_PER_KEY:  # renewed records leave outdated entries
            self._expiring = [
                (one.expires_at, (key, name)) for key in self.held for name, one in self.held[key].items()
            ]
            heapq.heapify(self._expiring)
        return freed

    def _first_unproven(self, key: bytes) -> Place | None:
        if not self.places.has_most("key", key):  # the whole table is full
            return next(iter(self._unproven), None)
        return next(((key, subkey) for subkey in self.held[key] if (key, subkey) in self._unproven), None)

    def _free(self, place: Place) -> None:
        key, subkey = place
        record = self.held[key].pop(subkey)
        if not self.held[key]:
            del self.held[key]
        self.places.leave_place(key=key, identity=record.key)
        self._unproven.pop(place, None)


class KeptRecords:
    """Records of peers by model. Thread-safe."""

    def __init__(self) -> None:
        self._table = RecordTable()
        self._lock = threading.Lock()

    def add_record(self, record: PeerRecord) -> bool:
        """Keeps a valid record until it expires. False: there is a later record of its key, or no room."""
        now = time.time()
        with self._lock:
            place = record.model.encode(), record.key.text
            return record.is_valid_at(now) and self._table.add_record(place, record, now) is not None

    def records(self, model: str) -> list[PeerRecord]:
        """The records of a model; if `model` is empty, the latest record of each model that has a peer."""
        now = time.time()
        with self._lock:
            if model:
                kept = self._table.held.get(model.encode(), {})
                return [record for record in kept.values() if record.expires_at > now]
            present = [
                [each for each in kept.values() if each.expires_at > now and not each.has_left]
                for kept in self._table.held.values()
            ]
            return [max(each, key=lambda record: record.issued_at) for each in present if each]
