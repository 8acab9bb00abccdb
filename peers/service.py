"""What a peer does with each message: no sockets, no device, no clock of its own.

The transport brings messages in, the engine brings finished steps in, and whatever must be said goes out through
`Outbox`. Every answer that a misbehaving sender can provoke is a `Failure` or silence.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

from peers.sessions import Session, SessionTable
from peers.work import Work, WorkQueue
from splitnet.errors import CodecError, PeerBusy, ProtocolError, ProtocolVersionError
from splitnet.net.codecs import codec_by_code
from splitnet.net.identity import PublicKey
from splitnet.net.messages import (
    Close,
    Failure,
    FailureCode,
    Message,
    Open,
    Opened,
    Payload,
    Ping,
    Pong,
    Replay,
    Result,
    Step,
)
from splitnet.net.rows import fork_rows
from splitnet.net.sent_log import SentLog
from splitnet.net.transport import Connection, Destination, Endpoint, LinkState

log = logging.getLogger(__name__)

REPLAY_POSITIONS = 512
"""Positions per step of a replay."""


class SessionTooLong(ProtocolError):
    """More positions than the model or the session allows."""


class Outbox(Protocol):
    """Where a service puts what it has to say."""

    def send(self, destination: Destination, message: Message) -> None: ...

    def connect(self, endpoint: Endpoint) -> None: ...

    def state(self, endpoint: Endpoint) -> LinkState: ...


@dataclass(frozen=True, slots=True)
class Served:
    """The part of a model that this peer serves."""

    model: str
    """Fingerprint of the weights."""
    start: int
    end: int
    num_blocks: int
    hidden_size: int
    max_positions: int | None


@dataclass(slots=True)
class _PendingOpen:
    """An `Open` that waits until its next hop answers or the time is up."""

    session: Session
    epoch: int
    deadline: float


class Service:
    """Sessions, admission and the way of every step through this hop.

    Args:
        served: what this peer serves.
        sessions: the table of sessions with the KV budget.
        queue: where steps wait for the device.
        outbox: where messages go.
        reach_s: how long a next hop may take to accept the link before the client is told to carry.
    """

    def __init__(
        self, served: Served, sessions: SessionTable, queue: WorkQueue, outbox: Outbox, *, reach_s: float = 3.0
    ) -> None:
        self.served = served
        self.sessions = sessions
        self.queue = queue
        self.queue_ms = 0.0
        """Expected wait of a new step for the device, kept up to date by the engine."""
        self._outbox = outbox
        self._reach_s = reach_s
        self._pending: list[_PendingOpen] = []
        self._lock = threading.RLock()

    def receive(self, source: Destination, message: Message, now: float) -> None:
        """Handles a message that came from `source` at `now` (seconds)."""
        if not isinstance(source, Connection):
            return  # a next hop has nothing to say over the link that we push on
        with self._lock:
            match message:
                case Ping():
                    self._outbox.send(source, Pong(message.nonce, self.queue_ms, self.sessions.free_positions))
                case Step():
                    self._step(source, message, now)
                case Open():
                    self._open(source, message, now)
                case Close():
                    self._close(source, message)
                case Replay():
                    self._replay(source, message, now)
                case _:
                    self._fail(source, b"", 0, 0, FailureCode.BAD_MESSAGE, f"a peer takes no {type(message).__name__}")

    def reject(self, source: Destination, error: ProtocolError) -> None:
        """Answers frames that are not a message."""
        log.debug("bad frames: %s", error)
        # A sender of another version learns ours from the prefix of the answer, whatever else it can read.
        if isinstance(source, Connection) and isinstance(error, ProtocolVersionError):
            self._fail(source, b"", 0, 0, FailureCode.BAD_MESSAGE, str(error))

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        """A link to a next hop came up, was refused or was lost."""
        with self._lock:
            if state is not LinkState.CONNECTING:
                waiting = [pending for pending in self._pending if pending.session.next == endpoint]
                for pending in waiting:
                    self._answer_open(pending, reachable=state is LinkState.UP)

    def tick(self, now: float) -> None:
        """Gives up on links and drops idle sessions."""
        with self._lock:
            for pending in [pending for pending in self._pending if now >= pending.deadline]:
                self._answer_open(pending, reachable=False)
            for session in self.sessions.expire(now):
                self.queue.discard(session)
                log.info("session %s expired", session.id.hex())

    def prepare(self, work: Work) -> None:
        """Brings a session's rows to where a step begins: forks and crops. Called by the engine, before a pass.

        Raises:
            SessionTooLong: the rows would hold more positions than the session has reserved.
            ProtocolError: a fork of a row that does not exist, or a gap before the first position.
        """
        session, step = work.session, work.step
        if step.forks is not None:
            session.rows = fork_rows(session.rows, step.forks, lambda row: row.fork())
        for part in step.parts:
            row = session.rows.get(part.row)
            length = 0 if row is None else row.length
            if part.start > length:
                raise ProtocolError(f"row {part.row} has {length} positions, the step begins at {part.start}")
            if row is not None and part.start < length:
                row.crop(part.start)
        named = {part.row for part in step.parts}
        held = sum(row.length for row_id, row in session.rows.items() if row_id not in named)
        held += sum(part.start + part.length for part in step.parts)
        if held > session.budget:
            raise SessionTooLong(f"the step needs {held} positions, the session has reserved {session.budget}")

    def finished(self, work: Work, payload: Payload, result_payload: Payload) -> None:
        """Sends on what the engine has computed.

        Args:
            work: the finished step.
            payload: the output of all positions, encoded with the session's codec; empty at the tail.
            result_payload: what the client asked to have back, encoded.
        """
        session, step = work.session, work.step
        with self._lock:
            if session.closed or step.epoch != session.epoch:
                return
            at_tail = session.end == self.served.num_blocks
            replayed = step.replay_until != 0 and session.end >= step.replay_until
            if not at_tail:
                session.log.record(step.parts, step.forks, payload)
            if session.next is not None and not replayed:
                self._outbox.send(
                    session.next,
                    Step(
                        session.id,
                        step.epoch,
                        step.number,
                        step.parts,
                        step.forks,
                        step.replay_until,
                        session.codec.code,
                        payload,
                    ),
                )
                return
            if replayed and step.number == 0:
                return  # only the last step of a replay is answered
            body = b"" if replayed else (result_payload if at_tail else payload)
            self._outbox.send(
                session.reply_to,
                Result(session.id, step.epoch, step.number, session.end, session.codec.code, work.compute_ms, body),
            )

    def failed(self, work: Work, code: FailureCode, text: str) -> None:
        """Tells the client that the device could not run its step."""
        session = work.session
        with self._lock:
            if not session.closed:
                self._fail(session.reply_to, session.id, work.step.epoch, work.step.number, code, text)

    def _open(self, source: Connection, message: Open, now: float) -> None:
        refused = self._refusal(message)
        if refused is not None:
            self._fail(source, message.session, message.epoch, 0, *refused)
            return
        codec = codec_by_code(message.codec)
        following = self._next_of(message)
        session = self.sessions.get(message.session)
        if session is not None and session.owner != source.curve:
            self._fail(source, message.session, message.epoch, 0, FailureCode.UNKNOWN_SESSION, "not your session")
            return
        if session is not None and message.epoch < session.epoch:
            self._fail(source, message.session, message.epoch, 0, FailureCode.STALE_EPOCH, "a newer epoch is open")
            return
        try:
            if session is None:
                session = Session(
                    id=message.session,
                    owner=source.curve,
                    reply_to=source,
                    epoch=message.epoch,
                    start=message.start,
                    end=message.end,
                    budget=message.budget,
                    codec=codec,
                    previous=None,
                    next=following,
                    log=SentLog(message.codec, codec.bytes_per_position(self.served.hidden_size)),
                    used_at=now,
                )
                self.sessions.add(session)
            else:
                self.sessions.resize(session, message.budget)
        except PeerBusy as error:
            self._fail(source, message.session, message.epoch, 0, FailureCode.BUSY, str(error))
            return
        if (session.start, session.end) != (message.start, message.end):
            self._fail(
                source, message.session, message.epoch, 0, FailureCode.WRONG_BLOCKS, "an open session keeps its blocks"
            )
            return
        session.reply_to = source
        session.epoch = message.epoch
        session.next = following
        session.previous = PublicKey(message.previous).curve_raw if message.previous else None
        session.used_at = now
        state = LinkState.UP if following is None else self._outbox.state(following)
        # A link that was lost may come back, if the next hop only restarted; a new one gets the full time.
        patience_s = self._reach_s / 3 if state is LinkState.DOWN else self._reach_s
        pending = _PendingOpen(session, message.epoch, now + patience_s)
        self._pending.append(pending)
        if following is None or state in (LinkState.UP, LinkState.REFUSED):
            self._answer_open(pending, reachable=state is LinkState.UP)
        else:
            self._outbox.connect(following)

    def _refusal(self, message: Open) -> tuple[FailureCode, str] | None:
        """Why an `Open` cannot be served by this peer at all."""
        served = self.served
        if message.model != served.model:
            return FailureCode.WRONG_MODEL, "this peer serves other weights"
        if not served.start <= message.start < message.end <= served.end:
            return (
                FailureCode.WRONG_BLOCKS,
                f"this peer serves blocks {served.start}..{served.end - 1}, not {message.start}..{message.end - 1}",
            )
        try:
            codec_by_code(message.codec)
            self._next_of(message)
            if message.previous:
                PublicKey(message.previous).curve_raw
        except Exception as error:  # an unknown codec, a key that is no point of the curve, a malformed address
            return FailureCode.BAD_MESSAGE, str(error)
        return None

    @staticmethod
    def _next_of(message: Open) -> Endpoint | None:
        if not message.next_key:
            return None
        key = PublicKey(message.next_key)
        _ = key.curve_raw
        host, _, port = message.next_address.removeprefix("tcp://").rpartition(":")
        if not message.next_address.startswith("tcp://") or not host or "*" in host or not port.isdecimal():
            raise ProtocolError("the next hop's address is not tcp://HOST:PORT")
        return Endpoint(message.next_address, key)

    def _answer_open(self, pending: _PendingOpen, *, reachable: bool) -> None:
        self._pending.remove(pending)
        session = pending.session
        if not session.closed and session.epoch == pending.epoch:
            self._outbox.send(session.reply_to, Opened(session.id, pending.epoch, reachable))

    def _step(self, source: Connection, message: Step, now: float) -> None:
        session = self.sessions.get(message.session)
        if session is None or source.curve not in (session.owner, session.previous):
            # The same answer for both, so that nobody learns which sessions exist.
            self._fail(
                source, message.session, message.epoch, message.number, FailureCode.UNKNOWN_SESSION, "no session"
            )
            return
        if message.epoch != session.epoch:
            return  # fenced: it comes from a route that is no more, or runs ahead of its Open and will be repeated
        session.used_at = now
        try:
            total = self._check_step(session, message)
        except ProtocolError as error:
            code = FailureCode.TOO_LONG if isinstance(error, SessionTooLong) else FailureCode.BAD_MESSAGE
            self._fail(session.reply_to, session.id, message.epoch, message.number, code, str(error))
            return
        self.queue.put(Work(session, message, total, now))

    def _check_step(self, session: Session, message: Step) -> int:
        """Positions in the step, after everything that its header claims was checked against its session."""
        total = message.positions
        codec = codec_by_code(message.codec)
        expected = total * codec.bytes_per_position(self.served.hidden_size)
        if not total or not all(part.length and part.keep <= part.length for part in message.parts):
            raise ProtocolError("a part of the step is empty, or keeps more than it has")
        if len({part.row for part in message.parts}) != len(message.parts):
            raise ProtocolError("a step names a row twice")
        if len(message.payload) != expected:
            raise CodecError(f"{total} positions take {expected} bytes, got {len(message.payload)}")
        longest = max(part.start + part.length for part in message.parts)
        if self.served.max_positions is not None and longest > self.served.max_positions:
            raise SessionTooLong(f"position {longest} is beyond the model's context of {self.served.max_positions}")
        if total + sum(work.total for work in session.waiting) > session.budget:
            raise SessionTooLong(f"the session has reserved {session.budget} positions")
        return total

    def _close(self, source: Connection, message: Close) -> None:
        session = self.sessions.get(message.session)
        if session is not None and session.owner == source.curve:
            self.sessions.remove(session)
            self.queue.discard(session)

    def _replay(self, source: Connection, message: Replay, now: float) -> None:
        session = self.sessions.get(message.session)
        if session is None or session.owner != source.curve:
            self._fail(
                source, message.session, message.epoch, message.number, FailureCode.UNKNOWN_SESSION, "no session"
            )
            return
        if message.epoch != session.epoch or session.next is None:
            self._fail(source, session.id, message.epoch, message.number, FailureCode.STALE_EPOCH, "no such next hop")
            return
        session.used_at = now
        steps = list(session.log.replay(REPLAY_POSITIONS))
        for index, (parts, payload) in enumerate(steps):
            number = message.number if index == len(steps) - 1 else 0
            self._outbox.send(
                session.next,
                Step(session.id, session.epoch, number, parts, None, message.until, session.log.codec, payload),
            )

    def _fail(
        self, destination: Connection, session: bytes, epoch: int, number: int, code: FailureCode, text: str
    ) -> None:
        self._outbox.send(destination, Failure(session, epoch, number, code, text[:500]))
