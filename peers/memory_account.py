"""What sessions occupy of a peer's memory. Whatever keeps something for a session asks here before it allocates.

Counted are the bytes that will be allocated, objects around them included, not what a message announces.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from typing import Protocol

from splitnet.errors import PeerBusy
from splitnet.net.budget import Budget

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
    GRAPHS = "graphs"
    """What spares passes that gradients may come for to be computed again; it makes room for everything else."""
    ADAPTERS = "adapters"
    """Adapters, with parts that come in and sums of gradients."""


class Holder(Hashable, Protocol):
    """A session."""

    @property
    def owner(self) -> Hashable:
        """The key that it counts for."""
        ...


class MemoryAccount(Budget):
    """Bytes of one kind of memory by key, session and purpose; a key gets what `Budget` says. Its holder has a lock.

    Args:
        limit: bytes.
        refusal: the beginning of what who is refused is told, before the bytes.
        advice: what who is refused can do, as a clause.
        most: as of `Budget`, for a key, a session of it, and a purpose of that.
    """

    def __init__(self, limit: int, refusal: str, advice: str, most: tuple[int | None, ...] = ()) -> None:
        super().__init__(limit, most)
        self._refusal, self._advice = refusal, advice

    def used_for(self, purpose: Purpose) -> int:
        """Bytes of all sessions."""
        return sum(nbytes for account, nbytes in self.accounts() if account[2:] == (purpose,))

    def take(self, session: Holder, purpose: Purpose, nbytes: int) -> None:
        """Before something is allocated.

        Raises:
            PeerBusy: it does not fit, or leaves too little for other keys. Nothing is changed then.
        """
        if not self.reserve(nbytes, session.owner, session, purpose):
            held = self.held(session.owner)
            shared = f"; your key has {held}, and may have as much as is left for others" if nbytes <= self.free else ""
            raise PeerBusy(
                f"{self._refusal} {nbytes} bytes: {self.free} of {self.limit} are free{shared}; {self._advice}"
            )

    def give_back(self, session: Holder, purpose: Purpose, nbytes: int) -> None:
        """After something was dropped; nothing is left of a session that has ended."""
        account = session.owner, session, purpose
        self.release(min(nbytes, self.held(*account)), *account)

    def end(self, session: Holder) -> None:
        """Gives back all that is left of a session."""
        for purpose in Purpose:
            self.give_back(session, purpose, self.limit)
