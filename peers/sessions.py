"""Sessions at a hop: the state of a session, its steps and passes, and which sessions and keys a peer admits.

All memory that clients make a peer allocate is counted in a `MemoryAccount`: KV memory by the `SessionTable`, waiting
steps by the `WorkQueue`, training by `Training`. A `Budget` keeps one key from taking all memory of an account. The KV
memory of a `SessionTable` is an exception: one key may reserve all of it until another key wants some.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from peers.prefixes import NOWHERE, Page, PageNamespace, PrefixStore
from splitnet.errors import PeerBusy, ProtocolError
from splitnet.limits import MINUTE_S, Budget, TokenBucket
from splitnet.security.identity import AuthorizedKeys, KeyOptions
from splitnet.wire.block_inputs import end_of_group, groups_of
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import Adapter as AdapterMessage
from splitnet.wire.messages import Chunk, FetchKV, Forward, Gradient, ReadImages, Step, Timing
from splitnet.wire.receipts import RECORD
from splitnet.wire.sent_log import PAGE, SentLog

if TYPE_CHECKING:
    import torch

    from splitnet.blocks.adapters import AdapterTensors
    from splitnet.blocks.block_inputs import PositionInputs
    from splitnet.blocks.kv_cache import SequenceCache
    from splitnet.blocks.passes import SavedGraph


MESSAGE_BYTES = 2048  # memory of a waiting message in addition to its payload: Python objects and a buffer for frames
TENSOR_BYTES = 1024  # memory of a tensor in addition to its numbers
TIMING_BYTES = 192  # memory of a hop's timing in a message
FORK_BYTES = 128  # memory of a chunk or a fork in a step
# maximum burst of replays and answers to `FetchKV` in a session; larger than the number of routes that a client tries
MOST_RESENT = 10
RESEND_S = 10.0  # seconds after which a session may have one more replay or answer
ADAPTER_COPIES = 2  # an adapter takes its size this many times: once for itself, once for the sum of its gradients

MAX_SESSIONS = 1024
MIN_RESERVATION = 64  # minimum number of positions that a session reserves, so that many tiny sessions also cost memory
LEASE_S = 10.0  # a session of a key beyond its share ends this long after its last step if another key wants memory
LONGEST_LEASE_S = 60.0  # the same session ends this long after it was opened, even if it makes steps
WANTED_S = 15.0  # for this time a refused key counts as wanting memory, and keys beyond their share get no more memory
LOOK_AGAIN_S = 0.25  # a key that was refused this recently is refused again without a search through the sessions
SHORTAGE_S = 60.0  # for this time after a failed allocation the peer offers less memory
REVOKED = "the owner of this peer does not accept your key any more: use other peers"


class SessionTooLong(ProtocolError):
    """More positions than the model or the session allows."""


class GradientSum(NamedTuple):
    """Gradients with respect to an adapter, added up over some passes of an epoch."""

    epoch: int
    since: int
    tensors: dict[str, torch.Tensor]


class Taps(NamedTuple):
    """The boundaries whose hidden states a client wants, in rising order, and the codec of these states."""

    boundaries: tuple[int, ...]
    codec: Codec


class PrefixHit(NamedTuple):
    """Stored pages with which a row can begin, and their labels."""

    row: int
    pages: Sequence[Page]
    labels: Sequence[bytes]

    @property
    def positions(self) -> int:
        return PAGE * len(self.pages)


@dataclass(slots=True)
class PrefixLoad:
    """A KV cache that is being filled with stored pages."""

    cache: SequenceCache
    hit: PrefixHit
    done: int = 0  # number of loaded pages
    work: Work | None = None  # the step that waits for the row; None: it has not come yet
    broken: bool = False  # a page did not fit

    @property
    def is_unfinished(self) -> bool:
        return not self.broken and self.done < len(self.hit.pages)

    def is_start_of(self, hit: PrefixHit) -> bool:
        """Whether the loaded pages are the first pages of `hit`."""
        pages = zip(self.hit.pages[: self.done], hit.pages, strict=False)
        fits = not self.broken and self.done <= len(hit.pages)
        return fits and all(own.name == other.name for own, other in pages)


class RowPages(NamedTuple):
    """The namespace for which all positions of a row were computed, and the names of the row's first pages."""

    namespace: PageNamespace
    names: list[bytes]


