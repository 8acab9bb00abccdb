"""Links to other peers, mostly next hops of sessions: few, shared by sessions, and closed when none needs them.

Clients name the addresses, so a hostile one must not be able to make a peer connect to ever more of them.
"""

from __future__ import annotations

from peers.outbox import Outbox
from splitnet.net.link_pool import KEEP_S, LinkPool

MAX_NEXT_HOPS = 64
PROBE_S = 2.0
"""How often the links that sessions use are measured."""


class NextHops(LinkPool):
    """The links of a peer to others, each with the sessions that push over it as its users. Thread-safe.

    Args:
        outbox: opens, closes and measures links.
        most: links at the same time.
        keep_s: how long a link that works outlives its last session, so that the next one finds it open.
    """

    def __init__(self, outbox: Outbox, *, most: int = MAX_NEXT_HOPS, keep_s: float = KEEP_S) -> None:
        super().__init__(outbox, most=most, keep_s=keep_s)
        self._outbox = outbox
        self._probe_at = 0.0

    def tick(self, now: float) -> None:
        """Closes links that nobody has used for long, and measures the others."""
        super().tick(now)
        if now >= self._probe_at:
            self._probe_at = now + PROBE_S
            for endpoint in self.in_use:
                self._outbox.probe(endpoint)
