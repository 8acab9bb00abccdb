"""Tells systemd that a daemon serves and is alive (sd_notify), for units with `Type=notify` and `WatchdogSec`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

EVERY_S = 5.0


class Watchdog:
    """For the thread that must not stop: when it does not call for too long, systemd restarts the daemon.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        name = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._clock = clock
        self._next = float("-inf")

    def alive(self) -> None:
        """Says that requests are served; every few seconds at most, however often it is called."""
        if not self._address or self._clock() < self._next:
            return
        self._next = self._clock() + EVERY_S
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.setblocking(False)
            told.sendto(b"READY=1\nWATCHDOG=1", self._address)
