"""Peers that a client plans without for a while, since they died or went away."""

from __future__ import annotations

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
    """Bans by key text.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bans: dict[str, _Ban] = {}

    def add(self, key: str, seconds: float, left: PeerRecord | None = None) -> None:
        """Bans a peer; left: its record, if it said that it goes away."""
        self._bans[key] = _Ban(self._clock() + seconds, left.placed_at if left else None)

    def lift(self, key: str) -> None:
        self._bans.pop(key, None)

    def keys(self) -> set[str]:
        """Who is banned now."""
        now = self._clock()
        self._bans = {key: ban for key, ban in self._bans.items() if ban.until > now}
        return set(self._bans)

    def may_be_unbanned(self, records: Iterable[PeerRecord]) -> list[PeerRecord]:
        """Banned peers that may serve again, if they answer: those that did not go away, or have come back since."""
        banned = self.keys()
        return [
            record
            for record in records
            if record.serves and record.key.text in banned
            if self._bans[record.key.text].left_at != record.placed_at
        ]
