"""How a daemon learns that it should end."""

from __future__ import annotations

import queue
import signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """From its making on, SIGINT and SIGTERM no longer raise, but end `wait`."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be filled by a handler
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: self._arrived.put(number))

    def wait(self) -> None:
        """Returns when one has come; the next one raises KeyboardInterrupt."""
        self._arrived.get()
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler)
