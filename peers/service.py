"""What a peer does with each message: no sockets, no device, no clock of its own.

The transport brings messages in, the engine brings finished steps in, and answers go out through `Outbox`. Every answer
that a misbehaving sender can provoke is a `Failure` or silence.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from peers.counters import Counters, SessionEnd
from peers.links import NextHops, Outbox, timing_of
from peers.prefixes import NOWHERE, READ_S, STATES, Page, Space, page_name
from peers.queue import WorkQueue
from peers.sessions import (
    REVOKED,
    SHORTAGE_S,
    Filling,
    KeyPolicy,
    MemoryAccount,
    Recalled,
    RowPages,
    Session,
    SessionTable,
    SessionTooLong,
    Taps,
    Work,
    goes_on,
    prepare_rows,
    rows_after,
)
from peers.training import MissingPass, Request, Training
from scheduler.batching import DECODE_POSITIONS, Load
from scheduler.liveness import CLIENT_LOST_S
from splitnet.errors import PeerBusy, ProtocolError, ProtocolVersionError
from splitnet.limits import keep_latest
from splitnet.security.identity import PublicKey
from splitnet.wire.codecs import are_finite, check_size, codec_by_code
from splitnet.wire.endpoints import Connection, Destination, Endpoint, LinkState, Relay, is_address
from splitnet.wire.messages import (
    MAX_PAYLOAD_BYTES,
    MAX_POSITIONS,
    Adapter,
    AdapterGradient,
    Close,
    CopyPages,
    Failure,
    FailureCode,
    FetchedKV,
    FetchKV,
    Forward,
    Gradient,
    LoadReport,
    Message,
    Open,
    Opened,
    Payload,
    Ping,
    Pong,
    Replay,
    Result,
    Step,
    Tapped,
)
from splitnet.wire.sent_log import PAGE, SentLog, page_ends

if TYPE_CHECKING:
    import torch

    from splitnet.blocks.kv_cache import SequenceCache

log = logging.getLogger(__name__)

Value = TypeVar("Value")

PROBE_S = 15.0  # a client silent for this long gets a `Pong` that it ignores, which shows whether it is connected
IN_USE_S = 3.0  # a session without a step for this long waits for its user to type
REMEMBERED_HOPS = 4096
FAR_TIMES = 3.0  # limit where round trips are long, times the usual one: clients wait for the answer to `Open`
PAGE_BYTES = 1 << 20  # of a page besides its numbers, at most
_CODES = {PeerBusy: FailureCode.BUSY, SessionTooLong: FailureCode.TOO_LONG, MissingPass: FailureCode.OUT_OF_ORDER}


@dataclass(frozen=True, slots=True)
class ServedBlocks:
    """The part of a model that this peer serves."""

    model: str  # fingerprint of the weights
    start: int
    end: int
    num_blocks: int
    hidden_size: int
    max_positions: int | None
    weights: str = ""  # what they are held as, see `Weights.text`
    # Types and shapes of what a position leaves in the blocks, by the names that pages have; see `Span.page_layout`.
    page: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict[str, Any])

    def refusal(self, message: Open) -> tuple[FailureCode, str] | None:
        """Why an `Open` cannot be served by this peer at all."""
        if message.model != self.model:
            return FailureCode.WRONG_MODEL, "this peer serves other weights"
        if not self.start <= message.start < message.end <= self.end:
            text = f"this peer serves blocks {self.start}..{self.end - 1}, not {message.start}..{message.end - 1}"
            return FailureCode.WRONG_BLOCKS, text
        try:
            codec_by_code(message.codec)
            codec_by_code(message.tap_codec)
            if any(not low < high <= message.end for low, high in pairwise((message.start, *message.taps))):
                raise ProtocolError("the hidden states that are wanted do not stand behind blocks, in their order")
            next_hop_of(message)
            if message.previous:
                PublicKey(message.previous)
        except Exception as error:  # an unknown codec, a key that is no point of the curve, a malformed address
            return FailureCode.BAD_MESSAGE, str(error)
        return None

    def check(self, session: Session, message: Step) -> int:
        """Checks all that the header of a step claims against its session; returns the positions in it."""
        rows = set[int]()
        total = longest = 0
        for row, start, length, keep in message.parts:
            if not length or keep > length:
                raise ProtocolError("a part of the step is empty, or keeps more than it has")
            rows.add(row)
            total += length
            longest = max(longest, start + length)
        if not total:
            raise ProtocolError("a step has no parts")
        if len(rows) != len(message.parts):
            raise ProtocolError("a step names a row twice")
        if message.labels and len(message.labels) != sum(map(page_ends, message.parts)):
            raise ProtocolError("a step does not label each of its pages")
        check_size(message.codec, message.payload, total, self.hidden_size)
        if self.max_positions is not None and longest > self.max_positions:
            raise SessionTooLong(f"position {longest} is beyond the model's context of {self.max_positions}")
        size = total + len(message.forks or ())
        # Twice in all, as steps that are answered may still be in their pass, and those of an older epoch are finished.
        if size > session.reservation or session.waiting_size + size > 2 * session.reservation:
            raise SessionTooLong(f"the session has reserved {session.reservation} positions")
        return total


def next_hop_of(message: Open) -> Endpoint | None:
    """The next hop that an `Open` names. Raises ProtocolError and KeyFileError if that is malformed."""
    if not message.next_key:
        return None
    return endpoint_of(message.next_key, message.next_address, message.next_relays, "the next hop")


def endpoint_of(key: bytes, address: str, relays: tuple[Relay, ...], what: str) -> Endpoint:
    """A peer that a client names. Raises ProtocolError and KeyFileError if that is malformed."""
    if not all(map(is_address, (address, *(relay.address for relay in relays)))):
        raise ProtocolError(f"{what}'s address is not tcp://IP:PORT: names of others are not looked up")
    for relay in relays:
        PublicKey(relay.key)
    return Endpoint(address, PublicKey(key), relays)


@dataclass(frozen=True, slots=True)
class _PendingOpen:
    """An `Open` that waits until its next hop answers or the time is up."""

    deadline: float
    new_link: bool  # the session has never pushed over this link
    wants_pong: bool  # messages over this link may be lost: that it is up counts for nothing, the next hop must answer


class NextHopOpening:
    """Connects sessions to their next hops. A part of the service: it is called under the service's lock.

    reach_s: how long a next hop may take to accept the link before the client is told to carry.
    """

    def __init__(self, outbox: Outbox, links: NextHops, reach_s: float) -> None:
        self._outbox = outbox
        self._links = links
        self._reach_s = reach_s
        self._pending: dict[Session, _PendingOpen] = {}
        self._proven: dict[Endpoint, None] = {}  # next hops that have shown their keys, the latest last

    def reach(self, session: Session, following: Endpoint | None, now: float, *, again: bool) -> None:
        """Connects a session to its next hop; answers its `Open` when it is known whether that works.

        again: a newer epoch of a session that was open.
        """
        pending = self._pending.pop(session, None)
        if following != session.next:
            pending = None
        new_link = following != session.next or (pending is not None and pending.new_link)
        if not self._set_next(session, following):
            self._say_opened(session, next_reachable=False)
            return
        state = LinkState.UP if following is None else self._outbox.state(following)
        # A route is opened again after trouble, and TCP finds out late that a link is cut.
        wants_pong = again and not new_link and following is not None and state is LinkState.UP
        if wants_pong and following is not None:
            self._outbox.probe(following)
        proven = following in self._proven
        # A link that was lost may come back, if the next hop only restarted; a new one gets the full time.
        answer_limit_s = self._reach_s / 3 if (proven and state is LinkState.DOWN) or wants_pong else self._reach_s
        if following is not None:  # of one that has not shown its key only this peer's own way is known
            far_s = self._outbox.answer_limit_s(following, connects=not wants_pong)
            answer_limit_s = max(answer_limit_s, min(far_s, FAR_TIMES * self._reach_s))
        deadline = now + answer_limit_s if pending is None else min(pending.deadline, now + answer_limit_s)
        self._pending[session] = _PendingOpen(deadline, new_link, wants_pong)
        if _is_known(state, proven) and state is not LinkState.DOWN and not wants_pong:
            self._answer(session, reachable=state is LinkState.UP)

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state is LinkState.UP:
            keep_latest(self._proven, endpoint, None, REMEMBERED_HOPS)
        if _is_known(state, endpoint in self._proven):
            for session in [session for session in self._pending if session.next == endpoint]:
                self._answer(session, reachable=state is LinkState.UP)

    def answered(self, endpoint: Endpoint) -> None:
        for session in [session for session, pending in self._pending.items() if pending.wants_pong]:
            if session.next == endpoint:
                self._answer(session, reachable=True)

    def tick(self, now: float) -> None:
        for session in [session for session, pending in self._pending.items() if now >= pending.deadline]:
            self._answer(session, reachable=False)
        self._links.tick(now)

    def end(self, session: Session) -> None:
        self._pending.pop(session, None)
        self._set_next(session, None)

    def _set_next(self, session: Session, following: Endpoint | None) -> bool:
        """Makes a session push to another hop, or to none; False if this peer has too many links already."""
        if following == session.next:
            return True
        before, session.next = session.next, None
        if following is not None and self._links.acquire(following):
            session.next = following
        if before is not None:
            self._links.release(before)
        return session.next == following

    def _answer(self, session: Session, *, reachable: bool) -> None:
        pending = self._pending.pop(session)
        if not reachable and pending.new_link:
            # The client will carry. Nothing goes on trying to connect to an address that never answered.
            self._set_next(session, None)
        self._say_opened(session, next_reachable=reachable)

    def recalled(self, session: Session) -> None:
        """Pages were looked for, and it is known how many there are."""
        session.recall_until = None
        if session.reachable is not None:
            self._say_opened(session, next_reachable=session.reachable)

    def _say_opened(self, session: Session, *, next_reachable: bool) -> None:
        session.reachable = next_reachable
        if session.recall_until is not None:
            return
        recalled = session.recalled
        cached = recalled.positions if recalled else sum(row.length for row in list(session.rows.values()))
        told = session.weights, session.taps is not None, recalled is not None, bool(session.space.name)
        self._outbox.send(session.reply_to, Opened(session.id, session.epoch, next_reachable, cached, *told))


def _code_of(error: ProtocolError | PeerBusy) -> FailureCode:
    return _CODES.get(type(error), FailureCode.BAD_MESSAGE)


def _is_known(state: LinkState, proven: bool) -> bool:
    """Whether the state of a link may be told: the next hop itself refuses, not something in its place."""
    return state in (LinkState.UP, LinkState.REFUSED) or (proven and state is not LinkState.CONNECTING)


def renumbered(page: Mapping[str, Value], first: int) -> dict[str, Value]:
    """What a page has, with `first` added to the numbers of blocks, which stand first in the names: rows count from the
    span's first block, pages from the model's."""
    return {_renumbered(name, first): each for name, each in page.items()}


@lru_cache(1 << 13)
def _renumbered(name: str, first: int) -> str:
    return re.sub(r"\d+(?=\.)", lambda number: str(int(number[0]) + first), name, count=1)


@lru_cache(1 << 13)
def _block_of(name: str) -> int | None:
    number = re.search(r"\d+(?=\.)", name)
    return int(number[0]) if number is not None else None


class SessionService:
    """Sessions, admission and the way of every step through this hop. Thread-safe.

    training_memory: bytes to keep for clients that train. reach_s: see `NextHopOpening`.
    """

    def __init__(
        self,
        served: ServedBlocks,
        sessions: SessionTable,
        queue: WorkQueue,
        outbox: Outbox,
        next_hops: NextHops,
        *,
        training_memory: int = 1 << 28,
        reach_s: float = 3.0,
        counters: Counters | None = None,
        policy: KeyPolicy | None = None,
    ) -> None:
        self.served = served
        self.sessions = sessions
        self.queue = queue
        self.ms_per_position = 0.0  # that a position takes on the device, kept up to date by the engine
        self.leaving = False  # it takes no new sessions
        self.training_memory = MemoryAccount(
            training_memory, "no training memory for", "train with fewer positions at a time"
        )
        self.counters = counters or Counters()
        self._policy = policy or KeyPolicy()
        self.load = Load()
        self.outbox = outbox
        self._lock = threading.RLock()
        self._opening = NextHopOpening(outbox, next_hops, reach_s)
        self.training = Training(
            queue, outbox, self.training_memory, self._lock, self.counters, served.hidden_size, served.max_positions
        )
        self._probe_at = 0.0

    @property
    def queue_ms(self) -> float:
        """Expected wait of a new step for the device; 0 only if it has nothing to do."""
        return self.queue.queued_positions * self.ms_per_position

    @property
    def busy_ms(self) -> float:
        """Expected wait for all steps and passes; 0 only if there are none."""
        return self.queue_ms + self.queue.pass_positions * self.ms_per_position

    def receive(self, source: Destination, message: Message, now: float) -> None:
        with self._lock:
            if not isinstance(source, Connection):
                self._pass_on(source, message, now)
                return
            match message:
                case Ping():
                    self._pong(source, message, now)
                case Step():
                    self._step(source, message, now)
                case Forward() | Gradient() | Adapter() | FetchKV():
                    self._train(source, message, now)
                case Open():
                    self._open(source, message, now)
                case Close():
                    self._close(source, message)
                case Replay():
                    self._replay(source, message, now)
                case _:
                    self._fail(source, b"", 0, 0, FailureCode.BAD_MESSAGE, f"a peer takes no {type(message).__name__}")

    def leave(self) -> None:
        """Takes no new sessions from now on, and tells the clients of the others to replace this peer."""
        with self._lock:
            told, self.leaving = self.leaving, True
            for session in () if told else self.sessions:
                failure = Failure(session.id, session.epoch, 0, FailureCode.LEAVING, "this peer is leaving")
                self.outbox.send(session.reply_to, failure)

    def in_use(self, now: float) -> bool:
        """Whether a session has steps under way, or had some a moment ago."""
        with self._lock:
            return any(session.waiting or now - session.used_at < IN_USE_S for session in self.sessions)

    def forget_all(self) -> None:
        """Ends all sessions; their clients find out when they go on."""
        with self._lock:
            for session in list(self.sessions):
                self.sessions.remove(session)
                self._forget(session)
                self.counters.ended[SessionEnd.DROPPED] += 1

    def reject(self, source: Destination, error: ProtocolError) -> None:
        """Answers frames that are not a message."""
        log.debug("bad frames: %s", error)
        with self._lock:
            # A sender of another version learns ours from the prefix of the answer, whatever else it can read.
            if isinstance(source, Connection) and isinstance(error, ProtocolVersionError):
                self._fail(source, b"", 0, 0, FailureCode.BAD_MESSAGE, str(error))
            else:
                self.counters.refused[FailureCode.BAD_MESSAGE] += 1

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        with self._lock:
            self._opening.link_changed(endpoint, state)

    def answered(self, endpoint: Endpoint) -> None:
        with self._lock:
            self._opening.answered(endpoint)

    def dropped(self, message: Message, reason: str) -> None:
        """Tells the client that a message of its session could not be sent; `reason`: a clause."""
        # A dropped failure causes no other: that would be dropped as well, and so on.
        if not isinstance(message, Step | Result | Forward | Gradient | AdapterGradient | FetchedKV):
            return
        with self._lock:
            session = self.sessions.get(message.session)
            if session is not None and session.epoch == message.epoch:
                text = f"what this peer sends on was dropped: {reason}"
                self._refuse(session.reply_to, message, FailureCode.BUSY, text)

    def connection_lost(self, connection: Connection, now: float) -> None:
        """A client is not connected any more: unless it connects again, its sessions end in `CLIENT_LOST_S`."""
        with self._lock:
            for session in self.sessions:
                if session.reply_to == connection:
                    session.used_at = min(session.used_at, now + CLIENT_LOST_S - self.sessions.idle_s)

    def tick(self, now: float) -> None:
        """Gives up on links, ends sessions that are idle or whose keys are revoked, and probes silent clients."""
        with self._lock:
            self._opening.tick(now)
            for session in self.sessions:
                if session.recall_until is not None and now >= session.recall_until:
                    self._opening.recalled(session)
            for session in self.sessions.expire(now):
                self._ended(session, SessionEnd.EXPIRED)
            # The hop before would send on steps of a key whose own connection has ended.
            for session in [session for session in self.sessions if not self._policy.keys.allows(session.owner)]:
                self.sessions.remove(session)
                self._ended(session, SessionEnd.REVOKED, REVOKED)
            if now >= self._probe_at:
                self._probe_at = now + PROBE_S
                for connection in {session.reply_to for session in self.sessions if now - session.used_at > PROBE_S}:
                    self.outbox.send(connection, Pong(0, self.busy_ms, self.sessions.free_positions))

    def prepare(self, work: Work) -> None:
        """Brings a session's rows to where a step begins; called by the engine before a pass.

        Raises what `prepare_rows` does, and PeerBusy without memory for the states of so many rows.
        """
        session, step = work.session, work.step
        if not goes_on(session, step):
            rows = len(rows_after(session, step))
            with self._lock:
                self.sessions.hold_rows(session, max(rows, session.reserved_rows))
            prepare_rows(session, step)
            with self._lock:
                self.sessions.hold_rows(session, rows)  # what a step drops is dropped now, unless it was refused
        if session.end != self.served.num_blocks:
            with self._lock:
                session.log.prepare(step.parts, step.forks)
        if self.sessions.prefixes is not None:
            self._follow_pages(work)

    def _follow_pages(self, work: Work) -> None:
        """Notes what the rows of a step depend on: one that goes on otherwise than it began leaves no pages."""
        pages, forks = work.session.pages, work.step.forks
        if forks is not None:
            held = {fork.row: pages.get(fork.row) or pages.get(fork.source) for fork in forks}
            pages = {row: RowPages(each.space, list(each.names)) for row, each in held.items() if each is not None}
            work.session.pages = pages
        for part in work.step.parts:
            if not part.start:
                pages[part.row] = RowPages(work.space, [])
            elif part.row not in pages or pages[part.row].space != work.space:
                pages[part.row] = RowPages(NOWHERE, [])

    def take_recalled(self, work: Work) -> Recalled | None:
        """Pages that were found for the row of a step, if it goes on there; called by the engine."""
        with self._lock:
            session, part, recalled = work.session, work.step.parts[0], work.session.recalled
            if recalled is None or work.step.epoch != session.epoch:
                return None
            session.recalled = None
            if part.row != recalled.row or not part.start:
                return None
            recalled = recalled._replace(pages=recalled.pages[: -(-part.start // PAGE)])
            self._log_recalled(session, recalled)
            return recalled

    def _log_recalled(self, session: Session, recalled: Recalled) -> None:
        if session.end != self.served.num_blocks:
            pages = zip(recalled.pages, recalled.labels, strict=False)
            session.log.restore(recalled.row, [(page.output, page.reach, label) for page, label in pages])

    def fill(self, session: Session, filling: Filling, device: torch.device, most: int) -> None:
        """Fills a row with the next pages that were found for it, `most` at most; called by the engine. If that fails,
        they are forgotten."""
        some = filling.recalled.pages[filling.done : filling.done + most]
        with self._may_break(filling):
            for index, page in enumerate(some, filling.done):
                self.check_page(page, session.start, session.end, session.codec.code, first=not index)
            filling.row.fill([renumbered(page.positions, -self.served.start) for page in some], device)
            filling.done += len(some)

    def begin_row(self, work: Work, filling: Filling, device: torch.device) -> None:
        """Has a row with all of its pages take the place of all others; called by the engine. If they did not fit, the
        step is refused as that of a row that is not there."""
        session, pages, row = work.session, filling.recalled.pages, filling.recalled.row
        with_states = max((count for count, page in enumerate(pages, 1) if page.states), default=0)
        with self._may_break(filling):
            states = renumbered(pages[with_states - 1].states, -self.served.start)
            filling.row.restore(states, with_states * PAGE, device)
        if not filling.broken:
            session.rows = {row: filling.row}
            session.pages = {row: RowPages(work.space, [page.name for page in pages])}
            if self.sessions.prefixes is not None:
                self.sessions.prefixes.used(pages)

    @contextmanager
    def _may_break(self, filling: Filling) -> Iterator[None]:
        """For what is done with stored pages: an error breaks the row, and the pages are forgotten."""
        try:
            yield
        except Exception:
            log.exception("stored pages do not fit")
            filling.broken = True
            if self.sessions.prefixes is not None:
                self.sessions.prefixes.forget(filling.recalled.pages)

    def keep_pages(self, work: Work) -> None:
        """Stores the pages of rows that a finished step has completed; called by the engine."""
        session, step, store = work.session, work.step, self.sessions.prefixes
        if store is None or not work.space.name or session.closed:
            return
        labels, cost_ms = iter(step.labels), work.compute_ms * PAGE / work.total
        for part in step.parts:
            first = part.start // PAGE
            own = [next(labels) for _ in range(page_ends(part))]
            row, pages = session.rows.get(part.row), session.pages.get(part.row)
            if row is None or pages is None or pages.space != work.space:
                continue
            del pages.names[first:]
            for index, label in enumerate(own, first):
                if row.length < (index + 1) * PAGE:
                    break
                # States are as they are behind the last position of a pass.
                ends = row.length == row.computed == (index + 1) * PAGE
                make = partial(self._page, session, part.row, row, index, ends)
                with suppress(ValueError):
                    store.put(work.space, label, make, cost_ms, pages.names)
                pages.names.append(page_name(work.space, label))

    def _page(self, session: Session, row_id: int, row: SequenceCache, index: int, ends: bool, name: bytes) -> Page:
        """Raises ValueError: it is not to be stored."""
        tensors = row.page(index * PAGE, (index + 1) * PAGE)
        if not are_finite(tensors.values()):
            raise ValueError("of values that are no numbers, which others may have sent")
        if ends:
            tensors |= {STATES + state: tensor for state, tensor in row.states().items()}
        tensors = renumbered(tensors, self.served.start)
        if session.end == self.served.num_blocks:
            return Page(name, tensors)
        with self._lock:
            return Page(name, tensors, *session.log.page(row_id, index))

    def finished(self, work: Work, payload: Payload, result_payload: Payload) -> None:
        """Sends on what the engine has computed, encoded with the session's codec, and logs it.

        payload: the output of all positions; empty at the tail. result_payload: what the client asked to have back.
        """
        with self._lock:
            session, step = work.session, work.step
            if session.closed:
                return
            # Sent first, since the next hop waits for it. Logged also in an older epoch: the log follows the rows.
            if step.epoch == session.epoch:
                session.last = max(session.last, 0 if step.replay_until else step.number)
                self._send_on(work, payload, result_payload)
            if session.end != self.served.num_blocks:
                session.log.record(step.parts, step.forks, payload, step.reach, step.labels)

    def tapped(self, work: Work, taps: Taps) -> None:
        """Sends the client the hidden states of a step that was `finished`."""
        with self._lock:
            session, step = work.session, work.step
            if session.closed or step.epoch != session.epoch:
                return
            for boundary, parts in work.tapped.items():
                payload = parts[0] if len(parts) == 1 else b"".join(parts)
                ids = session.id, step.epoch, step.number
                self.outbox.send(session.reply_to, Tapped(*ids, boundary, taps.codec.code, payload))

    def failed(self, work: Work, code: FailureCode, text: str) -> None:
        with self._lock:
            if not work.session.closed:
                self._refuse(work.session.reply_to, work.step, code, text)

    def fell_short(self, session: Session, now: float) -> None:
        """The system had no memory for a step of a session, although the peer had offered it."""
        with self._lock:
            self.sessions.offer_less(session, now)
            limit = self.sessions.memory.limit
        text = "memory is short: the peer offers %.0f MiB of KV memory for the next %.0f s; give --kv-memory with less"
        log.warning(text, limit / 2**20, SHORTAGE_S)

    def _send_on(self, work: Work, payload: Payload, result_payload: Payload) -> None:
        session, step = work.session, work.step
        timing = timing_of(work, self.outbox)
        timings = (*step.timings, timing)
        if work.total <= DECODE_POSITIONS and not step.replay_until:
            session.timing = timing
        replayed = step.replay_until != 0 and session.end >= step.replay_until
        code = session.codec.code
        if session.next is not None and not replayed:
            session.sent_on = True
            kept = step.epoch, step.number, step.parts, step.forks, step.replay_until
            labels = step.labels if session.labelled else ()
            onward = Step(session.id, *kept, code, payload, session.end, timings, step.reach, labels)
            self.outbox.send(session.next, onward)
        elif not replayed or step.number:  # of a replay only the last step is answered
            at_tail = session.end == self.served.num_blocks
            body = b"" if replayed else (result_payload if at_tail else payload)
            result = Result(session.id, step.epoch, step.number, session.end, code, timings, body)
            self.outbox.send(session.reply_to, result)

    def _is_under_way(self, session: Session) -> bool:
        """Whether no ping that went after all that was sent to the next hop has come back yet.

        A busy uplink holds prompts up for minutes. They are not lost, and sending them again would make it worse.
        """
        following = session.next
        if following is None or self.outbox.state(following) is not LinkState.UP:
            return False
        if session.sent_on:
            session.sent_on, session.sent_before = False, self.outbox.probe(following)
        return self.outbox.answered(following) < session.sent_before

    def _pong(self, source: Connection, message: Ping, now: float) -> None:
        load = (LoadReport(*self.load.at(now), time.time()),) if message.load else ()
        pong = Pong(message.nonce, self.busy_ms, self.sessions.free_positions, load=load)
        session = self.sessions.get(message.session)
        # To all but its owner a session is unknown, so that no sender learns which ones exist.
        if session is not None and session.owner == source.curve:
            waiting = len(session.waiting) + session.waiting_passes
            waiting = waiting or int(self._is_under_way(session))
            timing = (session.timing,) if session.timing is not None else ()
            pong = replace(pong, waiting=waiting, done=session.done, holds=True, last=session.last, timing=timing)
        self.outbox.send(source, pong)

    def _open(self, source: Connection, message: Open, now: float) -> None:
        session = self.sessions.get(message.session)
        refused = self._refusal(source, message, session)
        if refused is not None:
            self._refuse(source, message, *refused)
            return
        codec = codec_by_code(message.codec)
        try:
            self._policy.spend(source.curve, 0, now)
            is_new = session is None
            if session is None:
                session = Session(
                    id=message.session,
                    owner=source.curve,
                    reply_to=source,
                    epoch=message.epoch,
                    start=message.start,
                    end=message.end,
                    reservation=message.reservation,
                    codec=codec,
                    previous=None,
                    next=None,
                    log=SentLog(message.codec, codec.bytes_per_position(self.served.hidden_size)),
                    used_at=now,
                )
            text = "your key had more than its share of this peer's KV memory, and others waited for it"
            for ended in self.sessions.make_room(session, message.reservation, now):
                self._ended(ended, SessionEnd.EXPIRED, text)
            if is_new:
                self.sessions.add(session)
                self.counters.opened += 1
            else:
                self.sessions.resize(session, message.reservation)
        except PeerBusy as error:
            self._refuse(source, message, FailureCode.BUSY, str(error))
            return
        again = message.epoch > session.epoch
        if again:
            self.queue.discard_waiting(session)
            self.training.forget(session)
            session.last, session.sent_on, session.sent_before = 0, False, 0
        session.reply_to = source
        session.epoch = message.epoch
        session.previous = PublicKey(message.previous).curve_raw if message.previous else None
        session.used_at = now
        session.weights = self.served.weights
        session.taps = Taps(message.taps, codec_by_code(message.tap_codec)) if message.taps else None
        self._look_for_pages(session, message, now)
        self._opening.reach(session, next_hop_of(message), now, again=again)

    @property
    def most_page_bytes(self) -> int:
        """What a page of a session takes at most, as it is sent to another peer."""
        sessions = self.sessions
        return int(PAGE * (sessions.position_bytes + 4 * self.served.hidden_size)) + sessions.row_bytes + PAGE_BYTES

    def page_ms(self, blocks: int) -> float:
        """Ms that the device takes for a page of a session with so many blocks."""
        return PAGE * self.ms_per_position * blocks / (self.served.end - self.served.start)

    def space(self, owner: bytes, message: Open | CopyPages) -> Space:
        """Where pages of a session are, of the key `owner`."""
        shared = isinstance(message, Open) and message.shared
        group = self._policy.keys.options_of(owner).share if shared else None
        whose = owner if group is None else b"group " + group.encode()
        if (store := self.sessions.prefixes) is None:
            return NOWHERE
        hop = message.context, message.start, message.end, message.codec
        return store.space(whose, *hop, secret=not shared)

    def check_page(self, page: Page, start: int, end: int, codec: int, *, first: bool) -> None:
        """Whether a page has what blocks `[start, end)` leave, and nothing else; `first`: of its text. What is not in
        it, rows would have of others, as memory is not cleared. Raises ProtocolError: it has not."""
        served, tensors = self.served, page.tensors
        blocks = {name: _block_of(name) for name in served.page}
        wanted = {name for name, block in blocks.items() if block is None or start <= block < end}
        states = {name for name in wanted if name.startswith(STATES)}
        sinks = {name for name in wanted if ".first_" in name}
        due = wanted - states - sinks | (sinks if first else set[str]())
        given = {name for name in tensors if not name.startswith(STATES)}
        if given != due or tensors.keys() - given not in (set[str](), states):
            raise ProtocolError("a page is not of these blocks")
        for name, tensor in tensors.items():
            dtype, shape = served.page[name]
            if name not in states and shape[2] == 1:  # one position
                shape = (*shape[:2], PAGE, *shape[3:])
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ProtocolError("a page has other types or shapes than these blocks leave")
        size = 0 if end == served.num_blocks else PAGE * codec_by_code(codec).bytes_per_position(served.hidden_size)
        if len(page.output) != size or not 0 <= page.reach <= MAX_POSITIONS:
            raise ProtocolError("a page has other outputs than these blocks give")

    def _look_for_pages(self, session: Session, message: Open, now: float) -> None:
        """Finds pages for a row that the session does not have yet."""
        store = self.sessions.prefixes
        session.labelled, session.reachable, session.recall_until = bool(message.context), None, None
        if store is None:
            return
        space = self.space(session.owner, message)
        if space != session.space or message.labels:
            session.space, session.recalled = space, None
        if not message.labels or message.row in session.rows:
            return
        session.recall_until = now + 2 * READ_S
        labels, epoch = message.labels[: session.reservation // PAGE], session.epoch

        def found(pages: list[Page]) -> None:
            with self._lock:
                if session.recall_until is None or session.epoch != epoch or session.closed:
                    return
                if pages:
                    session.recalled = Recalled(message.row, pages, labels)
                    self.queue.put_recalled(session)
                self._opening.recalled(session)

        store.recall(space, labels, found)

    def _refusal(self, source: Connection, message: Open, session: Session | None) -> tuple[FailureCode, str] | None:
        """Why this peer does not open a session, or a newer epoch of one that it has."""
        refused = self.served.refusal(message)
        if refused is not None:
            return refused
        if session is None:
            return (FailureCode.LEAVING, "this peer is leaving") if self.leaving else None
        if session.owner != source.curve:
            return FailureCode.UNKNOWN_SESSION, "not your session"
        if message.epoch < session.epoch:
            return FailureCode.STALE_EPOCH, "a newer epoch is open"
        if (session.start, session.end, session.codec.code) != (message.start, message.end, message.codec):
            return FailureCode.WRONG_BLOCKS, "an open session keeps its blocks and its codec"
        return None

    def _ended(self, session: Session, how: SessionEnd, text: str = "") -> None:
        """A session has ended here; with a text its client is told, if something of it waits."""
        waiting = [*(work.step for work in session.waiting), *(work.message for work in session.passes)]
        if text and waiting:
            number: int = getattr(waiting[0], "number", 0)
            self._fail(session.reply_to, session.id, session.epoch, number, FailureCode.BUSY, text)
        self._forget(session)
        self.counters.ended[how] += 1
        log.info("session %s ended: %s", session.id.hex(), text or how, extra={"session": session.id.hex()})

    def _forget(self, session: Session) -> None:
        self.queue.discard(session)
        self.training.end(session)
        self._opening.end(session)

    def _pass_on(self, source: Endpoint, message: Message, now: float) -> None:
        """Takes a message of a next hop: a failure, which the client waits for, or a gradient, which goes up."""
        if not isinstance(message, Failure | Gradient):
            return
        session = self.sessions.get(message.session)
        if session is None or session.next != source or session.epoch != message.epoch:
            return
        if isinstance(message, Failure):
            self.outbox.send(session.reply_to, message)
        else:
            self._take_in(session, session.reply_to, message, now)

    def _step(self, source: Connection, message: Step, now: float) -> None:
        session = self.sessions.get(message.session)
        if session is None or source.curve not in (session.owner, session.previous):
            # The same answer for both, so that no sender learns which sessions exist.
            self._refuse(source, message, FailureCode.UNKNOWN_SESSION, "no session")
            return
        if message.epoch != session.epoch:
            return  # fenced: it comes from a former route, or runs ahead of its Open and will be repeated
        session.used_at = now
        try:
            if source.curve != session.owner and message.boundary != session.start:
                raise ProtocolError(f"the step stands before block {message.boundary}, the session at {session.start}")
            total = self.served.check(session, message)
            self._policy.spend(session.owner, total, now)
            work = Work(session, message, total, now, space=session.space)
            if session.taps is not None and not message.replay_until:
                self._tap(work, session.taps)
            self.queue.put(work)
            session.stepped_at = now
        except (ProtocolError, PeerBusy) as error:
            self._refuse(session.reply_to, message, _code_of(error), str(error))

    def _tap(self, work: Work, taps: Taps) -> None:
        """Has a step give the hidden states that its client wants."""
        if kept := sum(part.keep for part in work.step.parts):
            nbytes = kept * taps.codec.bytes_per_position(self.served.hidden_size)
            if nbytes > MAX_PAYLOAD_BYTES:
                raise ProtocolError(f"the hidden states of {kept} positions are too much for a message: send fewer")
            work.taps, work.taps_nbytes = taps, nbytes * len(taps.boundaries)

    def _train(self, source: Connection, message: Request, now: float) -> None:
        session = self.sessions.get(message.session)
        pushed = isinstance(message, Forward) and session is not None and source.curve == session.previous
        if session is None or not (source.curve == session.owner or pushed):
            self._refuse(source, message, FailureCode.UNKNOWN_SESSION, "no session")
        elif message.epoch == session.epoch:
            self._take_in(session, source, message, now)

    def _take_in(self, session: Session, source: Connection, message: Request, now: float) -> None:
        session.used_at = now
        try:
            if isinstance(message, Forward) and source.curve != session.owner and message.boundary != session.start:
                raise ProtocolError(f"the pass stands before block {message.boundary}, the session at {session.start}")
            if isinstance(message, Gradient) and message.boundary != session.end:
                text = f"the gradient stands at block {message.boundary}, the session ends at {session.end}"
                raise ProtocolError(text)
            if isinstance(message, Gradient) or (isinstance(message, Forward) and message.kept):
                self._policy.check_training(session.owner)
            if isinstance(message, Forward):
                self._policy.spend(session.owner, message.positions, now)
            self.training.receive(session, source, message, now)
            session.stepped_at = now
        except (ProtocolError, PeerBusy) as error:
            self._refuse(session.reply_to, message, _code_of(error), str(error))

    def _close(self, source: Connection, message: Close) -> None:
        session = self.sessions.get(message.session)
        if session is not None and session.owner == source.curve:
            self.sessions.remove(session)
            self._forget(session)
            self.counters.ended[SessionEnd.HANDED_OVER if self.leaving else SessionEnd.CLOSED] += 1

    def _replay(self, source: Connection, message: Replay, now: float) -> None:
        """Sends the next hop all outputs that its rows were made of, or tells the `source` that there are none."""
        session = self.sessions.get(message.session)
        if session is None or session.owner != source.curve:
            self._refuse(source, message, FailureCode.UNKNOWN_SESSION, "no session")
            return
        if message.epoch != session.epoch or session.next is None:
            self._refuse(source, message, FailureCode.STALE_EPOCH, "no such next hop")
            return
        session.used_at = now
        try:
            session.count_resent(now, "the log of the session was sent")
        except PeerBusy as error:
            self._refuse(source, message, FailureCode.BUSY, str(error))
            return
        if session.recalled is not None:  # the next hop may lack more of them than this one
            self._log_recalled(session, session.recalled)
        steps, codec = list(session.log.replay(since=message.since)), session.log.codec
        if not steps:
            result = Result(session.id, session.epoch, message.number, message.until, session.codec.code, ())
            self.outbox.send(source, result)
        session.sent_on = True
        for index, (parts, payload, reach, labels) in enumerate(steps):
            number = message.number if index == len(steps) - 1 else 0
            # The next hop may hold rows of a text before.
            forks = None if index or message.since else ()
            again = session.id, session.epoch, number, parts, forks, message.until, codec, payload
            labels = labels if session.labelled else ()
            self.outbox.send(session.next, Step(*again, session.end, (), reach, labels))

    def _refuse(self, destination: Connection, message: Message, code: FailureCode, text: str) -> None:
        """Answers a message of a session with a failure, about the number of its step or pass if it has one."""
        about: Any = message
        self._fail(destination, about.session, about.epoch, getattr(message, "number", 0), code, text)

    def _fail(
        self, destination: Connection, session: bytes, epoch: int, number: int, code: FailureCode, text: str
    ) -> None:
        self.counters.refused[code] += 1
        self.outbox.send(destination, Failure(session, epoch, number, code, text[:500]))
