"""Which sessions a peer admits: by the KV memory that they reserve."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from peers.session import Session
from splitnet.errors import PeerBusy

MAX_SESSIONS = 1024
MIN_BUDGET = 64
"""Positions that a session reserves at least, so that many tiny ones are not free."""


class SessionTable:
    """Admission by KV memory: what is reserved never exceeds `capacity` positions.

    Args:
        capacity: positions of KV cache that this peer can hold.
        idle_s: a session that nothing was heard of for so long is dropped.
    """

    def __init__(self, capacity: int, *, idle_s: float = 600.0) -> None:
        self.capacity = capacity
        self.idle_s = idle_s
        self._sessions: dict[bytes, Session] = {}
        self._reserved = 0
        self._ended = threading.Condition()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def free_positions(self) -> int:
        return self.capacity - self._reserved

    def get(self, session_id: bytes) -> Session | None:
        return self._sessions.get(session_id)

    def add(self, session: Session) -> None:
        """Admits a session; its budget becomes what it has reserved.

        Raises:
            PeerBusy: its budget does not fit.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            raise PeerBusy(f"this peer holds {MAX_SESSIONS} sessions already")
        session.budget = max(session.budget, min(MIN_BUDGET, self.capacity))
        self._reserve(session.budget)
        self._sessions[session.id] = session

    def resize(self, session: Session, budget: int) -> None:
        """Changes what a session has reserved; it never shrinks.

        Raises:
            PeerBusy: the larger budget does not fit.
        """
        if budget > session.budget:
            self._reserve(budget - session.budget)
            session.budget = budget

    def remove(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is not None:
            self._reserved -= session.budget
            session.closed = True
            with self._ended:
                self._ended.notify_all()

    def wait_for_end(self, timeout_s: float) -> bool:
        """Waits until a session ends, for `timeout_s` seconds at most."""
        with self._ended:
            return self._ended.wait(timeout_s)

    def expire(self, now: float) -> list[Session]:
        """Removes and returns the sessions that were idle for too long."""
        idle = [session for session in self._sessions.values() if now - session.used_at > self.idle_s]
        for session in idle:
            self.remove(session)
        return idle

    def _reserve(self, positions: int) -> None:
        if positions > self.free_positions:
            raise PeerBusy(f"no KV memory for {positions} positions: {self.free_positions} of {self.capacity} are free")
        self._reserved += positions