@dataclass(slots=True)
class RouteState:
    """The hops before and after this one. Owner: `peers.service`, with `peers.next_hop` and `peers.hop_outputs`."""

    previous: bytes | None = None  # CURVE key of the previous hop, which sends steps as the client does
    weights: str = ""  # the weight format for `Opened`; empty: the client did not ask for it
    taps: Taps | None = None
    labelled: bool = False  # the client's steps have labels of pages
    next_reachable: bool | None = None  # None: not known yet
    # latest time until which `Opened` waits for the look-up of stored pages; None: no look-up is awaited
    lookup_until: float | None = None
    last: int = 0  # highest number of a finished step or pass of this epoch
    sent_on: bool = False  # a message was sent to the next hop after the ping `sent_before`
    # number of this session's latest ping to the next hop; when this ping is answered, all messages sent before it have
    # arrived
    sent_before: int = 0
    timing: Timing | None = None  # of the last decode step at this hop


@dataclass(slots=True)
class RowState:
    """The rows of a session. Owner: `peers.rows`; only the engine's thread changes caches, pages, load and room."""

    caches: dict[int, SequenceCache] = field(default_factory=dict)  # by row
    pages: dict[int, RowPages] = field(default_factory=dict[int, RowPages])  # by row
    new_room: dict[int, int] = field(default_factory=dict)  # positions to allocate for new rows of the next step
    hit: PrefixHit | None = None  # found when the session was opened; taken by the first step
    # a cache that is being filled with the pages of `hit`; it then becomes the only row of the session
    load: PrefixLoad | None = None


@dataclass(slots=True)
class QueueState:
    """The waiting work of a session. Owner: `peers.queue`."""

    steps: deque[Work] = field(default_factory=deque)  # in the order of arrival; the engine takes the first
    passes: dict[PassWork, None] = field(default_factory=dict)  # passes over whole sequences in the queue
    pass_count: int = 0  # passes in the queue and on the device
    passed_over: int = 0  # passes of others since the session's first step was ready


@dataclass(slots=True)
class TrainingState:
    """What a session keeps for training. Owner: `peers.training_service`."""

    kept: dict[int, PassWork] = field(default_factory=dict)  # by number: forward passes that a gradient may follow
    adapter_version: int = 0
    adapter_parts: list[AdapterMessage] = field(default_factory=list)  # received parts of an incomplete version
    adapter_bytes: int = 0  # accounted for the adapter in use
    gradient_sum: GradientSum | None = None


@dataclass(slots=True, eq=False)
class HopSession:
    """A client's session at this hop.

    Every module may read these fields; one module writes each. A part, whose name ends in `_state`, is for its owner
    alone (`tests/unit/test_architecture.py`).
    """

    id: bytes
    owner: bytes  # CURVE key of the client
    reply_to: Connection  # of the client
    epoch: int
    start: int
    end: int
    reservation: int  # positions reserved, over all rows
    codec: Codec
    next: Endpoint | None
    log: SentLog  # the outputs of the rows' positions at the boundary `end`; empty at the tail
    used_at: float  # time of the last message, in seconds of the peer's clock
    _: KW_ONLY
    opened_at: float = 0.0
    stepped_at: float = 0.0  # time of the last step or pass
    reserved_rows: int = 0  # rows that have memory for their states
    waiting_size: int = 0  # size of all waiting steps, see `Work.size`
    done: int = 0  # number of positions computed so far, of steps and passes
    adapter: AdapterTensors | None = None  # the client's parameters for these blocks
    namespace: PageNamespace = NOWHERE  # namespace of the pages that new rows leave
    reads_inputs: bool = False  # a step had block inputs
    digests: SentLog = field(default_factory=lambda: SentLog(0, RECORD))  # see `splitnet.wire.receipts`
    closed: bool = False
    resent: float = 0.0  # number of replays and answers to `FetchKV`, less one for every `RESEND_S` that passed
    resent_at: float = 0.0
    route_state: RouteState = field(default_factory=RouteState)
    row_state: RowState = field(default_factory=RowState)
    queue_state: QueueState = field(default_factory=QueueState)
    training_state: TrainingState = field(default_factory=TrainingState)

    def count_resent(self, now: float, what: str) -> None:
        """Counts a large answer to a small message. Raises PeerBusy, with a text that begins with `what`: there were
        too many such answers."""
        resent = max(0.0, self.resent - (now - self.resent_at) / RESEND_S)
        if resent + 1 > MOST_RESENT:
            raise PeerBusy(f"{what} {MOST_RESENT} times at once: ask again in {RESEND_S:.0f} s")
        self.resent, self.resent_at = resent + 1, now

    @property
    def prefix_length(self) -> int:
        """Positions of the adapter's trained prefix."""
        return self.adapter.prefix_length if self.adapter is not None else 0


