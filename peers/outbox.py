"""Where a service puts what it has to say."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from peers.session import PassWork, Work
from splitnet.net.endpoints import Destination, Endpoint, LinkState
from splitnet.net.messages import Message, Timing


class Answering(Protocol):
    """Where messages go."""

    def send(self, destination: Destination, message: Message) -> None: ...


class Outbox(Answering, Protocol):
    """The way out, without sockets: see `splitnet.net.transport.Transport`."""

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
