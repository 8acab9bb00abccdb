"""The trace of a request: how long its parts took, and the peers that served it, in headers of the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise

from splitnet.serve.progress import Routes
from splitnet.swarm.swarm import short_key

TIMING_HEADER, ROUTE_HEADER = "Server-Timing", "X-Splitnet-Route"


class Trace:
    """Begins when a request arrives. routes: returns the routes of the session that the request uses.

    clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ends = {"": clock()}  # when each part has ended, in the order of the parts
        self.routes: Callable[[], Routes] = lambda: ()

    def end_part(self, part: str) -> None:
        """Notes that a part ends now; it has begun at the end of the part before it."""
        self._ends[part] = self._clock()

    def note_event(self) -> None:
        """Notes an event of the model: the first event ends `prefill`, the last event ends `decode`."""
        self.end_part("decode" if "prefill" in self._ends else "prefill")

    def timing(self) -> str:
        """The durations of the ended parts, and the time since the arrival, as W3C Server-Timing in ms."""
        spans = [(part, begin, end) for (_, begin), (part, end) in pairwise(self._ends.items())]
        spans.append(("total", self._ends[""], self._clock()))
        return ", ".join(f"{part};dur={1000 * (end - begin):.1f}" for part, begin, end in spans)

    def route(self) -> str:
        """The blocks `start:end` and the short name of each hop, in the order of blocks; empty: no peer serves."""
        hops = (hop for route in self.routes() for hop in route.hops)
        return ", ".join(f"{hop.start}:{hop.end} {short_key(hop.peer)}" for hop in hops)


TRACE: ContextVar[Trace] = ContextVar("TRACE")
"""The trace of the request that this task answers."""
