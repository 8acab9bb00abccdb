"""The child processes of this one, for who must end at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import SubprocessTransport

running: set[SubprocessTransport] = set()


def kill_all() -> None:
    """Takes no lock and raises nothing, so that a signal handler may call it."""
    for child in tuple(running):
        if child.get_returncode() is None:
            with suppress(ProcessLookupError):
                os.kill(child.get_pid(), getattr(signal, "SIGKILL", signal.SIGTERM))
