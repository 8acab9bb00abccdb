"""What sessions occupy of a peer's memory. Whatever keeps something for a session asks here before it allocates.

Counted are the bytes that will be allocated, objects around them included, not what a message announces.
"""

from __future__ import annotations

import threading
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

from splitnet.errors import PeerBusy

if TYPE_CHECKING:
    from peers.session import Session

MESSAGE_BYTES = 2048
"""What a message that is kept takes besides its payload: its objects, and the buffer that it came in."""

TENSOR_BYTES = 1024
"""What a tensor takes besides its numbers."""

TIMING_BYTES = 192
"""What a timing of a hop takes in a message."""

FORK_BYTES = 128
"""What a part or a fork of a step takes."""


class Purpose(StrEnum):
    """What memory is for."""

    POSITIONS = "positions"
    """Keys, values and logs, for all positions that a session has reserved."""
    ROWS = "rows"
    """What rows take besides their positions: tensors, and states with copies of them."""
    STEPS = "steps"
    """Steps that wait for the device."""
    PASSES = "passes"
    """Passes that wait, and inputs that gradients may come for."""
    ADAPTERS = "adapters"
    """Adapters, with parts that come in and sums of gradients."""


class MemoryAccount:
    """Bytes of one kind of memory: never more than `capacity`, all sessions together. For any thread.

    Args:
        capacity: bytes.
        refusal: the beginning of what who is refused is told, before the bytes.
        advice: what who is refused can do, as a clause.
    """

    def __init__(self, capacity: int, refusal: str, advice: str) -> None:
        self.capacity = capacity
        self.used = 0
        self._refusal, self._advice = refusal, advice
        self._of: dict[Session, Counter[Purpose]] = {}
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def used_for(self, purpose: Purpose) -> int:
        """Bytes of all sessions."""
        with self._lock:
            return sum(held[purpose] for held in self._of.values())

    def held(self, session: Session) -> int:
        """Bytes of a session."""
        with self._lock:
            return sum(self._of.get(session, Counter[Purpose]()).values())

    def take(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """Before something is allocated.

        Raises:
            PeerBusy: it does not fit. Nothing is changed then.
        """
        with self._lock:
            if nbytes > self.free:
                raise PeerBusy(
                    f"{self._refusal} {nbytes} bytes: {self.free} of {self.capacity} are free; {self._advice}"
                )
            self.used += nbytes
            self._of.setdefault(session, Counter())[purpose] += nbytes

    def give_back(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """After something was dropped; nothing is left of a session that has ended."""
        with self._lock:
            held = self._of.get(session)
            if held is not None:
                nbytes = min(nbytes, held[purpose])
                held[purpose] -= nbytes
                self.used -= nbytes

    def end(self, session: Session) -> None:
        """Gives back all that is left of a session."""
        with self._lock:
            self.used -= sum(self._of.pop(session, Counter()).values())
