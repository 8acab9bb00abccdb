"""Where a service puts what it has to say."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from peers.sessions import PassWork, Work
from splitnet.transport.pool import KEEP_S, LinkPool
from splitnet.wire.endpoints import Destination, Endpoint, LinkState
from splitnet.wire.messages import Message, Timing


class Answering(Protocol):
    """Where messages go."""

    def send(self, destination: Destination, message: Message) -> None: ...


class Outbox(Answering, Protocol):
    """The way out, without sockets: see `splitnet.transport.transport.Transport`."""

    def together(self) -> AbstractContextManager[None]:
        """What is sent within may wait for its end."""
        ...

    def connect(self, endpoint: Endpoint) -> None: ...

    def disconnect(self, endpoint: Endpoint) -> None: ...

    def state(self, endpoint: Endpoint) -> LinkState: ...

    def unsent(self, endpoint: Endpoint) -> int:
        """Bytes that wait for a link that is up."""
        ...

    def probe(self, endpoint: Endpoint) -> int:
        """Begins to measure the round trip of a link; returns the number of the ping: the higher, the later."""
        ...

    def answered(self, endpoint: Endpoint) -> int:
        """Number of the latest ping that came back: all has arrived that was sent before that; 0: none did."""
        ...

    def rtt_ms(self, endpoint: Endpoint) -> float:
        """The round trip as measured lately; 0: not measured."""
        ...

    def patience_s(self, endpoint: Endpoint, *, connects: bool) -> float:
        """How long to wait for a pong, or for a link to come up and one: more where round trips are long."""
        ...


def timing_of(work: Work | PassWork, outbox: Outbox) -> Timing:
    """What a step or pass met at this hop, for whoever comes after it."""
    following = work.session.next
    rtt_ms = outbox.rtt_ms(following) if following is not None else 0.0
    return Timing(round(work.wait_ms * 1000), round(work.compute_ms * 1000), round(rtt_ms * 1000))


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
