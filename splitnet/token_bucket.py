"""Tokens per minute: what was spent comes back evenly, and what was taken beyond it is owed."""

from __future__ import annotations

import math
import time

MINUTE_S = 60.0


class TokenBucket:
    """Of one key. How much a minute has is told at each call, as it may change.

    Attributes:
        at: when tokens were spent last, in seconds.
    """

    def __init__(self) -> None:
        self.at = 0.0
        self._spent = 0.0

    def wait_s(self, per_minute: int, now: float) -> int:
        """Seconds until there are some; 0: there are."""
        owed = self._still_spent(per_minute, now) - per_minute
        return math.floor(owed * MINUTE_S / per_minute) + 1 if owed >= 0 else 0

    def spend(self, tokens: int, per_minute: int, now: float) -> None:
        """Takes tokens away, also where there are not as many."""
        self._spent = self._still_spent(per_minute, now) + tokens
        self.at = now

    def _still_spent(self, per_minute: int, now: float) -> float:
        """What was spent and has not come back."""
        return max(0.0, self._spent - (now - self.at) * per_minute / MINUTE_S)


class Pace:
    """Keeps what is sent at a rate, evenly: a bucket without depth."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def wait_s(self, tokens: int, per_s: float, now: float | None = None) -> float:
        """Seconds to wait after `tokens` were used."""
        now = time.monotonic() if now is None else now
        self._free_at = max(self._free_at, now) + tokens / per_s
        return self._free_at - now
