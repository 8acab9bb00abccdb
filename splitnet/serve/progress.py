"""Progress of answers: tokens per second, and the route and the times of each answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from scheduler.facts import UNMEASURED
from splitnet.hf.cache import ModelSession
from splitnet.session.failover import RouteHop
from splitnet.session.inference import LinkUse
from splitnet.session.local import MixedSession
from splitnet.swarm.swarm import Swarm


@dataclass(frozen=True, slots=True)
class HopView:
    """The blocks `[start, end)` that a peer runs for a session; `lost`: the peer failed and is not replaced yet."""

    peer: str
    start: int
    end: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class LinkView:
    """A link of a route, in the direction of activations; see `splitnet.session.inference.LinkUse`."""

    codec: str
    bytes_per_token: int
    # The delay in one direction, measured or predicted from the network coordinates of the two ends; None: unknown.
    delay_ms: float | None
    via_client: bool  # relayed through the client, because the two ends cannot connect


@dataclass(frozen=True, slots=True)
class RouteView:
    """Consecutive hops, and the links before, between and after these hops. There is one more link than hops."""

    hops: tuple[HopView, ...]
    links: tuple[LinkView, ...]


def routes_of(swarm: Swarm, session: ModelSession | None) -> tuple[RouteView, ...]:
    """The open routes of a session, in the order of their blocks; the client runs all other blocks.

    Callable from any thread. A route during failover may be left out.
    """
    if session is None:
        return ()
    routes: list[RouteView] = []
    for part in session.sessions if isinstance(session, MixedSession) else [session]:
        hops, uses = list(part.hops), part.links()
        if hops and len(uses) == len(hops) + 1:
            ends = pairwise([None, *hops, None])
            links = [_link(swarm, use, *each) for use, each in zip(uses, ends, strict=True)]
            routes.append(RouteView(tuple(HopView(hop.name, *hop.blocks, hop.lost) for hop in hops), tuple(links)))
    return tuple(routes)


def _link(swarm: Swarm, use: LinkUse, sender: RouteHop | None, receiver: RouteHop | None) -> LinkView:
    ends = [hop.planned.record if hop is not None else None for hop in (sender, receiver)]
    via_client = sender is not None and sender.relayed
    links = [swarm.link(ends[0], None), swarm.link(None, ends[1])] if via_client else [swarm.link(*ends)]
    delay_ms = None if UNMEASURED in links else sum(link.latency_ms for link in links)
    return LinkView(use.codec, use.bytes_per_token, delay_ms, via_client)


KEPT_ANSWERS = 64  # Ended answers that are kept for the dashboard
HISTORY_S = 300  # Seconds for which tokens per second are kept
Routes = tuple[RouteView, ...]


@dataclass
class AnswerProgress:
    """The progress of one prompt of a request. Times are in seconds, by the clock of the `ProgressLog`."""

    answer: str  # id of the request's answer
    began: float
    prompt: int = 0  # number of positions of the prompt
    cached: int = 0  # positions of the prompt that peers already held from another answer
    tokens: int = 0
    first_token: float | None = None
    ended: float | None = None
    _routes: Callable[[], Routes] | None = field(default=None, repr=False)
    _passed: Callable[[], int] | None = field(default=None, repr=False)
    _last_routes: Routes = ()

    def follow(self, routes: Callable[[], Routes] | None, passed: Callable[[], int] | None = None) -> None:
        """Sets the functions that return the session's routes, and how many positions have passed all blocks.

        routes: None when the answer does not use the session any more; then the last routes are kept.
        """
        if routes is None:
            self._last_routes = self.routes()
        self._routes, self._passed = routes, passed

    def prompt_done(self) -> int:
        """How many positions of the prompt have passed all blocks."""
        if self.first_token is not None:
            return self.prompt
        passed = self._passed
        return min(self.prompt, self.cached + passed()) if passed is not None else 0

    def routes(self) -> Routes:
        routes = self._routes
        return routes() if routes is not None else self._last_routes


class ProgressLog:
    """The progress of all running answers and of the last `KEPT_ANSWERS` ended ones. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._running: list[AnswerProgress] = []
        self._ended: deque[AnswerProgress] = deque(maxlen=KEPT_ANSWERS)
        self._per_second: deque[int] = deque([0] * HISTORY_S, maxlen=HISTORY_S)  # The last entry is the current second
        self._second = int(clock())
        self._lock = threading.Lock()

    def begin_answer(self, answer: str, prompt: int = 0) -> AnswerProgress:
        progress = AnswerProgress(answer, self.clock(), prompt)
        with self._lock:
            self._running.append(progress)
        return progress

    def token(self, progress: AnswerProgress) -> None:
        with self._lock:
            progress.tokens += 1
            if progress.first_token is None:
                progress.first_token = self.clock()
            self._turn_to_now()
            self._per_second[-1] += 1

    def end_answer(self, progress: AnswerProgress) -> None:
        with self._lock:
            progress.ended = self.clock()
            self._running.remove(progress)
            self._ended.append(progress)

    def answers(self) -> list[AnswerProgress]:
        """The last ended answers in the order in which they ended, then the running answers in the order of starts."""
        with self._lock:
            return [*self._ended, *self._running]

    def working_peers(self) -> set[str]:
        """Keys of the peers on the routes of running answers, without lost hops."""
        with self._lock:
            running = list(self._running)
        hops = (hop for each in running for route in each.routes() for hop in route.hops)
        return {hop.peer for hop in hops if not hop.lost}

    def tokens_per_second(self) -> list[int]:
        """Tokens of each complete second of the last `HISTORY_S`, the latest second last."""
        with self._lock:
            self._turn_to_now()
            return list(self._per_second)[:-1]

    def _turn_to_now(self) -> None:
        now = int(self.clock())
        self._per_second.extend([0] * min(now - self._second, HISTORY_S))
        self._second = now
