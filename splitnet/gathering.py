"""How long work waits for more of its kind, which is done together at about the price of one.

A pass through blocks takes about as long for some sessions as for one, since it reads the same weights. Sessions that
were in a pass together come back one shortly after the other: if it began with the first of them, the others would wait
for all of it, which is longer than the first waits for them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from scheduler.averages import MovingAverage

PATIENCE = 0.1
"""How long the next one is waited for, as a part of the time that the work takes."""

SHARED_PATIENCE = 3.0
"""How much longer, as a part of the time for which it had no processor: others want it, and use it meanwhile.

Until half of those who are expected are there: of one group the processors of a machine would wait for each other.
"""

LATELY_S = 1.0
"""Who has brought work within so many seconds may bring more."""

_LEARNING = 0.1


class Gathering:
    """Tells how long to wait, from what was seen before. One thread uses it at a time; `left` may come from any."""

    def __init__(self) -> None:
        self._took_s = MovingAverage(_LEARNING)
        self._delayed_s = MovingAverage(_LEARNING)
        self._seen: dict[Hashable, float] = {}

    def ran(self, sources: Iterable[Hashable], took_s: float, computed_s: float, now: float) -> None:
        """Takes in that work of these sources was done together.

        Args:
            took_s: seconds that it took.
            computed_s: for how many of them its thread had a processor.
            now: when it was done, in seconds.
        """
        self._took_s.add(took_s)
        self._delayed_s.add(max(0.0, took_s - computed_s))
        self._seen.update(dict.fromkeys(sources, now))
        seen = list(self._seen.items())
        if any(now - at > LATELY_S for _, at in seen):
            self._seen = {source: at for source, at in seen if now - at <= LATELY_S}

    def left(self, source: Hashable) -> None:
        """Nothing more comes from a source."""
        self._seen.pop(source, None)

    def patience_s(self, ready: int) -> float:
        """Seconds to wait for the next one when the work of so many sources is ready; 0: no more are expected.

        At most what the work itself takes.
        """
        if ready >= len(self._seen):
            return 0.0
        took_s = self._took_s.value
        shared = SHARED_PATIENCE * self._delayed_s.value if 2 * ready < len(self._seen) else 0.0
        return min(PATIENCE * took_s + shared, took_s)
