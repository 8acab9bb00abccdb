"""How many bytes wait to be sent, and to whom: a receiver that does not read must not fill this process's memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Protocol

from splitnet.net.budget import Budget
from splitnet.net.endpoints import Connection, Destination, Endpoint

LARGE_BYTES = 64 * 1024
TRACKED_BYTES = 256 * 1024
"""ZeroMQ is asked when it is done with a message only after so many bytes for a receiver, as asking takes time."""

MAX_BACKLOG_BYTES = 1 << 30


class Tracker(Protocol):
    """What ZeroMQ gives for a message: whether it is done with it."""

    @property
    def done(self) -> bool: ...


class Backlog:
    """Messages that ZeroMQ still holds. It sends those for a receiver in order, so the last of some tells of them all.

    One thread sends; `held` may be called from any.

    Args:
        budget: accounts for them by receiver: a key that has connected, or an endpoint.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._waiting: deque[tuple[Hashable, int, Tracker]] = deque()
        self._lock = threading.Lock()
        self._small: dict[bytes | Endpoint, int] = {}
        """Bytes that were sent to a receiver since something was tracked, at most `TRACKED_BYTES`."""

    def untracked(self, receiver: Destination, size: int) -> bool:
        """Whether a message of `size` bytes goes out as it is; otherwise it must be tracked."""
        name = _name(receiver)
        waiting = self._small.get(name, 0) + size
        if size > LARGE_BYTES or waiting > TRACKED_BYTES:
            return False
        self._small[name] = waiting
        return True

    def reserve(self, receiver: Destination, size: int) -> int:
        """Makes room for a message that is tracked, and what went before it; returns their bytes, 0: there is none."""
        size += self._small.get(_name(receiver), 0)
        account = _account(receiver)
        if not self._budget.has_room(size, account):
            self._forget_sent()
        if not self._budget.reserve(size, account):
            return 0
        self._small.pop(_name(receiver), None)
        return size

    def add(self, receiver: Destination, size: int, tracker: Tracker | None) -> None:
        """Counts what was reserved until `tracker` says that it is sent or dropped; None: it is not sent at all."""
        if tracker is None:
            self._budget.release(size, _account(receiver))
            return
        with self._lock:
            self._waiting.append((_account(receiver), size, tracker))
            # Most are sent by the time the next is: what is known here stays short without looking at all of it.
            while self._waiting and self._waiting[0][2].done:
                account, size, _ = self._waiting.popleft()
                self._budget.release(size, account)

    def held(self, receiver: Destination) -> int:
        """Bytes for a receiver that are tracked and not sent yet."""
        if self._budget.held(_account(receiver)):
            self._forget_sent()
        return self._budget.held(_account(receiver))

    def forget(self, receiver: Destination) -> None:
        """Nothing more is sent to a receiver."""
        self._small.pop(_name(receiver), None)

    def _forget_sent(self) -> None:
        with self._lock:
            for _ in range(len(self._waiting)):
                waiting = self._waiting.popleft()
                if waiting[2].done:
                    self._budget.release(waiting[1], waiting[0])
                else:
                    self._waiting.append(waiting)


def _name(receiver: Destination) -> bytes | Endpoint:
    return receiver.routing_id if isinstance(receiver, Connection) else receiver


def _account(receiver: Destination) -> Hashable:
    return receiver.curve if isinstance(receiver, Connection) else receiver
