"""Sessions at a hop: their steps and passes, the room of their rows, and what memory and which keys are admitted.

Rows are allocated ahead, so that they are not moved at every step, and all together within the session's reservation.
All memory that clients make a peer take is counted in a `MemoryAccount`: KV memory by the `SessionTable`, waiting steps
by the `WorkQueue`, training by `Training`. In each a key leaves something for the next.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from peers.prefixes import NOWHERE, Page, PrefixStore, Space
from splitnet.blocks.kv_cache import FIRST_CAPACITY, SequenceCache
from splitnet.errors import PeerBusy, ProtocolError
from splitnet.limits import MINUTE_S, Budget, TokenBucket
from splitnet.security.identity import AuthorizedKeys, KeyOptions
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import Adapter as AdapterMessage
from splitnet.wire.messages import Chunk, FetchKV, Forward, Gradient, Step, Timing
from splitnet.wire.sent_log import PAGE, SentLog, fork_rows

if TYPE_CHECKING:
    import torch

    from splitnet.blocks.adapters import Adapter
    from splitnet.blocks.passes import SavedPass


MESSAGE_BYTES = 2048  # of a kept message besides its payload: its objects, and the buffer that it came in
TENSOR_BYTES = 1024  # of a tensor besides its numbers
TIMING_BYTES = 192  # of a timing of a hop in a message
FORK_BYTES = 128  # of a part or a fork of a step
AHEAD = 1 / 8  # share of the reservation that rows may take beyond it; with less, rows of full sessions move more often
MOST_RESENT = 10  # log, or keys and values, sent at once of a session: more than the routes that a client tries
RESEND_S = 10.0  # time after which they are sent once more
ADAPTER_COPIES = 2  # the adapter, and the sum of its gradients

MAX_SESSIONS = 1024
MIN_RESERVATION = 64  # positions that a session reserves at least, so that many tiny sessions are not free
LEASE_S = 10.0  # after its last step a session of a key beyond its share ends if another key wants memory
LONGEST_LEASE_S = 60.0  # and this long after it was opened, even if it makes steps
WANTED_S = 15.0  # a refused key counts as wanting memory: keys beyond their share get no more meanwhile
LOOK_AGAIN_S = 0.25  # a key that was refused this recently is refused without a look at the sessions
SHORTAGE_S = 60.0  # after an allocation failed, less memory is offered
REVOKED = "the owner of this peer does not accept your key any more: use other peers"


class SessionTooLong(ProtocolError):
    """More positions than the model or the session allows."""


@dataclass(slots=True)
class GradientSum:
    """Gradients by an adapter, added up over some passes of an epoch."""

    epoch: int
    since: int
    tensors: dict[str, torch.Tensor]


class Taps(NamedTuple):
    """Where a client wants hidden states: behind blocks of a session here, in rising order."""

    boundaries: tuple[int, ...]
    codec: Codec


class Recalled(NamedTuple):
    """Pages from before with which a row begins, and their labels."""

    row: int
    pages: Sequence[Page]
    labels: Sequence[bytes]

    @property
    def positions(self) -> int:
        return PAGE * len(self.pages)


@dataclass(slots=True)
class Filling:
    """A row that is being filled with pages. done: how many are in it. work: the step that waits for it, once that has
    come. broken: a page did not fit."""

    row: SequenceCache
    recalled: Recalled
    done: int = 0
    work: Work | None = None
    broken: bool = False

    @property
    def goes_on(self) -> bool:
        return not self.broken and self.done < len(self.recalled.pages)

    def begins(self, recalled: Recalled) -> bool:
        """Whether the row has nothing but the first of these pages."""
        pages = zip(self.recalled.pages[: self.done], recalled.pages, strict=False)
        fits = not self.broken and self.done <= len(recalled.pages)
        return fits and all(own.name == other.name for own, other in pages)


class RowPages(NamedTuple):
    """Where pages of a row are stored, as all of it was computed for that; and the names of the first ones."""

    space: Space
    names: list[bytes]


@dataclass(slots=True, eq=False)
class Session:
    """One client's rows along this hop. Steps are accepted from the CURVE keys `owner` and `previous` alone."""

    id: bytes
    owner: bytes
    reply_to: Connection
    epoch: int
    start: int
    end: int
    reservation: int  # positions reserved, over all rows
    codec: Codec
    previous: bytes | None
    next: Endpoint | None
    log: SentLog
    used_at: float  # seconds of the peer's clock
    weights: str = ""  # what `Opened` says that they are held as
    taps: Taps | None = None
    space: Space = NOWHERE  # where pages of its rows are stored
    labelled: bool = False  # its steps have labels of pages
    reachable: bool | None = None  # its next hop, once that is known, while pages are looked for
    recall_until: float | None = None  # pages are looked for, and it is not said to be open before that
    recalled: Recalled | None = None  # taken by the engine with the first step
    opened_at: float = 0.0
    stepped_at: float = 0.0  # when its last step or pass came
    last: int = 0  # highest number of a step or pass of the present epoch that is finished
    sent_on: bool = False  # something was sent to the next hop since `sent_before`
    sent_before: int = 0  # number of a ping to the next hop, sent after everything of the present epoch
    timing: Timing | None = None  # what the last decode step met here
    closed: bool = False
    resent: float = 0.0  # how often its log, or keys and values, were sent once more, less one for every `RESEND_S`
    resent_at: float = 0.0

    # Touched by the table of sessions only.
    reserved_rows: int = 0  # rows whose states have a place

    # Touched by the work queue only.
    waiting: deque[Work] = field(default_factory=deque)  # steps in the order of arrival; the engine takes the first
    waiting_size: int = 0  # what the waiting steps hold, see `Work.size`
    passes: dict[PassWork, None] = field(default_factory=dict)  # passes over whole sequences that wait
    waiting_passes: int = 0  # and those that wait or run
    passed_over: int = 0  # passes since its first step could have run

    # Touched by the engine only, so that no pass loses its rows half-way.
    rows: dict[int, SequenceCache] = field(default_factory=dict)
    pages: dict[int, RowPages] = field(default_factory=dict[int, RowPages])  # of rows
    filling: Filling | None = None  # the row that is to take the place of all others
    new_room: dict[int, int] = field(default_factory=dict)  # positions for new rows of the next step
    done: int = 0  # positions computed so far, of steps and passes
    adapter: Adapter | None = None  # what the client adds to the blocks
    adapter_version: int = 0
    gradient_sum: GradientSum | None = None  # also dropped when the session ends

    # Of training.
    kept: dict[int, PassWork] = field(default_factory=dict)  # by number: forward passes that wait for a gradient
    adapter_parts: list[AdapterMessage] = field(default_factory=list)  # of a version that is still coming in
    adapter_bytes: int = 0  # accounted for the adapter that the blocks run with

    def count_resent(self, now: float, what: str) -> None:
        """Call it before much is sent because of a small message; `what` begins the text of PeerBusy, if too often."""
        resent = max(0.0, self.resent - (now - self.resent_at) / RESEND_S)
        if resent + 1 > MOST_RESENT:
            raise PeerBusy(f"{what} {MOST_RESENT} times at once: ask again in {RESEND_S:.0f} s")
        self.resent, self.resent_at = resent + 1, now

    @property
    def prefix_length(self) -> int:
        return self.adapter.prefix_length if self.adapter is not None else 0


