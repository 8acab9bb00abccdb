"""The signals that end a process, as far as this system has them."""

from __future__ import annotations

import signal
from typing import Final

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""The last is of Windows: Ctrl-Break, or its console is closed. It has no SIGHUP."""

ENDING: Final = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

HANG_UP: Final[int | None] = getattr(signal, "SIGHUP", None)
"""The terminal is lost."""
