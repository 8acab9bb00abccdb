"""Tokens per minute of a key: a bucket that fills evenly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from splitnet.serve.failures import ApiError


class TokenQuota:
    """Tokens of prompts and answers. What a running answer takes beyond them is owed before the next request.

    Args:
        per_minute: so many at once after a quiet minute, and so many in each minute.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._at = clock()

    def check(self) -> None:
        """Refuses a request if nothing is left.

        Raises:
            ApiError: with the seconds until there is something.
        """
        self._fill()
        if self._left <= 0:
            seconds = math.floor(-self._left * 60 / self._per_minute) + 1
            raise ApiError(
                429,
                f"this key has used its {self._per_minute} tokens per minute: try again in {seconds} s",
                code="rate_limit_exceeded",
                retry_after_s=seconds,
            )

    def spend(self, tokens: int) -> None:
        """Takes tokens away."""
        self._fill()
        self._left -= tokens

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
