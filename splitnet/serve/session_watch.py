"""What a session meets on the peers, told while it is used."""

from __future__ import annotations

from typing import Protocol

from splitnet.client.cache import RemoteCache
from splitnet.client.session_events import Recovered
from splitnet.net.messages import Timing


class Observer(Protocol):
    """Who is told; called from the threads of requests."""

    def step_took(self, timings: tuple[Timing, ...]) -> None:
        """What a step met at each hop."""
        ...

    def recovered(self, recovered: Recovered) -> None:
        """A route was repaired."""
        ...

    def transferred(self, sent: int, received: int) -> None:
        """So many bytes went to peers and came from them."""
        ...


class SessionWatch:
    """Tells an observer what is new of a session at each look.

    Args:
        cache: whose session it is; one that has none yet gets one with its first step.
        observer: is told what comes from now on.
    """

    def __init__(self, cache: RemoteCache, observer: Observer) -> None:
        self._cache = cache
        self._observer = observer
        session = cache.session
        self._timings = session.timings if session is not None else ()
        self._repairs = len(session.recoveries) if session is not None else 0
        traffic = session.traffic if session is not None else None
        self._sent = traffic.bytes_sent if traffic is not None else 0
        self._received = traffic.bytes_received if traffic is not None else 0

    def look(self) -> None:
        """Tells what has come since the last look; of several steps only the last one's times are known."""
        session = self._cache.session
        if session is None:
            return
        timings, repairs, traffic = session.timings, session.recoveries, session.traffic
        sent, received = traffic.bytes_sent, traffic.bytes_received
        if timings != self._timings:
            self._timings = timings
            self._observer.step_took(timings)
        for recovered in repairs[self._repairs :]:
            self._observer.recovered(recovered)
        self._repairs = len(repairs)
        self._observer.transferred(sent - self._sent, received - self._received)
        self._sent, self._received = sent, received
