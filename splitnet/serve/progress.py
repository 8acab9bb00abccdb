"""How the answers come on: tokens per second, and the route and the times of each answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from splitnet.serve.route_view import RouteView

KEPT_ANSWERS = 64
HISTORY_S = 300
"""For so many seconds it is known how many tokens came in each."""

Routes = tuple[RouteView, ...]


@dataclass
class Progress:
    """Of one answer, or of a part of it.

    Attributes:
        answer: id of the answer.
        began: when the model was first asked, in seconds of the clock.
        first_token: when the first token was there; None: not yet.
        ended: when the last one was there, or an error; None: not yet.
    """

    answer: str
    began: float
    tokens: int = 0
    first_token: float | None = None
    ended: float | None = None
    _routes: Callable[[], Routes] | None = field(default=None, repr=False)
    _last_routes: Routes = ()

    def follow(self, routes: Callable[[], Routes]) -> None:
        """From now on `routes` tells through whom it goes."""
        self._routes = routes

    def unfollow(self) -> None:
        """The routes will be those of other answers: they stay what they are now."""
        if self._routes is not None:
            self._last_routes = self._routes()
        self._routes = None

    def routes(self) -> Routes:
        """Through whom it goes, or went at last."""
        routes = self._routes
        return routes() if routes is not None else self._last_routes


class ProgressLog:
    """Of the answers that are under way and of the last ones. Thread-safe.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._running: list[Progress] = []
        self._ended: deque[Progress] = deque(maxlen=KEPT_ANSWERS)
        self._per_second: deque[int] = deque([0] * HISTORY_S, maxlen=HISTORY_S)
        """The last is the second that has begun."""
        self._second = int(clock())
        self._lock = threading.Lock()

    def begin(self, answer: str) -> Progress:
        """Takes in that an answer is waiting for its first token."""
        progress = Progress(answer, self.clock())
        with self._lock:
            self._running.append(progress)
        return progress

    def token(self, progress: Progress) -> None:
        """Takes in a token of an answer."""
        with self._lock:
            progress.tokens += 1
            if progress.first_token is None:
                progress.first_token = self.clock()
            self._turn_to_now()
            self._per_second[-1] += 1

    def end(self, progress: Progress) -> None:
        """Takes in that nothing more comes."""
        with self._lock:
            progress.ended = self.clock()
            self._running.remove(progress)
            self._ended.append(progress)

    def answers(self) -> list[Progress]:
        """Those that ended lately, and those under way, in the order in which they ended and began."""
        with self._lock:
            return [*self._ended, *self._running]

    def working_peers(self) -> set[str]:
        """Those that answers are going through now, as their sessions know."""
        with self._lock:
            running = list(self._running)
        hops = (hop for each in running for route in each.routes() for hop in route.hops)
        return {hop.peer for hop in hops if not hop.lost}

    def tokens_per_second(self) -> list[int]:
        """Tokens of each of the last seconds that are over; the latest is the last."""
        with self._lock:
            self._turn_to_now()
            return list(self._per_second)[:-1]

    def _turn_to_now(self) -> None:
        now = int(self.clock())
        self._per_second.extend([0] * min(now - self._second, HISTORY_S))
        self._second = now
