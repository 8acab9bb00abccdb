"""Peers that a client plans without for a while, since they died or went away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from splitnet.net.records import PeerRecord

BAN_S = 30.0
"""How long a peer that died is not planned with."""


@dataclass(frozen=True, slots=True)
class _Ban:
    """left_at: the `placed_at` of the span that the peer was leaving, if it said so."""

    until: float
    left_at: float | None


class Bans:
    """Bans by key text. Thread-safe.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bans: dict[str, _Ban] = {}

    def add(self, key: str, seconds: float, left: PeerRecord | None = None) -> None:
        """Bans a peer; left: its record, if it said that it goes away."""
        ban = _Ban(self._clock() + seconds, left.placed_at if left else None)
        with self._lock:
            self._bans[key] = ban

    def lift(self, key: str) -> None:
        with self._lock:
            self._bans.pop(key, None)

    def keys(self) -> set[str]:
        """Who is banned now."""
        return set(self._present())

    def may_be_unbanned(self, records: Iterable[PeerRecord]) -> list[PeerRecord]:
        """Banned peers that may serve again, if they answer: those that did not go away, or have come back since."""
        banned = self._present()
        return [
            record
            for record in records
            if record.serves and record.key.text in banned
            if banned[record.key.text].left_at != record.placed_at
        ]

    def _present(self) -> dict[str, _Ban]:
        now = self._clock()
        with self._lock:
            self._bans = {key: ban for key, ban in self._bans.items() if ban.until > now}
            return dict(self._bans)
