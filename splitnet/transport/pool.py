"""The pool of open links to peers: links in use, and unused links for a limited time.

Other machines decide to which addresses a process connects: clients name next hops, and records may be hostile. A link
takes four file descriptors, a link to an unreachable peer up to eight. So the number of links is bounded, and unused
links are closed.
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

KEEP_S = 60.0  # how long an unused link stays open
REMEMBERED_STATES = 4096  # largest number of closed links whose failures are remembered
BRIEF_S = 5.0
"""How long a link that is only used for questions stays open after the last question: an answer may take this long,
and heartbeats begin later."""


class Linking(Protocol):
    """The part of `splitnet.transport.transport.Transport` that a pool needs."""

    def connect(self, endpoint: Endpoint) -> None: ...

    def disconnect(self, endpoint: Endpoint) -> None: ...

    def link_state(self, endpoint: Endpoint) -> LinkState: ...


@dataclass(eq=False)
class LinkPool:
    """Counts the users of each link. Thread-safe.

    Args:
        most: largest number of open links; a link to an unreachable peer counts as two. To make room for a new link, a
            failed link without users is closed first, then the link without users that was used longest ago.
        keep_s: how long a link stays open after its last use.
        keep_unreached_s: how long a link that is not up stays open after its last use; 0: the link is closed as soon
            as it has no users.
        keep_unused_s: how long a link that is up and never had users stays open after its last use. Links to
            unreachable peers stay open for `keep_s`, because opening them needs relays.
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
        """Open links without users, in the order of last use: the time of the first tick after it, infinite before."""
        self._had_users: set[Endpoint] = set()  # open links that have or had users
        self._failed: dict[Endpoint, tuple[LinkState, float]] = {}
        """Closed links that had failed: their states, and the time of the first tick afterwards, infinite before."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users) + len(self._unused)

    @property
    def in_use(self) -> list[Endpoint]:
        """Links with users."""
        with self._lock:
            return list(self._users)

    def acquire(self, endpoint: Endpoint) -> bool:
        """Adds a user to the link, and opens it if it is closed. False: too many other links are in use."""
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
        """Removes one user of the link, see `acquire`."""
        with self._lock:
            self._users[endpoint] -= 1
            if not self._users[endpoint]:
                del self._users[endpoint]
                self._unused[endpoint] = math.inf
                if not self.keep_unreached_s and self.linking.link_state(endpoint) is not LinkState.UP:
                    self._close_link(endpoint)

    def touch(self, endpoint: Endpoint) -> bool:
        """Notes that a link is used by a message, which opens the link if it is closed. False: too many other links are
        in use, so the message must not be sent."""
        with self._lock:
            if endpoint not in self._users:
                if not self._make_room(endpoint):
                    return False
                self._unused.pop(endpoint, None)
                self._unused[endpoint] = math.inf
            return True

    def restart_idle_time(self, endpoint: Endpoint) -> None:
        """Restarts the idle time of a link that has come up, because messages for the link have waited for the
        handshake."""
        with self._lock:
            if endpoint in self._unused:
                self._unused[endpoint] = math.inf

    def link_state(self, endpoint: Endpoint) -> LinkState:
        """State of a link. A link that was closed after a failure keeps the state of the failure for `SILENT_S`."""
        state = self.linking.link_state(endpoint)
        if state is LinkState.CONNECTING:
            state, _ = self._failed.get(endpoint, (state, 0.0))
        return state

    def tick(self, now: float) -> None:
        """Closes links that have been unused for too long. now: seconds."""
        with self._lock:
            for endpoint, since in list(self._unused.items()):
                if now - since > self._kept_s(endpoint):
                    self._close_link(endpoint)
                else:
                    self._unused[endpoint] = min(since, now)
            for endpoint, (state, since) in list(self._failed.items()):
                if now - since > SILENT_S or self.linking.link_state(endpoint) is LinkState.UP:
                    del self._failed[endpoint]
                else:
                    self._failed[endpoint] = (state, min(since, now))

    def _kept_s(self, endpoint: Endpoint) -> float:
        if self.linking.link_state(endpoint) is not LinkState.UP:
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
            self._close_link(min(self._unused, key=lambda unused: not _has_failed(self.linking.link_state(unused))))
        return True

    def _close_link(self, endpoint: Endpoint) -> None:
        del self._unused[endpoint]
        self._had_users.discard(endpoint)
        state = self.linking.link_state(endpoint)
        self._failed.pop(endpoint, None)
        if _has_failed(state):
            keep_latest(self._failed, endpoint, (state, math.inf), REMEMBERED_STATES)
        self.linking.disconnect(endpoint)


def _size(endpoint: Endpoint) -> int:
    return 2 if endpoint.hidden else 1  # a tunnel has sockets at both ends


def _has_failed(state: LinkState) -> bool:
    return state is LinkState.DOWN or state.is_final
