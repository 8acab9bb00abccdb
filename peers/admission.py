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
        row_positions: what a row takes besides its positions, in positions: for states.
    """

    def __init__(self, capacity: int, *, idle_s: float = 600.0, row_positions: int = 0) -> None:
        self.capacity = capacity
        self.idle_s = idle_s
        self.row_positions = row_positions
        self._sessions: dict[bytes, Session] = {}
        self._reserved = 0
        self._ended = threading.Condition()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def free_positions(self) -> int:
        """What a new session may reserve."""
        return max(0, self.capacity - self._reserved - self.row_positions)

    def get(self, session_id: bytes) -> Session | None:
        return self._sessions.get(session_id)

    def add(self, session: Session) -> None:
        """Admits a session; its budget becomes what it has reserved.

        Raises:
            PeerBusy: its budget does not fit.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            raise PeerBusy(f"this peer holds {MAX_SESSIONS} sessions already")
        session.budget = max(session.budget, min(MIN_BUDGET, max(1, self.capacity - self.row_positions)))
        self._reserve(session.budget + self.row_positions)
        session.reserved_rows = 1
        self._sessions[session.id] = session

    def hold_rows(self, session: Session, rows: int) -> None:
        """Reserves what so many rows take besides their positions, or gives back what fewer do not.

        Raises:
            PeerBusy: it does not fit. Nothing is changed then.
        """
        rows = max(1, rows)
        if self.row_positions and rows != session.reserved_rows and not session.closed:
            self._reserve((rows - session.reserved_rows) * self.row_positions)
            session.reserved_rows = rows

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
            self._reserved -= session.budget + session.reserved_rows * self.row_positions
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
        free = self.capacity - self._reserved
        if positions > free:
            raise PeerBusy(f"no KV memory for {positions} positions: {free} of {self.capacity} are free")
        self._reserved += positions
