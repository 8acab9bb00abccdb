"""A session at a hop, its steps and passes on their way through the device, and the rooms of its rows.

Rows are allocated ahead, so that they are not moved at every step, and all together within the session's budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitnet.blocks.kv_cache import FIRST_CAPACITY, SequenceCache
from splitnet.errors import PeerBusy, ProtocolError
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.log import SentLog, fork_rows
from splitnet.wire.messages import Adapter as AdapterMessage
from splitnet.wire.messages import Chunk, FetchKV, Forward, Gradient, Step, Timing

if TYPE_CHECKING:
    import torch

    from splitnet.blocks.adapters import Adapter
    from splitnet.blocks.passes import SavedPass


MESSAGE_BYTES = 2048
"""What a message that is kept takes besides its payload: its objects, and the buffer that it came in."""

TENSOR_BYTES = 1024
"""What a tensor takes besides its numbers."""

TIMING_BYTES = 192
"""What a timing of a hop takes in a message."""

FORK_BYTES = 128
"""What a part or a fork of a step takes."""

AHEAD = 1 / 8
"""Share of the budget that rows may take beyond it. With less of it, rows of a full session are moved more often."""

MOST_RESENT = 10
"""How often a session may have its log, or keys and values, sent at once: more than the routes that a client tries."""

RESEND_S = 10.0
"""Time after which it may once more."""

ADAPTER_COPIES = 2
"""The adapter, and the sum of its gradients."""


class SessionTooLong(ProtocolError):
    """More positions than the model or the session allows."""


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
    reservation: int
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
    rows: dict[int, SequenceCache] = field(default_factory=dict)
    """Touched by the engine only, so that no pass loses its rows half-way."""
    new_room: dict[int, int] = field(default_factory=dict)
    """Positions that the rows which begin with the next step are allocated for, see `prepare_rows`."""
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
        return self.session.reservation - sum(part.start for part in self.step.parts) - self.done

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

    def parts(self, count: int) -> list[Chunk]:
        """The next `count` positions as parts of rows, each with how many of its last ones the client wants."""
        chosen: list[Chunk] = []
        skip, left = self.done, count
        for part in self.step.parts:
            if skip >= part.length:
                skip -= part.length
                continue
            taken = min(part.length - skip, left)
            keep = max(0, skip + taken - max(skip, part.length - part.keep))
            chosen.append(Chunk(part.row, part.start + skip, taken, keep))
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
    way: SavedPass | None = None
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


@dataclass(frozen=True, slots=True)
class _Copy:
    """A row that is to begin as a copy of another."""

    source: SequenceCache
    length: int
    prefix_length: int


def _copy_of(row: SequenceCache | _Copy) -> _Copy:
    return row if isinstance(row, _Copy) else _Copy(row, row.length, row.prefix_length)


def room_for(reservation: int) -> int:
    """Positions that the rows of a session with this budget are allocated for at most, all together."""
    return reservation + int(reservation * AHEAD)


def rows_after(session: Session, step: Step) -> set[int]:
    """The rows of `session` once it has run `step`."""
    kept = session.rows if step.forks is None else (fork.row for fork in step.forks)
    return {*kept, *(part.row for part in step.parts)}


def goes_on(session: Session, step: Step) -> bool:
    """Whether `step` adds to the only row of `session`, where that has room: as decode steps do, nearly always."""
    if step.forks is not None or len(step.parts) != 1 or len(session.rows) != 1:
        return False
    part = step.parts[0]
    row = session.rows.get(part.row)
    if row is None or part.start != row.length:
        return False
    end = part.start + part.length
    return end <= row.room and row.prefix_length + end <= session.reservation


def is_quick(work: Work) -> bool:
    """Whether a step takes as long as its positions: no row is copied or moved, or has some to run once more."""
    session, step = work.session, work.step
    if step.forks is not None:
        return False
    for part in step.parts:
        row = session.rows.get(part.row)
        if row is None:
            if session.rows:  # which may give back what they have ahead
                return False
        elif row.room < part.start + part.length or (row.has_states and min(part.start, row.computed) < row.length):
            return False
    return True


def prepare_rows(session: Session, step: Step) -> None:
    """Forks and crops the rows of `session` for `step`, and gives them room; a step that is refused changes nothing.

    Raises:
        SessionTooLong: the rows would hold more positions than the session has reserved.
        ProtocolError: a fork of a row that does not exist, or a gap before the first position.
    """
    if goes_on(session, step):
        return
    rows: dict[int, SequenceCache | _Copy] = dict(session.rows)
    if step.forks is not None:
        rows = fork_rows(rows, step.forks, _copy_of)
    starts = {part.row: part.start for part in step.parts}
    ends = {row_id: row.prefix_length + row.length for row_id, row in rows.items()}
    for part in step.parts:
        row = rows.get(part.row)
        length, before = (row.length, row.prefix_length) if row is not None else (0, session.prefix_length)
        if part.start > length:
            raise ProtocolError(f"row {part.row} has {length} positions, the step begins at {part.start}")
        ends[part.row] = before + part.start + part.length
    held = sum(ends.values())
    if held > session.reservation:
        raise SessionTooLong(f"the step needs {held} positions, the session has reserved {session.reservation}")
    present = {row_id: row.prefix_length + row.room for row_id, row in rows.items() if not isinstance(row, _Copy)}
    room = shared_room(ends, present, room_for(session.reservation))

    def fit(row_id: int, row: SequenceCache) -> None:
        row.crop(starts.get(row_id, row.length))
        row.room = room[row_id] - row.prefix_length

    copies = {row_id: row for row_id, row in rows.items() if isinstance(row, _Copy)}
    sources = {id(copy.source) for copy in copies.values()}
    # What is dropped or shrinks does so first, so that copies find its memory free.
    session.rows = {row_id: row for row_id, row in rows.items() if not isinstance(row, _Copy)}
    late = {row_id: row for row_id, row in session.rows.items() if id(row) in sources}
    for row_id, row in session.rows.items():
        if row_id not in late:
            fit(row_id, row)
    forked = {
        row_id: copy.source.fork(starts.get(row_id), room[row_id] - copy.prefix_length)
        for row_id, copy in copies.items()
    }
    for row_id, row in late.items():
        fit(row_id, row)
    session.rows |= forked
    session.new_room = {row_id: room[row_id] - session.prefix_length for row_id in starts if row_id not in session.rows}


def shared_room(ends: Mapping[int, int], present: Mapping[int, int], total: int) -> dict[int, int]:
    """How many positions each row is allocated for; within `total`, if the rows' ends are.

    Args:
        ends: by row, where it will end after the step.
        present: by row that exists, what it is allocated for now.
    """
    growing = [row for row, end in ends.items() if end > present.get(row, 0)]
    if not growing:
        return {row: present[row] for row in ends}
    room = {row: present[row] for row in ends if row not in growing}
    spare = total - sum(ends.values())
    free = total - sum(room.values()) - sum(ends[row] for row in growing)
    wanted = {row: max(ends[row], FIRST_CAPACITY - ends[row]) for row in growing}
    if free < min(spare // 2, sum(wanted.values())):
        room = {row: ends[row] for row in room}  # those that do not grow give back what they have ahead
        free = spare
    share = free // len(growing) if not room else free // 2 // len(growing)
    return room | {row: ends[row] + min(wanted[row], share) for row in growing}
