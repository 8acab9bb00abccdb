"""What a peer keeps and does for clients that train: passes over whole sequences, forward and backward, and adapters.

A part of the service, under its lock; the engine calls it with what it has computed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from peers.counters import Counters
from peers.links import Outbox, timing_of
from peers.queue import WorkQueue
from peers.sessions import MemoryAccount, PassWork, Purpose, Session, SessionTooLong
from splitnet.blocks.adapters import counted_down
from splitnet.blocks.passes import SavedPass
from splitnet.errors import PeerBusy, ProtocolError
from splitnet.wire.codecs import check_size, codec_by_code
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import (
    Adapter,
    AdapterGradient,
    AdapterLoaded,
    Failure,
    FailureCode,
    FetchedKV,
    FetchKV,
    Forward,
    Gradient,
    Payload,
    Result,
)

Request = Forward | Gradient | Adapter | FetchKV

MAX_PASS_POSITIONS = 4096  # of a pass, unless a single sequence is longer


@dataclass(eq=False)
class Training:
    """Passes and adapters of all sessions."""

    queue: WorkQueue
    outbox: Outbox
    memory: MemoryAccount
    lock: threading.RLock  # of the service
    counters: Counters
    hidden_size: int  # of the model, as `max_positions`
    max_positions: int | None

    def __post_init__(self) -> None:
        self._ways: dict[PassWork, None] = {}  # with saved graphs, the oldest first; not the one that the device is at

    def receive(self, session: Session, source: Connection, message: Request, now: float) -> None:
        """Takes in a message that its sender may send. Raises ProtocolError or PeerBusy to refuse it."""
        if isinstance(message, Forward):
            self._check(message)
            for number in [number for number in session.kept if number < message.oldest]:
                self._drop(session, number)
            self._put(PassWork(session, message, source, now))
        elif isinstance(message, Gradient):
            forward = session.kept.get(message.number)
            if forward is None:
                raise MissingPass(f"there is no pass {message.number} to go back from")
            check_size(message.codec, message.payload, forward.positions, self.hidden_size)
            work = PassWork(session, message, forward.source, now, forward)
            more = work.nbytes - forward.nbytes
            self._take(session, Purpose.PASSES, more)
            try:
                self.queue.put_pass(work)
            except PeerBusy:
                self.memory.give_back(session, Purpose.PASSES, more)
                raise
            del session.kept[message.number]
        elif isinstance(message, FetchKV):
            row = session.rows.get(message.row)
            if row is not None:
                session.count_resent(now, "its keys and values were sent")
            self._put(PassWork(session, message, source, now))
        else:
            self._take_part(session, message, source, now)

    def forget(self, session: Session) -> None:
        """Frees all that is kept for the passes of a session; its adapter stays."""
        for work in self.queue.discard_passes(session):
            self._release(work)
        for number in list(session.kept):
            self._drop(session, number)

    def end(self, session: Session) -> None:
        self.forget(session)
        session.adapter, session.adapter_version, session.gradient_sum = None, 0, None
        session.adapter_parts = []
        for work in [work for work in self._ways if work.session is session]:
            self._drop_saved(work)
        self.memory.end(session)

    def may_keep_way(self, work: PassWork, nbytes: int) -> bool:
        """Takes memory for the way back of a pass that is about to run; False: there is none to spare."""
        with self.lock:
            session = work.session
            account = session.owner, session, Purpose.GRAPHS
            # As much again stays free, for what cannot be computed again.
            if session.closed or not self.memory.has_room(2 * nbytes, *account):
                return False
            self.memory.take(session, Purpose.GRAPHS, nbytes)
            work.way_bytes = nbytes
            return True

    def keep_saved(self, work: PassWork, way: SavedPass) -> None:
        """Keeps it until a gradient comes or something else needs the memory."""
        with self.lock:
            if not work.session.closed:
                work.way = way
                self._ways[work] = None

    def take_saved(self, work: PassWork) -> SavedPass | None:
        with self.lock:
            self._ways.pop(work, None)
            way, work.way = work.way, None
            return way

    def forwarded(self, work: PassWork, payload: Payload) -> None:
        """Sends on the output of a forward pass, and keeps its input if a gradient may follow."""
        with self.lock:
            session, message = work.session, work.message
            assert isinstance(message, Forward)
            if session.closed or message.epoch != session.epoch:
                self._release(work)
                return
            session.last = max(session.last, message.number)
            timings = (*message.timings, timing_of(work, self.outbox))
            codec = session.codec.code
            if session.next is not None:
                onward = replace(message, codec=codec, payload=payload, boundary=session.end, timings=timings)
                session.sent_on = True
                self.outbox.send(session.next, onward)
            else:
                result = Result(session.id, message.epoch, message.number, session.end, codec, timings, payload)
                self.outbox.send(session.reply_to, result)
            if message.kept:
                self._drop(session, message.number)
                session.kept[message.number] = work
            else:
                self._release(work)

    def went_back(self, work: PassWork, payload: Payload, parts: list[bytes]) -> None:
        """Sends the gradient by the input up the route, and that by the adapter to the client."""
        with self.lock:
            session, message, forward = work.session, work.message, work.forward
            assert isinstance(message, Gradient) and forward is not None and isinstance(forward.message, Forward)
            self._release(work)
            if session.closed or message.epoch != session.epoch:
                return
            for remaining, part in counted_down(parts):
                self.outbox.send(
                    session.reply_to, AdapterGradient(session.id, message.epoch, message.number, remaining, part)
                )
            codec = forward.message.gradient_codec
            timings = (*message.timings, timing_of(work, self.outbox))
            back = replace(message, boundary=session.start, codec=codec, payload=payload, timings=timings)
            self.outbox.send(work.source, back)

    def adapter_loaded(self, work: PassWork) -> None:
        with self.lock:
            session, message = work.session, work.message
            assert isinstance(message, Adapter)
            # Of the former version, whose memory is free now, only the new one's parts remain accounted for.
            former, session.adapter_bytes = session.adapter_bytes, work.nbytes
            self.memory.give_back(session, Purpose.ADAPTERS, former)
            if not session.closed:
                self.outbox.send(session.reply_to, AdapterLoaded(session.id, session.epoch, message.version))

    def fetched_kv(self, work: PassWork, parts: list[bytes]) -> None:
        with self.lock:
            session, message = work.session, work.message
            assert isinstance(message, FetchKV)
            self._release(work)
            for remaining, part in counted_down(parts if not session.closed else ()):
                self.outbox.send(
                    session.reply_to, FetchedKV(session.id, message.epoch, message.number, remaining, part)
                )

    def failed(self, work: PassWork, code: FailureCode, text: str) -> None:
        with self.lock:
            self.counters.refused[code] += 1
            session, message = work.session, work.message
            self._release(work)
            if not session.closed:
                number: int = getattr(message, "number", 0)
                self.outbox.send(session.reply_to, Failure(session.id, message.epoch, number, code, text[:500]))

    def _check(self, message: Forward) -> None:
        if not message.lengths or not all(message.lengths):
            raise ProtocolError("a pass has no sequences, or an empty one")
        longest = max(message.lengths)
        if self.max_positions is not None and longest > self.max_positions:
            raise SessionTooLong(f"{longest} positions are more than the model's context")
        if message.positions > max(MAX_PASS_POSITIONS, longest):
            raise SessionTooLong(f"a pass has at most {MAX_PASS_POSITIONS} positions")
        codec_by_code(message.gradient_codec)
        check_size(message.codec, message.payload, message.positions, self.hidden_size)

    def _put(self, work: PassWork) -> None:
        """Puts a pass into the queue; memory of one that is refused is given back."""
        if not isinstance(work.message, Adapter):  # for which memory was taken part by part
            self._take(work.session, Purpose.PASSES, work.nbytes)
        try:
            self.queue.put_pass(work)
        except PeerBusy:
            self._release(work)
            raise

    def _take_part(self, session: Session, message: Adapter, source: Connection, now: float) -> None:
        """Takes a part of an adapter; one that does not follow the part before it begins anew."""
        if not message.payload:
            raise ProtocolError("a part of an adapter is empty")
        last = session.adapter_parts[-1] if session.adapter_parts else None
        if last is not None and (last.version, last.remaining) != (message.version, message.remaining + 1):
            self._release(PassWork(session, last, source, now, parts=session.adapter_parts))
            session.adapter_parts = []
        self._take(session, Purpose.ADAPTERS, PassWork(session, message, source, now, parts=[message]).nbytes)
        session.adapter_parts.append(message)
        if not message.remaining:
            work = PassWork(session, message, source, now, parts=session.adapter_parts)
            session.adapter_parts = []
            self._put(work)

    def _take(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """Takes memory, if need be that of saved passes. Raises PeerBusy if there is too little nonetheless."""
        while self._ways and not self.memory.has_room(nbytes, session.owner, session, purpose):
            own = (work for work in self._ways if work.session.owner == session.owner)
            self._drop_saved(next(own, None) or next(iter(self._ways)))
        self.memory.take(session, purpose, nbytes)

    def _drop_saved(self, work: PassWork) -> None:
        self._ways.pop(work, None)
        self.memory.give_back(work.session, Purpose.GRAPHS, work.way_bytes)
        work.way, work.way_bytes = None, 0

    def _release(self, work: PassWork) -> None:
        for one in (work, work.forward):
            if one is not None:
                self._drop_saved(one)
        purpose = Purpose.ADAPTERS if isinstance(work.message, Adapter) else Purpose.PASSES
        self.memory.give_back(work.session, purpose, work.nbytes)

    def _drop(self, session: Session, number: int) -> None:
        work = session.kept.pop(number, None)
        if work is not None:
            self._release(work)


class MissingPass(ProtocolError):
    """A gradient for a pass of which nothing is kept any more; the client does it again."""
