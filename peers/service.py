"""The protocol of sessions at a peer: what each message does. The service has no sockets, no device and no clock.

The transport brings messages, the engine reports computed steps, and answers are sent through `Outbox`. Every answer
that a misbehaving sender can cause is a `Failure` or silence.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peers.counters import Counters, SessionEnd
from peers.hop_outputs import HopOutputs
from peers.next_hop import HopConnector
from peers.peer_links import NextHops, Outbox
from peers.prefixes import READ_S, Page
from peers.queue import WorkQueue
from peers.receipts import Question, Receipts
from peers.rows import Rows
from peers.served import ServedBlocks, next_hop_of
from peers.sessions import (
    REVOKED,
    SHORTAGE_S,
    HopSession,
    KeyPolicy,
    MemoryAccount,
    PassWork,
    SessionTable,
    SessionTooLong,
    Taps,
    Work,
)
from peers.training_service import MissingPass, Request, Training
from scheduler.batching import Load
from scheduler.liveness import CLIENT_LOST_S
from splitnet.blocks.vision import VisionTower
from splitnet.errors import CodecError, PeerBusy, ProtocolError, ProtocolVersionError
from splitnet.security.identity import PublicKey
from splitnet.wire.codecs import codec_by_code
from splitnet.wire.endpoints import Connection, Destination, Endpoint, LinkState
from splitnet.wire.messages import (
    MAX_PAYLOAD_BYTES,
    Adapter,
    AdapterGradient,
    AskReceipt,
    Close,
    Failure,
    FailureCode,
    FetchedKV,
    FetchKV,
    FetchSent,
    Forward,
    Gradient,
    LoadReport,
    Message,
    Open,
    Ping,
    Pong,
    ReadImages,
    Replay,
    Result,
    Step,
)
from splitnet.wire.sent_log import PAGE, SentLog

log = logging.getLogger(__name__)

# A client that is silent for this time gets a `Pong`, which it ignores, to show whether it is still connected.
PROBE_S = 15.0
IN_USE_S = 3.0  # a session without a message for this time probably waits for its user to type
_CODES = {PeerBusy: FailureCode.BUSY, SessionTooLong: FailureCode.TOO_LONG, MissingPass: FailureCode.OUT_OF_ORDER}


def _code_of(error: ProtocolError | PeerBusy) -> FailureCode:
    return _CODES.get(type(error), FailureCode.BAD_MESSAGE)


class SessionService:
    """The sessions of a peer. Thread-safe.

    training_memory: bytes of memory for clients that train. reach_s: see `HopConnector`. tower: reads images; None:
    the peer reads none. sign: see `Receipts`.
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
        tower: VisionTower | None = None,
        sign: Callable[[bytes], bytes],
    ) -> None:
        self.served = served
        self.tower = tower
        self.sessions = sessions
        self.queue = queue
        self.ms_per_position = 0.0  # speed of the device, set by the engine
        self.leaving = False  # whether the peer takes no new sessions because it leaves
        refusal = "no training memory for", "train with fewer positions at a time"
        self.training_memory = MemoryAccount(training_memory, *refusal)
        self.counters = counters or Counters()
        self._policy = policy or KeyPolicy()
        self.load = Load()
        self.outbox = outbox
        self._lock = threading.RLock()
        self.rows = Rows(served, sessions, self._policy.keys, queue, self._lock)
        self.outputs = HopOutputs(outbox, self._lock, served.num_blocks)
        self._receipts = Receipts(served, outbox, sign)
        self._hops = HopConnector(outbox, next_hops, reach_s, self.rows.held_positions)
        memory, facts = self.training_memory, (served.hidden_size, served.max_positions)
        self.training = Training(queue, outbox, self.outputs, memory, self._lock, self.counters, *facts)
        self._probe_at = 0.0

    @property
    def busy_ms(self) -> float:
        """Expected time of all waiting and running steps and passes on the device; 0: no work waits or runs."""
        return (self.queue.queued_positions + self.queue.pass_positions) * self.ms_per_position

    def receive_message(self, source: Destination, message: Message, now: float) -> None:
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
                    self._receive_training(source, message, now)
                case ReadImages():
                    self._read_images(source, message, now)
                case Open():
                    self._open_session(source, message, now)
                case Close():
                    self._close_session(source, message)
                case Replay():
                    self._replay(source, message, now)
                case AskReceipt() | FetchSent():
                    self._answer_audit(source, message, now)
                case _:
                    self._fail(
                        source, b"", 0, 0, FailureCode.BAD_MESSAGE, f"a peer does not accept {type(message).__name__}"
                    )

    def leave(self) -> None:
        """Refuses new sessions from now on, and has the clients of open sessions replace this peer."""
        with self._lock:
            told, self.leaving = self.leaving, True
            for session in () if told else self.sessions:
                failure = Failure(session.id, session.epoch, 0, FailureCode.LEAVING, "this peer is leaving")
                self.outbox.send(session.reply_to, failure)

    def in_use(self, now: float) -> bool:
        """Whether a step or an image waits or runs, or a message of a session came within `IN_USE_S`."""
        with self._lock:
            return bool(self.training.reading) or any(
                session.waiting_size or now - session.used_at < IN_USE_S for session in self.sessions
            )

    def forget_all(self) -> None:
        """Ends all sessions; their clients notice with the next step."""
        with self._lock:
            for session in list(self.sessions):
                self._end(session, SessionEnd.DROPPED)

    def reject(self, source: Destination, error: ProtocolError) -> None:
        """Handles frames that are not a message."""
        log.debug("bad frames: %s", error)
        with self._lock:
            # The prefix of the answer contains this peer's version, so that a sender with another version learns it.
            if isinstance(source, Connection) and isinstance(error, ProtocolVersionError):
                self._fail(source, b"", 0, 0, FailureCode.BAD_MESSAGE, str(error))
            else:
                self.counters.refused[FailureCode.BAD_MESSAGE] += 1

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        with self._lock:
            self._hops.link_changed(endpoint, state)

    def ping_answered(self, endpoint: Endpoint) -> None:
        with self._lock:
            self._hops.opening_answered(endpoint)

    def dropped(self, message: Message, reason: str) -> None:
        """Tells the client that a message of its session could not be sent; `reason`: a clause."""
        # For a dropped failure no further failure is sent, which would be dropped as well.
        if not isinstance(message, Step | Result | Forward | Gradient | AdapterGradient | FetchedKV):
            return
        with self._lock:
            session = self.sessions.get(message.session)
            if session is not None and session.epoch == message.epoch:
                text = f"an output of this peer was dropped: {reason}"
                self._refuse_message(session.reply_to, message, FailureCode.BUSY, text)

    def connection_lost(self, connection: Connection, now: float) -> None:
        """A client has lost its connection: its sessions end after `CLIENT_LOST_S`, unless it connects again."""
        with self._lock:
            for session in self.sessions:
                if session.reply_to == connection:
                    session.used_at = min(session.used_at, now + CLIENT_LOST_S - self.sessions.idle_s)

    def tick(self, now: float) -> None:
        """Gives up on links, ends sessions that are idle or whose keys are revoked, and probes silent clients."""
        with self._lock:
            self._hops.tick(now)
            for session in self.sessions:
                until = session.route_state.lookup_until
                if until is not None and now >= until:
                    self._hops.looked_up(session)
            for session in self.sessions.expire(now):
                self._ended(session, SessionEnd.EXPIRED)
            # The connection of a revoked key ends, but the previous hop would still send steps of the key's sessions.
            for session in [session for session in self.sessions if not self._policy.keys.allows(session.owner)]:
                self._ended(session, SessionEnd.REVOKED, REVOKED)
            if now >= self._probe_at:
                self._probe_at = now + PROBE_S
                for connection in {session.reply_to for session in self.sessions if now - session.used_at > PROBE_S}:
                    self.outbox.send(connection, Pong(0, self.busy_ms, self.sessions.free_positions))

    def report_failure(self, work: Work, code: FailureCode, text: str) -> None:
        with self._lock:
            if not work.session.closed:
                self._refuse_message(work.session.reply_to, work.step, code, text)

    def fell_short(self, session: HopSession, now: float) -> None:
        """The system lacked memory for a step of a session, although the session had reserved it."""
        with self._lock:
            self.sessions.offer_less(session, now)
            limit = self.sessions.memory.limit
        text = "memory is short: the peer offers %.0f MiB of KV memory for the next %.0f s; give --kv-memory with less"
        log.warning(text, limit / 2**20, SHORTAGE_S)

    def _pong(self, source: Connection, message: Ping, now: float) -> None:
        load = (LoadReport(*self.load.estimate_at(now), time.time()),) if message.load else ()
        pong = Pong(message.nonce, self.busy_ms, self.sessions.free_positions, load=load)
        session = self.sessions.get(message.session) or self.training.reading.get((source.curve, message.session))
        # Only the owner of a session learns that the session exists.
        if session is not None and session.owner == source.curve:
            route = session.route_state
            waiting = self.queue.count(session) or int(self.outputs.are_under_way(session))
            timing = (route.timing,) if route.timing is not None else ()
            pong = replace(pong, waiting=waiting, done=session.done, holds=True, last=route.last, timing=timing)
        self.outbox.send(source, pong)

    def _open_session(self, source: Connection, message: Open, now: float) -> None:
        session = self.sessions.get(message.session)
        refused = self._refusal(source, message, session)
        if refused is not None:
            self._refuse_message(source, message, *refused)
            return
        codec = codec_by_code(message.codec)
        try:
            self._policy.spend_positions(source.curve, 0, now)
            is_new = session is None
            if session is None:
                sent = SentLog(message.codec, codec.bytes_per_position(self.served.hidden_size))
                facts = message.epoch, message.start, message.end, message.reservation
                session = HopSession(message.session, source.curve, source, *facts, codec, None, sent, now)
            text = "your key had more than its share of this peer's KV memory, and others waited for it"
            for ended in self.sessions.make_room(session, message.reservation, now):
                self._ended(ended, SessionEnd.EXPIRED, text)
            if is_new:
                self.sessions.add_session(session)
                self.counters.opened += 1
            else:
                self.sessions.resize(session, message.reservation)
        except PeerBusy as error:
            self._refuse_message(source, message, FailureCode.BUSY, str(error))
            return
        again, route = message.epoch > session.epoch, session.route_state
        if again:
            self.queue.discard_waiting(session)
            self.training.forget_passes(session)
            route.last, route.sent_on, route.sent_before = 0, False, 0
        session.reply_to = source
        session.epoch = message.epoch
        session.used_at = now
        route.previous = PublicKey(message.previous).curve_raw if message.previous else None
        route.weights = self.served.weights
        route.taps = Taps(message.taps, codec_by_code(message.tap_codec)) if message.taps else None
        self._look_up(session, message, now)
        self._hops.connect_next(session, next_hop_of(message), now, again=again)

    def page_ms(self, blocks: int) -> float:
        """Ms that the device needs to compute a page of a session with `blocks` blocks."""
        return PAGE * self.ms_per_position * blocks / (self.served.end - self.served.start)

    def _look_up(self, session: HopSession, message: Open, now: float) -> None:
        """Looks up stored pages for a row that the session does not have; `Opened` waits for the result."""
        route, epoch = session.route_state, session.epoch
        route.labelled, route.next_reachable, route.lookup_until = bool(message.context), None, now + 2 * READ_S

        def found(pages: list[Page]) -> None:
            with self._lock:
                if route.lookup_until is not None and session.epoch == epoch and not session.closed:
                    self.rows.found(session, message, pages)
                    self._hops.looked_up(session)

        if not self.rows.look_up(session, message, found):
            route.lookup_until = None

    def _refusal(self, source: Connection, message: Open, session: HopSession | None) -> tuple[FailureCode, str] | None:
        """Why this peer does not open a session, or a newer epoch of an open session."""
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

    def _ended(self, session: HopSession, how: SessionEnd, text: str = "") -> None:
        """Ends a session; the client of waiting work gets a failure with `text`, if there is a text."""
        waiting = self.queue.first_waiting(session)
        if text and waiting is not None:
            number: int = getattr(waiting, "number", 0)
            self._fail(session.reply_to, session.id, session.epoch, number, FailureCode.BUSY, text)
        self._end(session, how)
        log.info("session %s ended: %s", session.id.hex(), text or how, extra={"session": session.id.hex()})

    def _end(self, session: HopSession, how: SessionEnd) -> None:
        self.sessions.remove(session)
        self.queue.discard(session)
        self.training.end_session(session)
        self._hops.end_opening(session)
        self.counters.ended[how] += 1

    def _pass_on(self, source: Endpoint, message: Message, now: float) -> None:
        """Handles a message of a next hop: a failure for the client, or a gradient for this hop."""
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
        if session is None or source.curve not in (session.owner, session.route_state.previous):
            # Both cases get the same answer, so that no sender learns which sessions exist.
            self._refuse_message(source, message, FailureCode.UNKNOWN_SESSION, "no session")
            return
        if message.epoch != session.epoch:
            return  # the message is of a former route, or came before its `Open`: the sender will repeat the message
        session.used_at = now
        try:
            if source.curve != session.owner and message.boundary != session.start:
                raise ProtocolError(
                    f"the step begins at block {message.boundary}, the session at block {session.start}"
                )
            total = self.served.check_step(session, message)
            session.reads_inputs |= bool(message.inputs)
            self._policy.spend_positions(session.owner, total, now)
            work = Work(session, message, total, now, namespace=session.namespace)
            if (taps := session.route_state.taps) is not None and not message.replay_until:
                self._tap(work, taps)
            self.queue.put_step(work)
            session.stepped_at = now
        except (ProtocolError, PeerBusy) as error:
            self._refuse_message(session.reply_to, message, _code_of(error), str(error))

    def _tap(self, work: Work, taps: Taps) -> None:
        """Has a step return hidden states."""
        if kept := sum(part.keep for part in work.step.parts):
            nbytes = kept * taps.codec.bytes_per_position(self.served.hidden_size)
            if nbytes > MAX_PAYLOAD_BYTES:
                raise ProtocolError(
                    f"the hidden states of {kept} positions are too many for one message: send fewer positions"
                )
            work.taps, work.taps_nbytes = taps, nbytes * len(taps.boundaries)

    def _receive_training(self, source: Connection, message: Request, now: float) -> None:
        session = self.sessions.get(message.session)
        pushed = isinstance(message, Forward) and session is not None and source.curve == session.route_state.previous
        if session is None or not (source.curve == session.owner or pushed):
            self._refuse_message(source, message, FailureCode.UNKNOWN_SESSION, "no session")
        elif message.epoch == session.epoch:
            self._take_in(session, source, message, now)

    def _take_in(self, session: HopSession, source: Connection, message: Request, now: float) -> None:
        session.used_at = now
        try:
            if isinstance(message, Forward) and source.curve != session.owner and message.boundary != session.start:
                raise ProtocolError(
                    f"the pass begins at block {message.boundary}, the session at block {session.start}"
                )
            if isinstance(message, Gradient) and message.boundary != session.end:
                text = f"the gradient is for boundary {message.boundary}, the session ends at boundary {session.end}"
                raise ProtocolError(text)
            if isinstance(message, Gradient) or (isinstance(message, Forward) and message.kept):
                self._policy.check_training(session.owner)
            if isinstance(message, Forward):
                self.training.check_lengths(message)
                self.served.check_payload(session, message)
                self._policy.spend_positions(session.owner, message.positions, now)
            if isinstance(message, FetchKV):
                self.rows.count_read(session, message, now)
            self.training.receive_request(session, source, message, now)
            session.stepped_at = now
        except (ProtocolError, PeerBusy) as error:
            self._refuse_message(session.reply_to, message, _code_of(error), str(error))

    def _read_images(self, source: Connection, message: ReadImages, now: float) -> None:
        """Queues images to read, in a session of its own that no other message can name."""
        if self.tower is None:
            text = "this peer does not read images: its owner must give --vision"
            return self._refuse_message(source, message, FailureCode.WRONG_MODEL, text)
        if self.leaving:
            return self._refuse_message(source, message, FailureCode.LEAVING, "this peer is leaving")
        try:
            features = self.tower.check(message)
            codec = codec_by_code(message.features_codec)
            own = message.session, source.curve, source, message.epoch, self.served.start, self.served.end, 0
            session = HopSession(*own, codec, None, SentLog(codec.code, 0), now)
            self._policy.spend_positions(source.curve, features, now)
            self.training.put_images(PassWork(session, message, source, now, features=features))
        except (ProtocolError, CodecError, PeerBusy) as error:
            self._refuse_message(source, message, _code_of(error), str(error))

    def _close_session(self, source: Connection, message: Close) -> None:
        session = self.sessions.get(message.session)
        if session is not None and session.owner == source.curve:
            self._end(session, SessionEnd.HANDED_OVER if self.leaving else SessionEnd.CLOSED)

    def _replay(self, source: Connection, message: Replay, now: float) -> None:
        """Has the log of a session sent to its next hop."""
        session = self.sessions.get(message.session)
        if session is None or session.owner != source.curve:
            self._refuse_message(source, message, FailureCode.UNKNOWN_SESSION, "no session")
            return
        if message.epoch != session.epoch or session.next is None:
            self._refuse_message(source, message, FailureCode.STALE_EPOCH, "no such next hop")
            return
        session.used_at = now
        try:
            session.count_resent(now, "the log of the session was sent")
        except PeerBusy as error:
            self._refuse_message(source, message, FailureCode.BUSY, str(error))
            return
        self.rows.log_hit(session)
        self.outputs.replay_log(source, session, message)

    def _answer_audit(self, source: Connection, message: Question, now: float) -> None:
        session = self.sessions.get(message.session)
        if session is None or session.owner != source.curve:
            self._refuse_message(source, message, FailureCode.UNKNOWN_SESSION, "no session")
            return
        session.used_at = now
        try:
            self._receipts.answer(source, session, message, now)
        except (ProtocolError, PeerBusy) as error:
            self._refuse_message(source, message, _code_of(error), str(error))

    def _refuse_message(self, destination: Connection, message: Message, code: FailureCode, text: str) -> None:
        """Answers a message of a session with a failure that has the number of the message's step or pass."""
        about: Any = message
        self._fail(destination, about.session, about.epoch, getattr(message, "number", 0), code, text)

    def _fail(
        self, destination: Connection, session: bytes, epoch: int, number: int, code: FailureCode, text: str
    ) -> None:
        self.counters.refused[code] += 1
        self.outbox.send(destination, Failure(session, epoch, number, code, text[:500]))
