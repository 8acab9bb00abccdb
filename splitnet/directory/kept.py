"""Which records a node of the DHT has room for. Anybody can make keys and records, so all that it holds is bounded."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, defaultdict
from typing import Final

from splitnet.directory.record import PeerRecord
from splitnet.security.identity import PublicKey

RECORDS_PER_KEY: Final = 256
"""Under one key of the DHT: with at most 3 KiB each they fit in a message several times."""
RECORDS_PER_IDENTITY: Final = 16
"""A peer of one model needs three."""
MAX_RECORDS: Final = 16384
"""Of a node in all: 48 MiB."""

Place = tuple[bytes, str]
"""A key of the DHT and a subkey."""


class Places:
    """The places of one node. Who came first keeps its place, but for records without a proof of work: these give way.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._held: defaultdict[bytes, dict[str, PeerRecord]] = defaultdict(dict)
        self._of: Counter[PublicKey] = Counter()
        self._unproven: dict[Place, None] = {}
        """In the order in which they came."""
        self._expiring: list[tuple[float, Place]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

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
            self._of[record.key] >= RECORDS_PER_IDENTITY
            or (held is not None and held.is_proven and not record.is_proven)
        ):
            return None
        freed: list[Place] = []
        if held is None and (len(self._held.get(key, ())) >= RECORDS_PER_KEY or self._count >= MAX_RECORDS):
            victim = self._first_unproven(key) if record.is_proven else None
            if victim is None:
                return None
            freed.append(victim)
        for taken in (*freed, *([place] if held is not None else ())):
            self._free(taken)
        self._held[key][subkey] = record
        self._of[record.key] += 1
        self._count += 1
        if not record.is_proven:
            self._unproven[place] = None
        heapq.heappush(self._expiring, (record.expires_at, place))
        if len(self._expiring) > 2 * self._count + RECORDS_PER_KEY:  # records that were renewed often
            self._expiring = [
                (one.expires_at, (key, name)) for key in self._held for name, one in self._held[key].items()
            ]
            heapq.heapify(self._expiring)
        return freed

    def _first_unproven(self, key: bytes) -> Place | None:
        if len(self._held.get(key, ())) < RECORDS_PER_KEY:  # only the node as a whole is full
            return next(iter(self._unproven), None)
        return next(((key, subkey) for subkey in self._held[key] if (key, subkey) in self._unproven), None)

    def _free(self, place: Place) -> None:
        key, subkey = place
        record = self._held[key].pop(subkey)
        if not self._held[key]:
            del self._held[key]
        self._of[record.key] -= 1
        if not self._of[record.key]:
            del self._of[record.key]
        self._unproven.pop(place, None)
        self._count -= 1


class KeptRecords:
    """Thread-safe."""

    def __init__(self) -> None:
        self._places = Places()
        self._held: defaultdict[str, dict[str, PeerRecord]] = defaultdict(dict)
        """By model and key."""
        self._lock = threading.Lock()

    def take(self, record: PeerRecord) -> bool:
        """Keeps a valid record until it expires; False: there is a later one of its key, or no place for it."""
        now = time.time()
        with self._lock:
            if not record.is_valid_at(now):
                return False
            gone = self._places.take((record.model.encode(), record.key.text), record, now)
            if gone is None:
                return False
            for model, key in gone:
                self._held[model.decode()].pop(key, None)  # it may have expired
            self._held[record.model][record.key.text] = record
            return True

    def records(self, model: str) -> list[PeerRecord]:
        """Those of a model, or one of each model that has a peer if `model` is empty."""
        now = time.time()
        with self._lock:
            for name, held in list(self._held.items()):
                for key in [key for key, record in held.items() if record.expires_at <= now]:
                    del held[key]
                if not held:
                    del self._held[name]
            if model:
                return list(self._held[model].values()) if model in self._held else []
            present = ([record for record in held.values() if not record.has_left] for held in self._held.values())
            return [max(records, key=lambda record: record.issued_at) for records in present if records]