@dataclass(slots=True, eq=False)
class Work:
    """A step at this hop: it waits, and is computed in one or several passes."""

    session: HopSession
    step: Step
    total: int  # positions
    arrived_at: float  # seconds of the peer's clock
    done: int = 0  # number of computed positions
    # Whether this step arrived while another step of its session waited; then the device alone does not explain the
    # wait.
    follows: bool = False
    wait_ms: float = 0.0  # from its arrival until its first pass
    compute_ms: float = 0.0
    # Adapter of all passes of the step: its rows have room for this adapter's prefix.
    adapter: AdapterTensors | None = None
    hidden: torch.Tensor | None = None  # decoded input of the present pass, `[positions, hidden]`
    inputs: Sequence[PositionInputs] = ()  # decoded block inputs of the present pass, for each of its chunks
    outputs: list[bytes] = field(default_factory=list)  # encoded, one for each pass, for the next hop or the client
    taps: Taps | None = None  # of the session when the step arrived; None: the client wants no hidden states
    taps_nbytes: int = 0  # of all hidden states that the client wants of the step
    tapped: dict[int, list[bytes]] = field(default_factory=dict[int, list[bytes]])  # by boundary, one for each pass
    namespace: PageNamespace = NOWHERE  # of the session when the step arrived

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
    def remaining_reservation(self) -> int:
        """Positions of the reservation that are not computed yet."""
        return self.session.reservation - sum(part.start for part in self.step.parts) - self.done

    @property
    def size(self) -> int:
        """The number of positions that a waiting step counts as; each fork counts as one position."""
        return self.total + len(self.step.forks or ())

    @property
    def nbytes(self) -> int:
        references = len(self.step.parts) + len(self.step.forks or ())
        objects = FORK_BYTES * references + TIMING_BYTES * len(self.step.timings)
        return len(self.step.payload) + MESSAGE_BYTES + objects + self.taps_nbytes

    def whole_groups(self, count: int) -> int:
        """The number of the next positions, at least `count`, that cut no group of positions."""
        groups = groups_of(self.step) if self.step.inputs else []
        return end_of_group(groups.__getitem__, self.done + count, self.total) - self.done if groups else count

    def parts(self, count: int) -> list[Chunk]:
        """The next `count` positions as chunks of rows, each with the number of its last positions to return."""
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
    """A forward or backward pass at this hop, an adapter to load, images to read, or a request for keys and values."""

    session: HopSession
    message: Forward | Gradient | AdapterMessage | FetchKV | ReadImages
    source: Connection  # the sender of the forward pass or message; the gradient is sent back to it
    arrived_at: float
    forward: PassWork | None = None  # for a backward pass: its forward pass
    parts: list[AdapterMessage] = field(default_factory=list)  # of an adapter
    wait_ms: float = 0.0
    compute_ms: float = 0.0
    graph: SavedGraph | None = None  # of a forward pass, besides its input
    graph_bytes: int = 0  # accounted for the graph
    features: int = 1  # of the images to read

    @property
    def positions(self) -> int:
        if self.forward is not None:
            return self.forward.positions
        return self.message.positions if isinstance(self.message, Forward) else self.features

    @property
    def nbytes(self) -> int:
        if self.parts:
            return sum(ADAPTER_COPIES * len(part.payload) + MESSAGE_BYTES for part in self.parts)
        payload = getattr(self.message, "payload", b"")
        own = len(payload) + MESSAGE_BYTES + TIMING_BYTES * len(getattr(self.message, "timings", ()))
        return own + (self.forward.nbytes if self.forward is not None else 0)


