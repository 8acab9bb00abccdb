"""Whether peers whose blocks this one would take over are still there.

A peer that dies without a word stays in the DHT until its record expires, which takes up to a minute. The peer that is
to fill the hole does not wait for that: it keeps links to these peers, which are few.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from peers.next_hops import NextHops
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.identity import PublicKey
from splitnet.net.records import PeerRecord

MAX_WATCHED = 16
LOST_S = 2.5
"""A peer that has not answered for so long, and whose link is lost, is gone."""

SILENT_S = 6.0
"""The same, whatever its link says. Pings go out every `peers.next_hops.PROBE_S`."""


class HolderWatch:
    """Keeps links to some peers and notes when they were heard of. Thread-safe.

    Args:
        links: opened as for a session, which also pings over them.
        state: of a link.
    """

    def __init__(self, links: NextHops, state: Callable[[Endpoint], LinkState]) -> None:
        self._links = links
        self._state = state
        self._heard_at: dict[Endpoint, float | None] = {}
        """In seconds; None: not yet."""
        self._lock = threading.Lock()

    def watch(self, records: Iterable[PeerRecord]) -> None:
        """Watches these peers from now on, the first `MAX_WATCHED`, and no others."""
        wanted = list(dict.fromkeys(record.endpoint for record in records))[:MAX_WATCHED]
        with self._lock:
            for endpoint in [endpoint for endpoint in self._heard_at if endpoint not in wanted]:
                del self._heard_at[endpoint]
                self._links.release(endpoint)
            for endpoint in wanted:
                if endpoint not in self._heard_at and self._links.acquire(endpoint):
                    self._heard_at[endpoint] = None

    def heard(self, endpoint: Endpoint, now: float) -> None:
        """A peer has answered a ping at `now` (seconds)."""
        with self._lock:
            if endpoint in self._heard_at:
                self._heard_at[endpoint] = now

    def gone(self, now: float) -> frozenset[PublicKey]:
        """Those of the watched that were there and are not any more."""
        with self._lock:
            return frozenset(
                endpoint.key
                for endpoint, at in self._heard_at.items()
                if at is not None and now - at > (SILENT_S if self._state(endpoint) is LinkState.UP else LOST_S)
            )
