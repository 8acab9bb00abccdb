"""What a client has seen of speculation: how often drafts are accepted, and what windows cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from scheduler.averages import MovingAverage
from scheduler.speculation import NO_DRAFTS, Pace, Window, best_window
from splitnet.client.planner import Forecast

SHARE = 0.2
"""Weight of the latest step in the averages of what steps cost."""

MEMORY = 0.97
"""Of what was known of acceptance, so much counts after each further token."""

PRIOR_TOKENS = 4.0
"""So many tokens does what is assumed at first count for."""

FORECAST_S = 1.0
"""How long a forecast is used."""


class Experience:
    """Of one client with one model and one kind of drafter. It outlives texts, and several share it. Thread-safe.

    Args:
        priors: by kind of draft: how often its tokens are accepted at first.

    Attributes:
        drafted: tokens that were sent as drafts. accepted: those of them that belong to a text now.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.drafted = 0
        self.accepted = 0
        self._accepted = [prior * PRIOR_TOKENS for prior in priors]
        self._tried = [PRIOR_TOKENS for _ in priors]
        self._beyond_ms: dict[int, MovingAverage] = {}
        """By positions: what a step took beyond its forecast."""
        self._client_ms: dict[int, MovingAverage] = {}
        """By positions: what of a step kept this process busy."""
        self._forecasts: dict[int, Forecast] = {}
        self._forecast_at = 0.0
        self._lock = threading.RLock()

    def acceptance(self, kind: int) -> float:
        """Probability that a drafted token is what the model chooses, if those before it were."""
        return self._accepted[kind] / self._tried[kind]

    def compared(self, kind: int, right: bool) -> None:
        """A drafted token, of which those before it were right, was compared with what the model chose."""
        with self._lock:
            self._accepted[kind] = MEMORY * self._accepted[kind] + right
            self._tried[kind] = MEMORY * self._tried[kind] + 1

    def sent(self, count: int) -> None:
        """So many drafted tokens are under way."""
        with self._lock:
            self.drafted += count

    def verified(self, kind: int, right: bool) -> None:
        """As `compared`, of a token that was sent."""
        with self._lock:
            self.accepted += right
            self.compared(kind, right)

    def took(self, positions: int, elapsed_ms: float, client_ms: float, forecast: Callable[[int], Forecast]) -> None:
        """A step that was alone under way came back.

        Args:
            positions: that it had.
            elapsed_ms: from sending it until its tokens were chosen. client_ms: what of that kept this process busy.
            forecast: what a step through the blocks is expected to take, by its positions.
        """
        with self._lock:
            beyond = elapsed_ms - self._foretold(positions, forecast).latency_ms
            for averages, value in ((self._beyond_ms, beyond), (self._client_ms, client_ms)):
                averages.setdefault(positions, MovingAverage(SHARE)).add(value)

    def window(self, kind: int, draft_ms: float, forecast: Callable[[int], Forecast]) -> Window:
        """The window that promises most, for drafts of this kind; none as long as nothing was seen of plain steps."""
        if 1 not in self._beyond_ms:
            return NO_DRAFTS

        def latency_ms(positions: int) -> float:
            return max(self._foretold(positions, forecast).latency_ms + _nearest(self._beyond_ms, positions), 0.1)

        def stage_ms(positions: int) -> float:
            # What more positions take beyond the forecast is computed somewhere, at worst at the slowest hop.
            growth = max(0.0, _nearest(self._beyond_ms, positions) - self._beyond_ms[1].value)
            stage = self._foretold(positions, forecast).stage_ms + growth
            return max(stage, _nearest(self._client_ms, positions))

        with self._lock:
            return best_window(self.acceptance(kind), Pace(latency_ms, stage_ms, draft_ms))

    def _foretold(self, positions: int, forecast: Callable[[int], Forecast]) -> Forecast:
        now = time.monotonic()
        if now - self._forecast_at > FORECAST_S:
            self._forecasts, self._forecast_at = {}, now
        if positions not in self._forecasts:
            self._forecasts[positions] = forecast(positions)
        return self._forecasts[positions]


def _nearest(averages: dict[int, MovingAverage], positions: int) -> float:
    return averages[min(averages, key=lambda known: abs(known - positions))].value