class MemoryPurpose(StrEnum):
    """The uses of memory."""

    POSITIONS = "positions"  # keys, values and logs of all positions that a session has reserved
    ROWS = "rows"  # what a row needs in addition to its positions: tensors, states and copies of states
    STEPS = "steps"  # steps that wait for the device
    PASSES = "passes"  # passes that wait, and inputs of forward passes that a gradient may follow
    GRAPHS = "graphs"  # of forward passes that a gradient may follow; dropped when another use needs the memory
    ADAPTERS = "adapters"  # adapters, received parts of adapters, and sums of gradients


class MemoryAccount(Budget):
    """Counts bytes of one kind of memory, by key, session and purpose, within the limits of `Budget`. Callers hold a
    lock.

    refusal: the beginning of the error message, up to the number of requested bytes. advice: what a refused client can
    do, as a clause. most: as in `Budget`, for the levels key, session and purpose.
    """

    def __init__(self, limit: int, refusal: str, advice: str, most: tuple[int | None, ...] = ()) -> None:
        super().__init__(limit, most)
        self._refusal, self._advice = refusal, advice

    def used_for(self, purpose: MemoryPurpose) -> int:
        return sum(nbytes for account, nbytes in self.accounts() if account[2:] == (purpose,))

    def take_memory(self, session: HopSession, purpose: MemoryPurpose, nbytes: int) -> None:
        """Counts bytes before they are allocated. Raises PeerBusy and counts nothing if the bytes do not fit, or if too
        little would be left for other keys."""
        if not self.reserve(nbytes, session.owner, session, purpose):
            held = self.held_bytes(session.owner)
            shared = f"; your key has {held}, and may have as much as is left for others" if nbytes <= self.free else ""
            raise PeerBusy(
                f"{self._refusal} {nbytes} bytes: {self.free} of {self.limit} are free{shared}; {self._advice}"
            )

    def give_back(self, session: HopSession, purpose: MemoryPurpose, nbytes: int) -> None:
        """Subtracts bytes after they are freed. For a session that has ended this changes nothing, because its bytes
        are no longer counted."""
        account = session.owner, session, purpose
        self.release(min(nbytes, self.held_bytes(*account)), *account)

    def end_session(self, session: HopSession) -> None:
        for purpose in MemoryPurpose:
            self.give_back(session, purpose, self.used)


