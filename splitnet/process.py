"""Signals that end a process, the watchdog of systemd, and child processes to kill."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from asyncio import SubprocessTransport


_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Windows has SIGBREAK (Ctrl-Break, or the console is closed) instead of SIGHUP."""
ENDING: Final = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
HANG_UP: Final[int | None] = getattr(signal, "SIGHUP", None)  # the signal for a lost terminal; None on Windows
EVERY_S = 5.0


class Watchdog:
    """Signs of life of a thread to systemd, which restarts the daemon when they stop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        name = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._clock = clock
        self._next = float("-inf")

    def alive(self) -> None:
        """Tells systemd that the daemon works, at most every `EVERY_S` seconds."""
        if not self._address or self._clock() < self._next:
            return
        self._next = self._clock() + EVERY_S
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.setblocking(False)
            told.sendto(b"READY=1\nWATCHDOG=1", self._address)


running: set[SubprocessTransport] = set()


def kill_all() -> None:
    """Kills all running child processes. Takes no lock and raises nothing, so that a signal handler may call it."""
    for child in tuple(running):
        if child.get_returncode() is None:
            with suppress(ProcessLookupError):
                os.kill(child.get_pid(), getattr(signal, "SIGKILL", signal.SIGTERM))
