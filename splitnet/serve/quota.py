"""Tokens per minute of an API key."""

from __future__ import annotations

import time
from collections.abc import Callable

from splitnet.serve.failures import ApiError
from splitnet.token_bucket import TokenBucket


class TokenQuota:
    """Tokens of prompts and answers. What a running answer takes beyond them is owed before the next request.

    Args:
        per_minute: so many at once after a quiet minute, and so many in each minute.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._bucket = TokenBucket()

    def check(self) -> None:
        """Refuses a request if nothing is left.

        Raises:
            ApiError: with the seconds until there is something.
        """
        if seconds := self._bucket.wait_s(self._per_minute, self._clock()):
            raise ApiError(
                429,
                f"this key has used its {self._per_minute} tokens per minute: try again in {seconds} s",
                code="rate_limit_exceeded",
                retry_after_s=seconds,
            )

    def spend(self, tokens: int) -> None:
        """Takes tokens away."""
        self._bucket.spend(tokens, self._per_minute, self._clock())
