"""Warnings about what others do, of which whoever does it again and again must not fill the log."""

from __future__ import annotations

import logging
import time

_PAUSE_S = 1.0


class SeldomWarnings:
    """Of what is said in so long the first is a warning, and the rest is for those who debug; one thread uses it."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._warn_at = 0.0

    def say(self, text: str, *facts: object, extra: dict[str, object] | None = None) -> None:
        """Logs a text with its arguments."""
        now = time.monotonic()
        warns = now >= self._warn_at
        self._log.log(logging.WARNING if warns else logging.DEBUG, text, *facts, extra=extra)
        if warns:
            self._warn_at = now + _PAUSE_S
