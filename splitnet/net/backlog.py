"""How many bytes wait to be sent, and to whom: a receiver that does not read must not fill this process's memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from typing import Protocol

TRACKED_BYTES = 64 * 1024
"""Messages up to this size are not counted here; ZeroMQ bounds their number per connection."""

MAX_BACKLOG_BYTES = 1 << 30


class Tracker(Protocol):
    """What ZeroMQ gives for a message: whether it is done with it."""

    @property
    def done(self) -> bool: ...


class Backlog:
    """Large messages that ZeroMQ still holds.

    A receiver may take as much as is left for all others (dynamic thresholds, Choudhury and Hahne 1998): one that
    reads slowly gets half of the memory at most, and there is always some for the next.

    Args:
        limit: bytes over all receivers.
    """

    def __init__(self, limit: int = MAX_BACKLOG_BYTES) -> None:
        self._limit = limit
        self._waiting: deque[tuple[Hashable, int, Tracker]] = deque()
        self._held: Counter[Hashable] = Counter()
        self.nbytes = 0

    def has_room(self, receiver: Hashable, size: int) -> bool:
        """Whether a message of `size` bytes may be queued for `receiver`; the first one always may."""
        if self._fits(receiver, size):
            return True
        self._forget_sent()
        return self._fits(receiver, size)

    def add(self, receiver: Hashable, size: int, tracker: Tracker) -> None:
        """Counts a message until `tracker` says that it is sent or dropped."""
        self._waiting.append((receiver, size, tracker))
        self._held[receiver] += size
        self.nbytes += size
        # Most are sent by the time the next is: what is known here stays short without looking at all of it.
        while self._waiting and self._waiting[0][2].done:
            self._subtract(*self._waiting.popleft()[:2])

    def _fits(self, receiver: Hashable, size: int) -> bool:
        held = self._held.get(receiver, 0)
        return not held or held + size <= self._limit - self.nbytes

    def _forget_sent(self) -> None:
        for _ in range(len(self._waiting)):
            receiver, size, tracker = self._waiting.popleft()
            if tracker.done:
                self._subtract(receiver, size)
            else:
                self._waiting.append((receiver, size, tracker))

    def _subtract(self, receiver: Hashable, size: int) -> None:
        self.nbytes -= size
        self._held[receiver] -= size
        if not self._held[receiver]:
            del self._held[receiver]
