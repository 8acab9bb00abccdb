"""Which sessions a peer admits: by the KV memory that they reserve, shared among keys when it is full."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from peers.session import Session
from splitnet.errors import PeerBusy

MAX_SESSIONS = 1024
MIN_BUDGET = 64
"""Positions that a session reserves at least, so that many tiny ones are not free."""

LEASE_S = 10.0
"""While another key wants its memory, a session of a key that has more than its share ends after so long without a
step."""

LONGEST_LEASE_S = 60.0
"""And after so long even if it makes steps."""

WANTED_S = 15.0
"""A key that was refused wants memory for so long, and those that have more than their share get no more of it."""

LOOK_AGAIN_S = 0.25
"""A key that is refused again within so long is refused without a look at the sessions."""


class SessionTable:
    """Admission by KV memory: what is reserved never exceeds `capacity` positions.

    One key may have all of it until another wants some. Each has a share then, by its weight. A key within its share
    gets room: sessions of keys beyond theirs end when they have made no step for `LEASE_S`, or after `LONGEST_LEASE_S`.

    Args:
        capacity: positions of KV cache that this peer can hold.
        idle_s: a session that nothing was heard of for so long is dropped.
        row_positions: what a row takes besides its positions, in positions: for states.
        weight: of a key.
        most: positions that the sessions of a key may reserve; None: any.
    """

    def __init__(
        self,
        capacity: int,
        *,
        idle_s: float = 600.0,
        row_positions: int = 0,
        weight: Callable[[bytes], float] = lambda key: 1.0,
        most: Callable[[bytes], int | None] = lambda key: None,
    ) -> None:
        self.capacity = capacity
        self.idle_s = idle_s
        self.row_positions = row_positions
        self._weight = weight
        self._most = most
        self._sessions: dict[bytes, Session] = {}
        self._reserved = 0
        self._held: dict[bytes, int] = {}
        """Positions by key."""
        self._count: dict[bytes, int] = {}
        """Sessions by key."""
        self._wanted: dict[bytes, float] = {}
        """By key: when it was refused."""
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

    def make_room(self, key: bytes, budget: int, now: float, session: Session | None = None) -> list[Session]:
        """Ends sessions of keys that have more than their share, if that lets `key` reserve what it wants.

        Args:
            budget: that it wants for a session.
            session: that has a smaller one already; None: a new one.

        Returns:
            Those that were ended; none if there is room already, or there would not be.
        """
        wanted = self._budget(budget) + self.row_positions if session is None else budget - session.budget
        short = wanted - (self.capacity - self._reserved)
        crowded = session is None and len(self._sessions) >= MAX_SESSIONS
        if (short <= 0 and not crowded) or now - self._wanted.get(key, -LOOK_AGAIN_S) < LOOK_AGAIN_S:
            return []
        share, places = self._share(key, now)
        if self._held.get(key, 0) + wanted > share or self._count.get(key, 0) >= places:
            return []
        ending: list[Session] = []
        left = dict(self._held)
        for other in sorted(self._sessions.values(), key=lambda other: other.stepped_at):
            if short <= 0 and (not crowded or ending):
                break
            if other.owner != key and self._lease_left_s(other, now) <= 0:
                share, places = self._share(other.owner, now, key)
                if left[other.owner] > share or (crowded and self._count[other.owner] > places):
                    left[other.owner] -= self._size(other)
                    short -= self._size(other)
                    ending.append(other)
        if short > 0 or (crowded and not ending):
            return []
        for other in ending:
            self.remove(other)
        return ending

    def add(self, session: Session) -> None:
        """Admits a session; its budget becomes what it has reserved.

        Raises:
            PeerBusy: its budget does not fit, or is more than its key may have now.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            raise self._refused(session.owner, 0, session.used_at, f"this peer holds {MAX_SESSIONS} sessions already")
        session.budget = self._budget(session.budget)
        self._check_share(session.owner, session.budget + self.row_positions, session.used_at)
        self._reserve(session.owner, session.budget + self.row_positions, session.used_at)
        session.reserved_rows = 1
        session.opened_at = session.stepped_at = session.used_at
        self._sessions[session.id] = session
        self._count[session.owner] = self._count.get(session.owner, 0) + 1
        self._wanted.pop(session.owner, None)

    def hold_rows(self, session: Session, rows: int) -> None:
        """Reserves what so many rows take besides their positions, or gives back what fewer do not.

        Raises:
            PeerBusy: it does not fit. Nothing is changed then.
        """
        rows = max(1, rows)
        if self.row_positions and rows != session.reserved_rows and not session.closed:
            self._reserve(session.owner, (rows - session.reserved_rows) * self.row_positions, session.used_at)
            session.reserved_rows = rows

    def resize(self, session: Session, budget: int) -> None:
        """Changes what a session has reserved; it never shrinks.

        Raises:
            PeerBusy: the larger budget does not fit, or is more than its key may have now.
        """
        if budget > session.budget:
            self._check_share(session.owner, budget - session.budget, session.used_at)
            self._reserve(session.owner, budget - session.budget, session.used_at)
            session.budget = budget

    def remove(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is not None:
            self._reserved -= self._size(session)
            self._held[session.owner] -= self._size(session)
            self._count[session.owner] -= 1
            if not self._count[session.owner]:
                del self._held[session.owner], self._count[session.owner]
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
        self._wanted = {key: at for key, at in self._wanted.items() if now - at <= WANTED_S}
        return idle

    def _budget(self, wanted: int) -> int:
        return max(wanted, min(MIN_BUDGET, max(1, self.capacity - self.row_positions)))

    def _size(self, session: Session) -> int:
        return session.budget + session.reserved_rows * self.row_positions

    def _share(self, key: bytes, now: float, *others: bytes) -> tuple[float, float]:
        """Positions and sessions that a key may have beside those that have some, or want some."""
        keys = {key, *others, *self._held, *(other for other, at in self._wanted.items() if now - at <= WANTED_S)}
        part = self._weight(key) / sum(map(self._weight, keys))
        return part * self.capacity, max(1.0, part * MAX_SESSIONS)

    def _lease_left_s(self, session: Session, now: float) -> float:
        return min(session.stepped_at + LEASE_S, session.opened_at + LONGEST_LEASE_S) - now

    def _check_share(self, key: bytes, positions: int, now: float) -> None:
        held = self._held.get(key, 0)
        most = self._most(key)
        if most is not None and held + positions > most:
            raise PeerBusy(
                f"your key may reserve {most} positions of KV memory at this peer, and has {held}: close sessions, or "
                "ask the owner for a larger kv="
            )
        others = [at + WANTED_S - now for other, at in self._wanted.items() if other != key and now - at <= WANTED_S]
        if others and held + positions > self._share(key, now)[0]:
            raise PeerBusy(
                f"others wait for KV memory of this peer, and your key has {held} positions already: close sessions, "
                f"or come back in {max(others):.0f} s"
            )

    def _reserve(self, key: bytes, positions: int, now: float) -> None:
        free = self.capacity - self._reserved
        if positions > free:
            text = f"no KV memory for {positions} positions: {free} of {self.capacity} are free"
            raise self._refused(key, positions, now, text)
        self._reserved += positions
        self._held[key] = self._held.get(key, 0) + positions

    def _refused(self, key: bytes, positions: int, now: float, text: str) -> PeerBusy:
        share, places = self._share(key, now)
        within = self._held.get(key, 0) + positions <= share and self._count.get(key, 0) < places
        if within and now - self._wanted.get(key, -LOOK_AGAIN_S) >= LOOK_AGAIN_S and len(self._wanted) < MAX_SESSIONS:
            self._wanted[key] = now
        when = f"come back in {LEASE_S:.0f} s, when sessions without steps make room" if within else "close sessions"
        return PeerBusy(f"{text}; {when}, or use other peers")
