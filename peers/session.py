"""A session at a hop, and its steps on their way through the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peers.memory_account import FORK_BYTES, MESSAGE_BYTES, TIMING_BYTES
from splitnet.errors import PeerBusy
from splitnet.net.codecs import Codec
from splitnet.net.endpoints import Connection, Endpoint
from splitnet.net.messages import Adapter as AdapterMessage
from splitnet.net.messages import FetchKV, Forward, Gradient, Part, Step, Timing
from splitnet.net.sent_log import SentLog

if TYPE_CHECKING:
    import torch

    from splitnet.model.adapters import Adapter
    from splitnet.model.kv_cache import RowCache
    from splitnet.model.passes import WayBack


MOST_RESENT = 10
"""So often may a session have its log, or keys and values, sent at once: more than the routes that a client tries."""

RESEND_S = 10.0
"""And once more after so long."""

ADAPTER_COPIES = 2
"""The adapter, and the sum of its gradients."""


@dataclass(slots=True)
class GradientSum:
    """Gradients by an adapter, added up over some passes of an epoch."""

    epoch: int
    since: int
    tensors: dict[str, torch.Tensor]


@dataclass(slots=True, eq=False)
class Session:
    """One client's rows along this hop.

    `owner` and `previous` are CURVE keys: steps are accepted from nobody else.
    """

    id: bytes
    owner: bytes
    reply_to: Connection
    epoch: int
    start: int
    end: int
    budget: int
    """Positions reserved, over all rows."""
    codec: Codec
    previous: bytes | None
    next: Endpoint | None
    log: SentLog
    used_at: float
    """Seconds of the peer's clock."""
    weights: str = ""
    """What `Opened` says that they are held as."""
    opened_at: float = 0.0
    stepped_at: float = 0.0
    """When it was opened, and when its last step or pass came. Of the peer's clock."""
    reserved_rows: int = 0
    """Rows whose states have a place. Touched by the table of sessions only."""
    rows: dict[int, RowCache] = field(default_factory=dict)
    """Touched by the engine only, so that no pass loses its rows half-way."""
    new_room: dict[int, int] = field(default_factory=dict)
    """Positions that the rows which begin with the next step are allocated for, see `peers/row_memory.py`."""
    waiting: deque[Work] = field(default_factory=deque)
    """Steps in the order of arrival; the engine takes the first. Touched by the work queue only."""
    waiting_size: int = 0
    """What the waiting steps hold, see `Work.size`."""
    passes: dict[PassWork, None] = field(default_factory=dict)
    """Over whole sequences, that wait. Touched by the work queue only."""
    waiting_passes: int = 0
    """Passes over whole sequences that wait or run. Touched by the work queue only."""
    done: int = 0
    """Positions computed so far, of steps and passes. Touched by the engine only."""
    last: int = 0
    """Highest number of a step or pass of the present epoch that is finished."""
    sent_on: bool = False
    """Something was sent to the next hop since `sent_before`."""
    sent_before: int = 0
    """Number of a ping to the next hop, which goes after all that was sent to it of the present epoch."""
    timing: Timing | None = None
    """What the last decode step met here."""
    passed_over: int = 0
    """Passes since its first step could have run."""
    closed: bool = False
    kept: dict[int, PassWork] = field(default_factory=dict)
    """Forward passes whose input waits for a gradient, by number."""
    adapter: Adapter | None = None
    """What the client adds to the blocks. Changed by the engine only."""
    gradient_sum: GradientSum | None = None
    """Touched by the engine only, except when the session ends."""
    adapter_version: int = 0
    adapter_parts: list[AdapterMessage] = field(default_factory=list)
    """Of a version that is still coming in."""
    adapter_bytes: int = 0
    """Accounted for the adapter that the blocks run with."""
    resent: float = 0.0
    """How often its log, or keys and values, were sent once more, less one for every `RESEND_S`."""
    resent_at: float = 0.0

    def count_resent(self, now: float, what: str) -> None:
        """Before much is sent because of a small message.

        Args:
            now: seconds.
            what: was sent, with its verb, as the beginning of a sentence.

        Raises:
            PeerBusy: it was done too often lately.
        """
        resent = max(0.0, self.resent - (now - self.resent_at) / RESEND_S)
        if resent + 1 > MOST_RESENT:
            raise PeerBusy(f"{what} {MOST_RESENT} times at once: ask again in {RESEND_S:.0f} s")
        self.resent, self.resent_at = resent + 1, now

    @property
    def prefix_length(self) -> int:
        """Positions before the first one of each row."""
        return self.adapter.prefix_length if self.adapter is not None else 0