@dataclass(slots=True, eq=False)
class Work:
    """A step on its way through the device, in one or several passes."""

    session: Session
    step: Step
    total: int
    arrived_at: float  # seconds of the peer's clock
    done: int = 0
    follows: bool = False  # it came while others of its session waited, so it does not wait for the device alone
    wait_ms: float = 0.0  # from its arrival until its first pass
    compute_ms: float = 0.0
    adapter: Adapter | None = None  # what it runs with: its rows were given room for that one's prefix
    hidden: torch.Tensor | None = None  # decoded input of the present pass, `[positions, hidden]`
    outputs: list[bytes] = field(default_factory=list)  # encoded, pass by pass, for the next hop or the client
    taps: Taps | None = None  # of the session when the step came; None: it wants no hidden states of this step
    taps_nbytes: int = 0  # of all of them
    tapped: dict[int, list[bytes]] = field(default_factory=dict[int, list[bytes]])  # by boundary, pass by pass
    space: Space = NOWHERE  # of the session when the step came

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
        """Positions of the reservation that come now or later."""
        return self.session.reservation - sum(part.start for part in self.step.parts) - self.done

    @property
    def size(self) -> int:
        """What the step occupies while it waits, in positions; a fork counts as one."""
        return self.total + len(self.step.forks or ())

    @property
    def nbytes(self) -> int:
        references = len(self.step.parts) + len(self.step.forks or ())
        objects = FORK_BYTES * references + TIMING_BYTES * len(self.step.timings)
        return len(self.step.payload) + MESSAGE_BYTES + objects + self.taps_nbytes

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
    source: Connection  # where a gradient goes back to
    arrived_at: float
    forward: PassWork | None = None  # of a backward pass: what it is the way back of
    parts: list[AdapterMessage] = field(default_factory=list)  # of an adapter
    wait_ms: float = 0.0
    compute_ms: float = 0.0
    way: SavedPass | None = None  # what is kept of a forward pass besides its input
    way_bytes: int = 0  # what is accounted for it

    @property
    def positions(self) -> int:
        if self.forward is not None:
            return self.forward.positions
        return self.message.positions if isinstance(self.message, Forward) else 1

    @property
    def nbytes(self) -> int:
        if self.parts:
            return sum(ADAPTER_COPIES * len(part.payload) + MESSAGE_BYTES for part in self.parts)
        payload = getattr(self.message, "payload", b"")
        own = len(payload) + MESSAGE_BYTES + TIMING_BYTES * len(getattr(self.message, "timings", ()))
        return own + (self.forward.nbytes if self.forward is not None else 0)


