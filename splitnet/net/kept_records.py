"""Records that a process keeps for others without a DHT, with the bounds of a node of the DHT."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

from splitnet.net.dht_places import Places
from splitnet.net.records import PeerRecord


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
