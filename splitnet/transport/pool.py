"""Which links to peers stay open: those in use, and others for a while.

Others decide what a process connects to: clients name next hops, and records may be hostile. Every link takes four file
descriptors, one to a hidden peer up to eight, so their number is bounded, and unused ones are closed.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from scheduler.liveness import SILENT_S
from splitnet.limits import keep_latest
from splitnet.wire.endpoints import Endpoint, LinkState

KEEP_S = 60.0
REMEMBERED_STATES = 4096
BRIEF_S = 5.0
"""A link outlives a question at least so long, if there is room: an answer may take that; heartbeats begin later."""


class Linking(Protocol):
    """A `splitnet.transport.transport.Transport`, or a stand-in."""

    def connect(self, endpoint: Endpoint) -> None: ...

    def disconnect(self, endpoint: Endpoint) -> None: ...

    def state(self, endpoint: Endpoint) -> LinkState: ...


@dataclass(eq=False)
class LinkPool:
    """Counts the users of each link. Thread-safe.

    Args:
        most: links at the same time; one to a hidden peer counts as two. Of those without users, one that failed is
            closed first for a new one, then the one that was used longest ago.
        keep_s: how long a link outlives its last use.
        keep_unreached_s: the same for a link that is not up; 0: it is closed with its last user.
        keep_unused_s: the same for a link that is up and has had no users, but for links to hidden peers, which others
            have to help to open.
    """

    linking: Linking
    _: KW_ONLY
    most: int
    keep_s: float = KEEP_S
    keep_unreached_s: float = 0.0
    keep_unused_s: float = KEEP_S

    def __post_init__(self) -> None:
        self._users: Counter[Endpoint] = Counter()
        self._unused: dict[Endpoint, float] = {}
        """Since when (infinite until the next tick); the one that was used longest ago first."""
        self._had_users: set[Endpoint] = set()  # of the open links
        self._failed: dict[Endpoint, tuple[LinkState, float]] = {}
        """Closed links that had failed: their states, and since when (infinite until the next tick)."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users) + len(self._unused)

    @property
    def in_use(self) -> list[Endpoint]:
        """Links with users."""
        with self._lock:
            return list(self._users)

    def acquire(self, endpoint: Endpoint) -> bool:
        """Opens the link for one more user; False if too many others are in use."""
        with self._lock:
            if endpoint not in self._users:
                if not self._make_room(endpoint):
                    return False
                if self._unused.pop(endpoint, None) is None:
                    self.linking.connect(endpoint)
            self._users[endpoint] += 1
            self._had_users.add(endpoint)
            return True

    def release(self, endpoint: Endpoint) -> None:
        """Undoes one `acquire`."""
        with self._lock:
            self._users[endpoint] -= 1
            if not self._users[endpoint]:
                del self._users[endpoint]
                self._unused[endpoint] = math.inf
                if not self.keep_unreached_s and self.linking.state(endpoint) is not LinkState.UP:
                    self._close(endpoint)

    def touch(self, endpoint: Endpoint) -> bool:
        """Counts a message over a link, which opens that; False if it must not, as too many others are in use."""
        with self._lock:
            if endpoint not in self._users:
                if not self._make_room(endpoint):
                    return False
                self._unused.pop(endpoint, None)
                self._unused[endpoint] = math.inf
            return True

    def came_up(self, endpoint: Endpoint) -> None:
        """Counts the time without use anew: messages that waited for a handshake of seconds are sent only now."""
        with self._lock:
            if endpoint in self._unused:
                self._unused[endpoint] = math.inf

    def state(self, endpoint: Endpoint) -> LinkState:
        """State of a link; of one that was closed after it had failed, for `SILENT_S` the state then."""
        state = self.linking.state(endpoint)
        if state is LinkState.CONNECTING:
            state, _ = self._failed.get(endpoint, (state, 0.0))
        return state

    def tick(self, now: float) -> None:
        """Closes links that were not used for long; now: seconds."""
        with self._lock:
            for endpoint, since in list(self._unused.items()):
                if now - since > self._kept_s(endpoint):
                    self._close(endpoint)
                else:
                    self._unused[endpoint] = min(since, now)
            for endpoint, (state, since) in list(self._failed.items()):
                if now - since > SILENT_S or self.linking.state(endpoint) is LinkState.UP:
                    del self._failed[endpoint]
                else:
                    self._failed[endpoint] = (state, min(since, now))

    def _kept_s(self, endpoint: Endpoint) -> float:
        if self.linking.state(endpoint) is not LinkState.UP:
            return min(self.keep_s, self.keep_unreached_s)
        lasts = endpoint in self._had_users or endpoint.hidden
        return self.keep_s if lasts else min(self.keep_s, self.keep_unused_s)

    def _make_room(self, endpoint: Endpoint) -> bool:
        if endpoint in self._unused:
            return True
        most = self.most - _size(endpoint)
        if sum(map(_size, self._users)) > most:
            return False
        while self._unused and sum(map(_size, (*self._users, *self._unused))) > most:
            self._close(min(self._unused, key=lambda unused: not _has_failed(self.linking.state(unused))))
        return True

    def _close(self, endpoint: Endpoint) -> None:
        del self._unused[endpoint]
        self._had_users.discard(endpoint)
        state = self.linking.state(endpoint)
        self._failed.pop(endpoint, None)
        if _has_failed(state):
            keep_latest(self._failed, endpoint, (state, math.inf), REMEMBERED_STATES)
        self.linking.disconnect(endpoint)


def _size(endpoint: Endpoint) -> int:
    return 2 if endpoint.hidden else 1  # the sockets of both ends of a tunnel, too


def _has_failed(state: LinkState) -> bool:
    return state is LinkState.DOWN or state.is_final