@dataclass(frozen=True, slots=True)
class _Copy:
    source: SequenceCache
    length: int
    prefix_length: int


def _copy_of(row: SequenceCache | _Copy) -> _Copy:
    return row if isinstance(row, _Copy) else _Copy(row, row.length, row.prefix_length)


def room_for(reservation: int) -> int:
    """Positions that all rows of a session with this reservation are allocated for at most."""
    return reservation + int(reservation * AHEAD)


def rows_after(session: Session, step: Step) -> set[int]:
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

    Raises SessionTooLong if the rows would hold more positions than the session has reserved, and ProtocolError for a
    fork of a row that does not exist, or a gap before the first position.
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

    ends: of rows after the step. present: what rows that exist are allocated for now.
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


class Purpose(StrEnum):
    """What memory is for."""

    POSITIONS = "positions"  # keys, values and logs, for all positions that a session has reserved
    ROWS = "rows"  # what rows take besides their positions: tensors, and states with copies of them
    STEPS = "steps"  # steps that wait for the device
    PASSES = "passes"  # passes that wait, and inputs that gradients may come for
    GRAPHS = "graphs"  # of passes that gradients may come for; dropped where anything else needs the memory
    ADAPTERS = "adapters"  # adapters, with parts that come in and sums of gradients


class MemoryAccount(Budget):
    """Bytes of one kind of memory by key, session and purpose; a key gets what `Budget` says. Its user has a lock.

    refusal: its beginning, before the bytes. advice: what a refused client can do, as a clause. most: as of `Budget`,
    for a key, a session of it, and a purpose of that.
    """

    def __init__(self, limit: int, refusal: str, advice: str, most: tuple[int | None, ...] = ()) -> None:
        super().__init__(limit, most)
        self._refusal, self._advice = refusal, advice

    def used_for(self, purpose: Purpose) -> int:
        return sum(nbytes for account, nbytes in self.accounts() if account[2:] == (purpose,))

    def take(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """Call it before allocating. Raises PeerBusy, and takes nothing, if too little would be left for other keys."""
        if not self.reserve(nbytes, session.owner, session, purpose):
            held = self.held(session.owner)
            shared = f"; your key has {held}, and may have as much as is left for others" if nbytes <= self.free else ""
            raise PeerBusy(
                f"{self._refusal} {nbytes} bytes: {self.free} of {self.limit} are free{shared}; {self._advice}"
            )

    def give_back(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """Call it after dropping something; of a session that has ended nothing is left."""
        account = session.owner, session, purpose
        self.release(min(nbytes, self.held(*account)), *account)

    def end(self, session: Session) -> None:
        for purpose in Purpose:
            self.give_back(session, purpose, self.used)


@dataclass(eq=False)
class SessionTable:
    """Admission by KV memory: what is reserved never exceeds `kv_bytes`.

    One key may have all of it until another wants some; then each has a share by its weight. To make room for a key
    within its share, sessions of keys beyond theirs end, without a step for `LEASE_S`, or after `LONGEST_LEASE_S`.
    """

    kv_bytes: int  # for keys and values, states, and logs of what was sent on
    _: KW_ONLY
    idle_s: float = 600.0  # after this long without a message a session is dropped
    position_bytes: float = 1.0  # of keys and values
    row_bytes: int = 0  # what a row takes besides its positions
    usual_log_bytes: int = 0  # what the log of a position takes with the codec that most sessions have
    ahead: float = 0.0  # share of its reservation that a session's rows and logs may take beyond it, as allocated ahead
    num_blocks: int = 0  # of the model; sessions that end there keep no log
    keys: AuthorizedKeys = field(default_factory=lambda: AuthorizedKeys(None))
    prefixes: PrefixStore | None = None  # which has the memory that no session has reserved

    def __post_init__(self) -> None:
        # What a key may have is found by this class, not by `Budget`.
        limits = (self.kv_bytes,) * 3
        self.memory = MemoryAccount(self.kv_bytes, "no KV memory for", "try with fewer positions", limits)
        self._usual_bytes = (self.position_bytes + self.usual_log_bytes) * (1 + self.ahead)
        self._sessions: dict[bytes, Session] = {}
        self.get = self._sessions.get
        self._count: dict[bytes, int] = {}  # sessions by key
        self._wanted: dict[bytes, float] = {}  # by key: when it was refused
        self._ended = threading.Condition()
        self._short_until = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def capacity(self) -> int:
        """Positions that one session of one row could reserve if there were no others, with the usual codec."""
        return max(0, int((self.memory.limit - self.row_bytes) / self._usual_bytes))

    @property
    def free_positions(self) -> int:
        """Positions that a new session may reserve, with the usual codec."""
        return max(0, int((self.memory.free - self.row_bytes) / self._usual_bytes))

    def make_room(self, session: Session, reservation: int, now: float) -> list[Session]:
        """Ends sessions of keys that have more than their share, if that lets `session` reserve so many positions.

        session: not admitted yet, or with a smaller reservation. Returns those that were ended.
        """
        key, is_new = session.owner, session.id not in self._sessions
        wanted = self._new_bytes(session) if is_new else self._bytes_of(session, reservation - session.reservation)
        short = wanted - self.memory.free
        crowded = is_new and len(self._sessions) >= MAX_SESSIONS
        if (short <= 0 and not crowded) or now - self._wanted.get(key, -LOOK_AGAIN_S) < LOOK_AGAIN_S:
            return []
        weights = self._weights(key, now)
        share, places = self._share(key, weights)
        most = self.keys.options_of(key).kv
        if self.memory.held(key) + wanted > (share if most is None else min(share, most)):
            return []
        if is_new and self._count.get(key, 0) >= places:
            return []
        ending: list[Session] = []
        left = {owner: self.memory.held(owner) for owner in self._count}
        for other in sorted(self._sessions.values(), key=lambda other: other.stepped_at):
            if short <= 0 and (not crowded or ending):
                break
            lease_until = min(other.stepped_at + LEASE_S, other.opened_at + LONGEST_LEASE_S)
            if other.owner != key and lease_until <= now:
                share, places = self._share(other.owner, weights)
                if left[other.owner] > share or (crowded and self._count[other.owner] > places):
                    left[other.owner] -= self.memory.held(other.owner, other)
                    short -= self.memory.held(other.owner, other)
                    ending.append(other)
        if short > 0 or (crowded and not ending):
            return []
        for other in ending:
            self.remove(other)
        return ending

    def add(self, session: Session) -> None:
        """Admits a session, with at least `MIN_RESERVATION` positions.

        Raises PeerBusy if its reservation does not fit, or is more than its key may have now.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            text = f"this peer holds {MAX_SESSIONS} sessions already"
            raise PeerBusy(f"{text}; {self._note_refused(session.owner, 0, session.used_at)}")
        session.reservation = self._reservation(session)
        self._check_share(session.owner, self._new_bytes(session), session.used_at)
        try:
            self._take(session, Purpose.POSITIONS, self._bytes_of(session, session.reservation))
            self._take(session, Purpose.ROWS, self.row_bytes)
        except PeerBusy:
            self.memory.end(session)
            raise
        session.reserved_rows = 1
        session.opened_at = session.stepped_at = session.used_at
        self._sessions[session.id] = session
        self._count[session.owner] = self._count.get(session.owner, 0) + 1
        self._wanted.pop(session.owner, None)

    def hold_rows(self, session: Session, rows: int) -> None:
        """Reserves what so many rows take besides their positions. Raises PeerBusy, changing nothing, if too much."""
        more = max(1, rows) - session.reserved_rows
        if not more or session.closed:
            return
        if more > 0:
            self._take(session, Purpose.ROWS, more * self.row_bytes)
        else:
            self.memory.give_back(session, Purpose.ROWS, -more * self.row_bytes)
        session.reserved_rows += more

    def resize(self, session: Session, reservation: int) -> None:
        """Raises what a session has reserved; it never shrinks. Raises PeerBusy as `add` does."""
        if reservation > session.reservation:
            more = self._bytes_of(session, reservation - session.reservation)
            self._check_share(session.owner, more, session.used_at)
            self._take(session, Purpose.POSITIONS, more)
            session.reservation = reservation

    def remove(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is not None:
            self._count[session.owner] -= 1
            if not self._count[session.owner]:
                del self._count[session.owner]
            self.memory.end(session)
            session.closed = True
            with self._ended:
                self._ended.notify_all()

    def offer_less(self, session: Session, now: float) -> None:
        """For `SHORTAGE_S` the table offers the memory of other sessions and half of the rest, as the system has less
        memory than it promised to this session."""
        others = self.memory.used - self.memory.held(session.owner, session)
        self.memory.limit = others + (self.memory.limit - others) // 2
        self._short_until = now + SHORTAGE_S
        if self.prefixes is not None:
            self.prefixes.shrink()

    def wait_for_end(self, timeout_s: float) -> bool:
        with self._ended:
            return self._ended.wait(timeout_s)

    def expire(self, now: float) -> list[Session]:
        idle = [session for session in self._sessions.values() if now - session.used_at > self.idle_s]
        for session in idle:
            self.remove(session)
        self._wanted = self._wanting(now)
        if now > self._short_until:
            self.memory.limit = self.kv_bytes
        return idle

    def _reservation(self, session: Session) -> int:
        least = int((self.memory.limit - self.row_bytes) / self._cost_of(session))
        return max(session.reservation, min(MIN_RESERVATION, max(1, least)))

    def _new_bytes(self, session: Session) -> int:
        return self._bytes_of(session, self._reservation(session)) + self.row_bytes

    def _bytes_of(self, session: Session, positions: int) -> int:
        return math.ceil(positions * self._cost_of(session))

    def _cost_of(self, session: Session) -> float:
        """Bytes of a position of its reservation."""
        log = session.log.bytes_per_position if session.end < self.num_blocks else 0
        return (self.position_bytes + log) * (1 + self.ahead)

    def _take(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        try:
            self.memory.take(session, purpose, nbytes)
        except PeerBusy as error:
            raise PeerBusy(f"{error}; {self._note_refused(session.owner, nbytes, session.used_at)}") from None
        if self.prefixes is not None:
            self.prefixes.shrink()

    def _wanting(self, now: float) -> dict[bytes, float]:
        """The keys that want memory, and when they were refused."""
        return {key: at for key, at in self._wanted.items() if now - at <= WANTED_S}

    def _weights(self, key: bytes, now: float) -> float:
        """Sum of a key's weight and of those that have memory or want some."""
        return sum(self.keys.options_of(each).weight for each in {key, *self._count, *self._wanting(now)})

    def _share(self, key: bytes, weights: float) -> tuple[float, float]:
        """Bytes and sessions that a key may have; `weights`: sum of all."""
        part = self.keys.options_of(key).weight / weights
        return part * self.memory.limit, max(1.0, part * MAX_SESSIONS)

    def _check_share(self, key: bytes, nbytes: int, now: float) -> None:
        held = self.memory.held(key)
        most = self.keys.options_of(key).kv
        if most is not None and held + nbytes > most:
            raise PeerBusy(
                f"your key may reserve {most} bytes of KV memory at this peer, and has {held}: close sessions, or ask "
                "the owner for a larger kv="
            )
        others = [at + WANTED_S - now for other, at in self._wanting(now).items() if other != key]
        if others and held + nbytes > self._share(key, self._weights(key, now))[0]:
            raise PeerBusy(
                f"others wait for KV memory of this peer, and your key has {held} bytes already: close sessions, or "
                f"come back in {max(others):.0f} s"
            )

    def _note_refused(self, key: bytes, nbytes: int, now: float) -> str:
        """Remembers that a key wants memory; returns what it can do."""
        share, places = self._share(key, self._weights(key, now))
        within = self.memory.held(key) + nbytes <= share and self._count.get(key, 0) < places
        if within and now - self._wanted.get(key, -LOOK_AGAIN_S) >= LOOK_AGAIN_S and len(self._wanted) < MAX_SESSIONS:
            self._wanted[key] = now
        when = f"come back in {LEASE_S:.0f} s, when sessions without steps make room" if within else "close sessions"
        return f"{when}, or use other peers"


class KeyPolicy:
    """Holds CURVE keys to what the owner of the peer grants them. `keys`: None: any key, all alike."""

    def __init__(self, keys: AuthorizedKeys | None = None) -> None:
        self.keys = keys or AuthorizedKeys(None)
        self._spent: dict[bytes, TokenBucket] = {}  # by key

    def weight(self, key: bytes) -> float:
        return self.keys.options_of(key).weight

    def check_training(self, key: bytes) -> None:
        """Raises PeerBusy if the owner of this peer does not let the key train."""
        if not self._granted(key).train:
            raise PeerBusy("the owner of this peer does not let your key train (train=no): train through other peers")

    def spend(self, key: bytes, positions: int, now: float) -> None:
        """Takes off positions that are to be computed; they come back evenly over a minute.

        Raises PeerBusy if those of the last minute are used up, or the key is not accepted any more.
        """
        per_minute = self._granted(key).tokens_per_minute
        if per_minute is None:
            return
        bucket = self._spent.get(key) or TokenBucket()
        if wait_s := bucket.wait_s(per_minute, now):
            raise PeerBusy(
                f"your key has used the {per_minute} tokens per minute that the owner of this peer grants it: "
                f"come back in {wait_s} s"
            )
        if positions:
            bucket.spend(positions, per_minute, now)
            self._spent[key] = bucket
        if len(self._spent) > 1024:
            self._spent = {other: used for other, used in self._spent.items() if now - used.at < MINUTE_S}

    def _granted(self, key: bytes) -> KeyOptions:
        if not self.keys.allows(key):
            raise PeerBusy(REVOKED)
        return self.keys.options_of(key)
