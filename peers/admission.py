"""Which sessions a peer admits: by the KV memory that they reserve, in bytes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

from peers.memory_account import MemoryAccount, Purpose
from peers.session import Session
from splitnet.errors import PeerBusy

MAX_SESSIONS = 1024
MIN_BUDGET = 64
"""Positions that a session reserves at least, so that many tiny ones are not free."""


class SessionTable:
    """Admission by KV memory: what is reserved never exceeds `capacity`.

    Args:
        capacity: bytes for keys and values, states, and logs of what was sent on.
        idle_s: a session that nothing was heard of for so long is dropped.
        position_bytes: of keys and values.
        row_bytes: what a row takes besides its positions.
        usual_log_bytes: what the log of a position takes with the codec that most sessions have.
        ahead: share of its budget that a session's rows and logs may take beyond it, as they are allocated ahead.
        num_blocks: of the model; sessions that end there keep no log.
    """

    def __init__(
        self,
        capacity: int,
        *,
        idle_s: float = 600.0,
        position_bytes: float = 1.0,
        row_bytes: int = 0,
        usual_log_bytes: int = 0,
        ahead: float = 0.0,
        num_blocks: int = 0,
    ) -> None:
        self.memory = MemoryAccount(capacity, "no KV memory for", "try again later, or with fewer positions")
        self.idle_s = idle_s
        self._position_bytes = position_bytes * (1 + ahead)
        self._row_bytes = row_bytes
        self._usual_bytes = (position_bytes + usual_log_bytes) * (1 + ahead)
        self._ahead = ahead
        self._num_blocks = num_blocks
        self._sessions: dict[bytes, Session] = {}
        self._ended = threading.Condition()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def capacity(self) -> int:
        """What one session of one row could reserve if there were no others, with the usual codec."""
        return max(0, int((self.memory.capacity - self._row_bytes) / self._usual_bytes))

    @property
    def free_positions(self) -> int:
        """What a new session may reserve, with the usual codec."""
        return max(0, int((self.memory.free - self._row_bytes) / self._usual_bytes))

    def get(self, session_id: bytes) -> Session | None:
        return self._sessions.get(session_id)

    def add(self, session: Session) -> None:
        """Admits a session; its budget becomes what it has reserved.

        Raises:
            PeerBusy: its budget does not fit.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            raise PeerBusy(f"this peer holds {MAX_SESSIONS} sessions already")
        least = int((self.memory.capacity - self._row_bytes) / self._cost_of(session))
        session.budget = max(session.budget, min(MIN_BUDGET, max(1, least)))
        try:
            self._reserve(session, session.budget)
            self.memory.take(session, Purpose.ROWS, self._row_bytes)
        except PeerBusy:
            self.memory.end(session)
            raise
        session.reserved_rows = 1
        self._sessions[session.id] = session

    def hold_rows(self, session: Session, rows: int) -> None:
        """Reserves what so many rows take besides their positions, or gives back what fewer do not.

        Raises:
            PeerBusy: it does not fit. Nothing is changed then.
        """
        more = max(1, rows) - session.reserved_rows
        if not more or session.closed:
            return
        if more > 0:
            self.memory.take(session, Purpose.ROWS, more * self._row_bytes)
        else:
            self.memory.give_back(session, Purpose.ROWS, -more * self._row_bytes)
        session.reserved_rows += more

    def resize(self, session: Session, budget: int) -> None:
        """Changes what a session has reserved; it never shrinks.

        Raises:
            PeerBusy: the larger budget does not fit.
        """
        if budget > session.budget:
            self._reserve(session, budget - session.budget)
            session.budget = budget

    def remove(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is not None:
            self.memory.end(session)
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

    def _reserve(self, session: Session, positions: int) -> None:
        self.memory.take(session, Purpose.POSITIONS, math.ceil(positions * self._cost_of(session)))

    def _cost_of(self, session: Session) -> float:
        """Bytes of a position of its budget."""
        log = session.log.bytes_per_position if session.end < self._num_blocks else 0
        return self._position_bytes + log * (1 + self._ahead)