@dataclass(eq=False)
class SessionTable:
    """Admits sessions by KV memory: all reservations together never exceed `kv_bytes`.

    One key may reserve all memory until another key wants some; then each key has a share by its weight. To make room
    for a key within its share, sessions of keys beyond their share end: `LEASE_S` after their last step, or
    `LONGEST_LEASE_S` after they were opened.
    """

    kv_bytes: int  # for keys and values, states, and logs
    _: KW_ONLY
    idle_s: float = 600.0  # a session ends after this long without a message
    position_bytes: float = 1.0  # bytes of the keys and values of a position
    row_bytes: int = 0  # bytes of a row in addition to its positions
    digest_bytes: int = 0  # bytes of a position's digests
    usual_log_bytes: int = 0  # bytes of a position in the log, with the codec that most sessions have
    ahead: float = 0.0  # share of the reservation that rows and logs may allocate beyond it
    num_blocks: int = 0  # number of blocks of the model; a session whose span ends there has no log
    keys: AuthorizedKeys = field(default_factory=lambda: AuthorizedKeys(None))
    prefixes: PrefixStore | None = None  # uses the memory that no session has reserved

    def __post_init__(self) -> None:
        # This class, not `Budget`, limits what a key may have.
        limits = (self.kv_bytes,) * 3
        self.memory = MemoryAccount(self.kv_bytes, "no KV memory for", "try with fewer positions", limits)
        self._usual_bytes = (self.position_bytes + self.usual_log_bytes + self.digest_bytes) * (1 + self.ahead)
        self._sessions: dict[bytes, HopSession] = {}
        self.get = self._sessions.get
        self._count: dict[bytes, int] = {}  # sessions by key
        self._wanted: dict[bytes, float] = {}  # time of the refusal, by refused key
        self._ended = threading.Condition()
        self._short_until = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[HopSession]:
        return iter(self._sessions.values())

    @property
    def capacity(self) -> int:
        """Positions that a session with one row and the usual codec could reserve if it were the only session."""
        return max(0, int((self.memory.limit - self.row_bytes) / self._usual_bytes))

    @property
    def free_positions(self) -> int:
        """Positions that a new session with the usual codec may reserve."""
        return max(0, int((self.memory.free - self.row_bytes) / self._usual_bytes))

    def make_room(self, session: HopSession, reservation: int, now: float) -> list[HopSession]:
        """Ends sessions of keys beyond their share, if `session` can then reserve `reservation` positions.

        session: a session that is not admitted yet, or has a smaller reservation. Returns the ended sessions.
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
        if self.memory.held_bytes(key) + wanted > (share if most is None else min(share, most)):
            return []
        if is_new and self._count.get(key, 0) >= places:
            return []
        ending: list[HopSession] = []
        left = {owner: self.memory.held_bytes(owner) for owner in self._count}
        for other in sorted(self._sessions.values(), key=lambda other: other.stepped_at):
            if short <= 0 and (not crowded or ending):
                break
            lease_until = min(other.stepped_at + LEASE_S, other.opened_at + LONGEST_LEASE_S)
            if other.owner != key and lease_until <= now:
                share, places = self._share(other.owner, weights)
                if left[other.owner] > share or (crowded and self._count[other.owner] > places):
                    left[other.owner] -= self.memory.held_bytes(other.owner, other)
                    short -= self.memory.held_bytes(other.owner, other)
                    ending.append(other)
        if short > 0 or (crowded and not ending):
            return []
        for other in ending:
            self.remove(other)
        return ending

    def add_session(self, session: HopSession) -> None:
        """Admits a session, with at least `MIN_RESERVATION` positions.

        Raises PeerBusy: the reservation does not fit, or is more than the key may have now.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            text = f"this peer holds {MAX_SESSIONS} sessions already"
            raise PeerBusy(f"{text}; {self._note_refused(session.owner, 0, session.used_at)}")
        session.reservation = self._reservation(session)
        self._check_share(session.owner, self._new_bytes(session), session.used_at)
        try:
            self._take_reservation(session, MemoryPurpose.POSITIONS, self._bytes_of(session, session.reservation))
            self._take_reservation(session, MemoryPurpose.ROWS, self.row_bytes)
        except PeerBusy:
            self.memory.end_session(session)
            raise
        session.reserved_rows = 1
        session.opened_at = session.stepped_at = session.used_at
        self._sessions[session.id] = session
        self._count[session.owner] = self._count.get(session.owner, 0) + 1
        self._wanted.pop(session.owner, None)

    def hold_rows(self, session: HopSession, rows: int) -> None:
        """Reserves the memory of `rows` rows besides their positions. Raises PeerBusy and changes nothing if there is
        too little memory."""
        more = max(1, rows) - session.reserved_rows
        if not more or session.closed:
            return
        if more > 0:
            self._take_reservation(session, MemoryPurpose.ROWS, more * self.row_bytes)
        else:
            self.memory.give_back(session, MemoryPurpose.ROWS, -more * self.row_bytes)
        session.reserved_rows += more

    def resize(self, session: HopSession, reservation: int) -> None:
        """Enlarges a reservation; a smaller one changes nothing. Raises PeerBusy as `add_session` does."""
        if reservation > session.reservation:
            more = self._bytes_of(session, reservation - session.reservation)
            self._check_share(session.owner, more, session.used_at)
            self._take_reservation(session, MemoryPurpose.POSITIONS, more)
            session.reservation = reservation

    def remove(self, session: HopSession) -> None:
        if self._sessions.pop(session.id, None) is not None:
            self._count[session.owner] -= 1
            if not self._count[session.owner]:
                del self._count[session.owner]
            self.memory.end_session(session)
            session.closed = True
            with self._ended:
                self._ended.notify_all()

    def offer_less(self, session: HopSession, now: float) -> None:
        """The system lacked memory that this session had reserved, so for `SHORTAGE_S` the peer offers only half of the
        memory that no other session holds."""
        others = self.memory.used - self.memory.held_bytes(session.owner, session)
        self.memory.limit = others + (self.memory.limit - others) // 2
        self._short_until = now + SHORTAGE_S
        if self.prefixes is not None:
            self.prefixes.shrink()

    def wait_for_end(self, timeout_s: float) -> bool:
        with self._ended:
            return self._ended.wait(timeout_s)

    def expire(self, now: float) -> list[HopSession]:
        idle = [session for session in self._sessions.values() if now - session.used_at > self.idle_s]
        for session in idle:
            self.remove(session)
        self._wanted = self._wanting(now)
        if now > self._short_until:
            self.memory.limit = self.kv_bytes
        return idle

    def _reservation(self, session: HopSession) -> int:
        least = int((self.memory.limit - self.row_bytes) / self._cost_of(session))
        return max(session.reservation, min(MIN_RESERVATION, max(1, least)))

    def _new_bytes(self, session: HopSession) -> int:
        return self._bytes_of(session, self._reservation(session)) + self.row_bytes

    def _bytes_of(self, session: HopSession, positions: int) -> int:
        return math.ceil(positions * self._cost_of(session))

    def _cost_of(self, session: HopSession) -> float:
        """Bytes of one position of a session's reservation."""
        log = session.log.bytes_per_position if session.end < self.num_blocks else 0
        return (self.position_bytes + log + self.digest_bytes) * (1 + self.ahead)

    def _take_reservation(self, session: HopSession, purpose: MemoryPurpose, nbytes: int) -> None:
        try:
            self.memory.take_memory(session, purpose, nbytes)
        except PeerBusy as error:
            raise PeerBusy(f"{error}; {self._note_refused(session.owner, nbytes, session.used_at)}") from None
        if self.prefixes is not None:
            self.prefixes.shrink()

    def _wanting(self, now: float) -> dict[bytes, float]:
        """The keys that want memory, with the time when each was refused."""
        return {key: at for key, at in self._wanted.items() if now - at <= WANTED_S}

    def _weights(self, key: bytes, now: float) -> float:
        """Sum of the weights of `key` and of all keys that have memory or want some."""
        return sum(self.keys.options_of(each).weight for each in {key, *self._count, *self._wanting(now)})

    def _share(self, key: bytes, weights: float) -> tuple[float, float]:
        """Bytes and sessions that a key may have; `weights`: the sum of all weights."""
        part = self.keys.options_of(key).weight / weights
        return part * self.memory.limit, max(1.0, part * MAX_SESSIONS)

    def _check_share(self, key: bytes, nbytes: int, now: float) -> None:
        held = self.memory.held_bytes(key)
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
                f"try again in {max(others):.0f} s"
            )

    def _note_refused(self, key: bytes, nbytes: int, now: float) -> str:
        """Remembers that a key wants memory; returns what its client can do, as a clause."""
        share, places = self._share(key, self._weights(key, now))
        within = self.memory.held_bytes(key) + nbytes <= share and self._count.get(key, 0) < places
        if within and now - self._wanted.get(key, -LOOK_AGAIN_S) >= LOOK_AGAIN_S and len(self._wanted) < MAX_SESSIONS:
            self._wanted[key] = now
        when = f"try again in {LEASE_S:.0f} s, when idle sessions have ended" if within else "close sessions"
        return f"{when}, or use other peers"


class KeyPolicy:
    """What the owner of the peer allows each CURVE key. keys: the accepted keys; None: all keys are accepted and
    equal."""

    def __init__(self, keys: AuthorizedKeys | None = None) -> None:
        self.keys = keys or AuthorizedKeys(None)
        self._spent: dict[bytes, TokenBucket] = {}  # by key

    def weight(self, key: bytes) -> float:
        return self.keys.options_of(key).weight

    def check_training(self, key: bytes) -> None:
        """Raises PeerBusy: the owner of this peer does not let the key train."""
        if not self._granted(key).train:
            raise PeerBusy("the owner of this peer does not let your key train (train=no): train through other peers")

    def spend_positions(self, key: bytes, positions: int, now: float) -> None:
        """Counts positions before they are computed, within the key's tokens per minute.

        Raises PeerBusy: the tokens of the last minute are used up, or the peer does not accept the key any more.
        """
        per_minute = self._granted(key).tokens_per_minute
        if per_minute is None:
            return
        bucket = self._spent.get(key) or TokenBucket()
        if wait_s := bucket.wait_s(per_minute, now):
            raise PeerBusy(
                f"your key has used the {per_minute} tokens per minute that the owner of this peer grants it: "
                f"try again in {wait_s} s"
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
