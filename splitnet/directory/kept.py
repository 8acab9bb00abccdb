"""The records that a node of the DHT holds. Anybody can make keys and records, so all of them are bounded."""

from __future__ import annotations

import heapq
import threading
import time
from collections import defaultdict
from typing import Final

from splitnet.directory.record import PeerRecord
from splitnet.limits import Places

RECORDS_PER_KEY: Final = 256
"""Under one key of the DHT; a record has at most 3 KiB, so a message has room for all of them several times."""
RECORDS_PER_IDENTITY: Final = 16
"""A peer of one model needs three."""
MAX_RECORDS: Final = 16384
"""Of a node in all: 48 MiB."""

Place = tuple[bytes, str]
"""A key of the DHT and a subkey."""


class RecordTable:
    """The records of one node. The first to come keeps its place, but records without a proof of work give way.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._held: defaultdict[bytes, dict[str, PeerRecord]] = defaultdict(dict)
        self._places = Places(MAX_RECORDS, key=RECORDS_PER_KEY, identity=RECORDS_PER_IDENTITY)
        self._unproven: dict[Place, None] = {}
        """In the order in which they came."""
        self._expiring: list[tuple[float, Place]] = []

    def __len__(self) -> int:
        return self._places.taken

    def held_keys(self) -> list[bytes]:
        """Keys of the DHT that have records, which may have expired."""
        return list(self._held)

    def under(self, key: bytes) -> list[PeerRecord]:
        """The records under a key of the DHT; some may have expired."""
        return list(self._held.get(key, {}).values())

    def take(self, place: Place, record: PeerRecord, now: float) -> list[Place] | None:
        """Takes a verified record in.

        Args:
            now: Unix time in seconds.

        Returns:
            The places of those that give way to it; None: there is no place for it.
        """
        while self._expiring and self._expiring[0][0] < now:
            expired_at, gone = heapq.heappop(self._expiring)
            there = self._held.get(gone[0], {}).get(gone[1])
            if there is not None and there.expires_at == expired_at:
                self._free(gone)
        key, subkey = place
        held = self._held.get(key, {}).get(subkey)
        if held is not None and held.expires_at >= record.expires_at:
            return None
        own = held is not None and held.key == record.key
        if not own and (
            self._places.has_most("identity", record.key)
            or (held is not None and held.is_proven and not record.is_proven)
        ):
            return None
        freed: list[Place] = []
        if held is None and (self._places.is_full or self._places.has_most("key", key)):
            victim = self._first_unproven(key) if record.is_proven else None
            if victim is None:
                return None
            freed.append(victim)
        for taken in (*freed, *([place] if held is not None else ())):
            self._free(taken)
        self._places.take(key=key, identity=record.key)
        self._held[key][subkey] = record
        if not record.is_proven:
            self._unproven[place] = None
        heapq.heappush(self._expiring, (record.expires_at, place))
        if len(self._expiring) > 2 * len(self) + RECORDS_PER_KEY:  # records that were renewed often
            self._expiring = [
                (one.expires_at, (key, name)) for key in self._held for name, one in self._held[key].items()
            ]
            heapq.heapify(self._expiring)
        return freed

    def _first_unproven(self, key: bytes) -> Place | None:
        if not self._places.has_most("key", key):  # only the node as a whole is full
            return next(iter(self._unproven), None)
        return next(((key, subkey) for subkey in self._held[key] if (key, subkey) in self._unproven), None)

    def _free(self, place: Place) -> None:
        key, subkey = place
        record = self._held[key].pop(subkey)
        if not self._held[key]:
            del self._held[key]
        self._places.leave(key=key, identity=record.key)
        self._unproven.pop(place, None)


class KeptRecords:
    """Records of peers by model. Thread-safe."""

    def __init__(self) -> None:
        self._table = RecordTable()
        self._lock = threading.Lock()

    def take(self, record: PeerRecord) -> bool:
        """Keeps a valid record until it expires; False: there is a later one of its key, or no place for it."""
        now = time.time()
        with self._lock:
            place = record.model.encode(), record.key.text
            return record.is_valid_at(now) and self._table.take(place, record, now) is not None

    def records(self, model: str) -> list[PeerRecord]:
        """Those of a model, or one of each model that has a peer if `model` is empty."""
        now = time.time()
        with self._lock:
            if model:
                return [record for record in self._table.under(model.encode()) if record.expires_at > now]
            latest: list[PeerRecord] = []
            for key in self._table.held_keys():
                present = [each for each in self._table.under(key) if each.expires_at > now and not each.has_left]
                latest += [max(present, key=lambda record: record.issued_at)] if present else []
            return latest