@dataclass(slots=True, eq=False)
class Work:
    """A step on its way through the device, in one or several passes."""

    session: Session
    step: Step
    total: int
    arrived_at: float
    """Seconds of the peer's clock."""
    done: int = 0
    follows: bool = False
    """It came while others of its session waited: as the end of a prompt it waits for those, not for the device."""
    wait_ms: float = 0.0
    """From its arrival until its first pass."""
    compute_ms: float = 0.0
    adapter: Adapter | None = None
    """What it runs with, from its first pass on: its rows were given room for that one's prefix."""
    hidden: torch.Tensor | None = None
    """Decoded input of the present pass, `[positions, hidden]`."""
    outputs: list[bytes] = field(default_factory=list)
    """What goes to the next hop, or from the tail to the client: encoded, pass by pass."""

    @property
    def remaining(self) -> int:
        return self.total - self.done

    @property
    def blocks(self) -> tuple[int, int]:
        return self.session.start, self.session.end

    @property
    def owner(self) -> bytes:
        return self.session.owner

    @property
    def left(self) -> int:
        """Positions that its session has reserved and that come now or later."""
        return self.session.budget - sum(part.start for part in self.step.parts) - self.done

    @property
    def size(self) -> int:
        """What the step occupies while it waits, in positions; a fork counts as one."""
        return self.total + len(self.step.forks or ())

    @property
    def nbytes(self) -> int:
        """Memory that the step takes while it waits."""
        references = len(self.step.parts) + len(self.step.forks or ())
        objects = FORK_BYTES * references + TIMING_BYTES * len(self.step.timings)
        return len(self.step.payload) + MESSAGE_BYTES + objects

    def parts(self, count: int) -> list[Part]:
        """The next `count` positions as parts of rows, each with how many of its last ones the client wants."""
        chosen: list[Part] = []
        skip, left = self.done, count
        for part in self.step.parts:
            if skip >= part.length:
                skip -= part.length
                continue
            taken = min(part.length - skip, left)
            keep = max(0, skip + taken - max(skip, part.length - part.keep))
            chosen.append(Part(part.row, part.start + skip, taken, keep))
            skip = 0
            left -= taken
            if not left:
                break
        return chosen


@dataclass(slots=True, eq=False)
class PassWork:
    """A pass on its way through the device, an adapter to take over, or keys and values to look up."""

    session: Session
    message: Forward | Gradient | AdapterMessage | FetchKV
    source: Connection
    """Where a gradient goes back to."""
    arrived_at: float
    forward: PassWork | None = None
    """Of a backward pass: what it is the way back of."""
    parts: list[AdapterMessage] = field(default_factory=list)
    """Of an adapter."""
    wait_ms: float = 0.0
    compute_ms: float = 0.0
    way: WayBack | None = None
    """What is kept of a forward pass besides its input."""
    way_bytes: int = 0
    """What is accounted for it."""

    @property
    def positions(self) -> int:
        if self.forward is not None:
            return self.forward.positions
        return self.message.positions if isinstance(self.message, Forward) else 1

    @property
    def nbytes(self) -> int:
        """Memory that it takes while it waits, or is kept."""
        if self.parts:
            return sum(ADAPTER_COPIES * len(part.payload) + MESSAGE_BYTES for part in self.parts)
        payload = getattr(self.message, "payload", b"")
        own = len(payload) + MESSAGE_BYTES + TIMING_BYTES * len(getattr(self.message, "timings", ()))
        return own + (self.forward.nbytes if self.forward is not None else 0)
