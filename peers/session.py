"""A session at a hop, and its steps on their way through the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitnet.net.codecs import Codec
from splitnet.net.endpoints import Connection, Endpoint
from splitnet.net.messages import Adapter as AdapterMessage
from splitnet.net.messages import FetchKV, Forward, Gradient, Part, Step, Timing
from splitnet.net.sent_log import SentLog

if TYPE_CHECKING:
    import torch

    from splitnet.model.adapters import Adapter
    from splitnet.model.kv_cache import RowCache


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
    opened_at: float = 0.0
    stepped_at: float = 0.0
    """When it was opened, and when its last step or pass came. Of the peer's clock."""
    reserved_rows: int = 0
    """Rows whose states have a place. Touched by the table of sessions only."""
    rows: dict[int, RowCache] = field(default_factory=dict)
    """Touched by the engine's thread only, so that no pass loses its rows half-way."""
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
    """Positions computed so far, of steps and passes. Touched by the engine's thread only."""
    last: int = 0
    """Highest number of a step or pass of the present epoch that is finished."""
    timing: Timing | None = None
    """What the last decode step met here."""
    passed_over: int = 0
    """Passes since its first step could have run."""
    closed: bool = False
    kept: dict[int, PassWork] = field(default_factory=dict)
    """Forward passes whose input waits for a gradient, by number."""
    adapter: Adapter | None = None
    """What the client adds to the blocks. Changed by the engine's thread only."""
    gradient_sum: GradientSum | None = None
    """Touched by the engine's thread only, except when the session ends."""
    adapter_version: int = 0
    adapter_parts: list[AdapterMessage] = field(default_factory=list)
    """Of a version that is still coming in."""
    adapter_bytes: int = 0
    training_bytes: int = 0
    """What the session takes of the peer's memory for training."""

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
    wait_ms: float = 0.0
    """From its arrival until its first pass."""
    compute_ms: float = 0.0
    hidden: torch.Tensor | None = None
    """Decoded input, `[positions, hidden]`."""
    outputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        return self.total - self.done

    @property
    def blocks(self) -> tuple[int, int]:
        return self.session.start, self.session.end

    @property
    def size(self) -> int:
        """What the step occupies while it waits, in positions; a fork counts as one."""
        return self.total + len(self.step.forks or ())

    def parts(self, count: int) -> list[Part]:
        """The next `count` positions as parts of rows."""
        chosen: list[Part] = []
        skip, left = self.done, count
        for part in self.step.parts:
            if skip >= part.length:
                skip -= part.length
                continue
            taken = min(part.length - skip, left)
            chosen.append(Part(part.row, part.start + skip, taken, 0))
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
    forward: Forward | None = None
    """Of a backward pass: what it is the way back of."""
    wait_ms: float = 0.0
    compute_ms: float = 0.0

    @property
    def positions(self) -> int:
        forward = self.message if isinstance(self.message, Forward) else self.forward
        return forward.positions if forward is not None else 1
