"""What happens to peers and routes, for whoever wants to show it: the latest events, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

KEPT_EVENTS = 256

Kind = Literal[
    "lost", "repaired", "rerouted", "failed", "refused", "weights", "joined", "gone", "back", "left", "moved"
]
"""Of routes: a hop was lost, the route is repaired, or changed for a better one; a repair failed; a peer did not take a
session; weights are held otherwise. Of peers: they joined, stopped answering, answer again, left, serve other
blocks.
"""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    number: int
    """Counts up from 1."""
    at: float
    """Unix time in seconds."""
    kind: Kind
    text: str
    """One sentence. It may quote what peers say of themselves."""


class EventLog:
    """The last `KEPT_EVENTS` events. Thread-safe.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._last = 0
        self._lock = threading.Lock()

    def note(self, kind: Kind, text: str) -> None:
        """Takes in that something happened just now."""
        with self._lock:
            self._last += 1
            self._events.append(Event(self._last, self._clock(), kind, text))

    def since(self, number: int) -> list[Event]:
        """Those after the event with this number, as far as they are kept; 0: all."""
        with self._lock:
            return [event for event in self._events if event.number > number]
