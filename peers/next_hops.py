"""Links to other peers, mostly next hops of sessions: few, shared by sessions, and closed when none needs them.

Clients name the addresses, so a hostile one must not be able to make a peer connect to ever more of them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter

from peers.outbox import Outbox
from splitnet.net.endpoints import Endpoint, LinkState

MAX_NEXT_HOPS = 64
KEEP_S = 60.0
PROBE_S = 2.0
"""How often the links that sessions use are measured."""


class NextHops:
    """Counts how many sessions push over each link. Thread-safe.

    Args:
        outbox: opens and closes links.
        most: links at the same time.
        keep_s: how long a link that works outlives its last session, so that the next one finds it open.
    """

    def __init__(self, outbox: Outbox, *, most: int = MAX_NEXT_HOPS, keep_s: float = KEEP_S) -> None:
        self._outbox = outbox
        self._most = most
        self._keep_s = keep_s
        self._users: Counter[Endpoint] = Counter()
        self._unused: dict[Endpoint, float] = {}
        """Since when (infinite until the next tick), in the order in which they lost their last session."""
        self._probe_at = 0.0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users) + len(self._unused)

    def acquire(self, endpoint: Endpoint) -> bool:
        """Opens the link for one more session; False if there are too many others."""
        with self._lock:
            if endpoint not in self._users and endpoint not in self._unused and len(self) >= self._most:
                if not self._unused:
                    return False
                self._close(next(iter(self._unused)))
            self._users[endpoint] += 1
            self._unused.pop(endpoint, None)
            self._outbox.connect(endpoint)
            return True

    def release(self, endpoint: Endpoint) -> None:
        """A session does not push over the link any more."""
        with self._lock:
            self._users[endpoint] -= 1
            if not self._users[endpoint]:
                del self._users[endpoint]
                self._unused[endpoint] = math.inf
                if self._outbox.state(endpoint) is not LinkState.UP:
                    self._close(endpoint)

    def tick(self, now: float) -> None:
        """Closes links that nobody has used for long, and measures the others."""
        with self._lock:
            for endpoint, since in list(self._unused.items()):
                if now - since > self._keep_s:
                    self._close(endpoint)
                else:
                    self._unused[endpoint] = min(since, now)
            if now >= self._probe_at:
                self._probe_at = now + PROBE_S
                for endpoint in self._users:
                    self._outbox.probe(endpoint)

    def _close(self, endpoint: Endpoint) -> None:
        del self._unused[endpoint]
        self._outbox.disconnect(endpoint)
