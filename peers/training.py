"""What a peer keeps and does for clients that train: passes over whole sequences, forward and backward, and adapters.

A part of the service: messages come under the service's lock. What the engine has computed it brings itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

from peers.counters import Counters
from peers.outbox import Outbox, timing_of
from peers.row_memory import SessionTooLong
from peers.served_blocks import ServedBlocks
from peers.session import PassWork, Session
from peers.work_queue import WorkQueue
from splitnet.errors import PeerBusy, ProtocolError
from splitnet.model.adapters import counted_down
from splitnet.net.codecs import codec_by_code
from splitnet.net.endpoints import Connection
from splitnet.net.messages import (
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

MAX_PASS_POSITIONS = 4096
"""Of a pass, unless a single sequence is longer."""

ADAPTER_COPIES = 2
"""The adapter, and the sum of its gradients."""


class TrainingMemory:
    """Bytes of what is kept for clients that train: inputs of passes, and adapters.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0

    def take(self, session: Session, nbytes: int) -> None:
        """Raises PeerBusy if there is no room."""
        if self.used + nbytes > self.capacity:
            raise PeerBusy(
                f"no memory to keep {nbytes} bytes for training: {self.capacity - self.used} of {self.capacity} are "
                "free; train with fewer positions at a time"
            )
        self.used += nbytes
        session.training_bytes += nbytes

    def give_back(self, session: Session, nbytes: int) -> None:
        self.used -= nbytes
        session.training_bytes -= nbytes


class Training:
    """Passes and adapters of all sessions.

    Args:
        served: what this peer serves.
        queue: where passes wait for the device.
        outbox: where messages go.
        memory: what may be kept.
        lock: of the service.
        counters: what the peer counts.
    """

    def __init__(
        self,
        served: ServedBlocks,
        queue: WorkQueue,
        outbox: Outbox,
        memory: TrainingMemory,
        lock: threading.RLock,
        counters: Counters,
    ) -> None:
        self._served = served
        self._queue = queue
        self._outbox = outbox
        self._memory = memory
        self._lock = lock
        self._counters = counters

    def receive(self, session: Session, source: Connection, message: Request, now: float) -> None:
        """Takes a message in that its sender may send.

        Raises:
            ProtocolError, PeerBusy: it is refused.
        """
        if isinstance(message, Forward):
            self._check(message)
            for number in [number for number in session.kept if number < message.oldest]:
                self._drop(session, number)
            self._memory.take(session, len(message.payload))
            try:
                self._queue.put_pass(PassWork(session, message, source, now))
            except PeerBusy:
                self._memory.give_back(session, len(message.payload))
                raise
        elif isinstance(message, Gradient):
            work = session.kept.pop(message.number, None)
            if work is None:
                raise MissingPass(f"there is no pass {message.number} to go back from")
            assert isinstance(work.message, Forward)
            try:
                self._served.check_payload(message.codec, message.payload, work.message.positions)
                self._queue.put_pass(PassWork(session, message, work.source, now, work.message))
            except (ProtocolError, PeerBusy):
                self._memory.give_back(session, len(work.message.payload))
                raise
        elif isinstance(message, FetchKV):
            self._queue.put_pass(PassWork(session, message, source, now))
        else:
            self._memory.take(session, ADAPTER_COPIES * len(message.payload))
            session.adapter_parts.append(message)
            if message.version != session.adapter_parts[0].version:
                self._give_back_parts(session)
                raise ProtocolError("an adapter came in parts of different versions")
            if not message.remaining:
                try:
                    self._queue.put_pass(PassWork(session, message, source, now))
                except PeerBusy:
                    self._give_back_parts(session)
                    raise

    def forget(self, session: Session) -> None:
        """Lets go of all that is kept for the passes of a session; its adapter stays."""
        for work in self._queue.discard_passes(session):
            self._release(work)
        for number in list(session.kept):
            self._drop(session, number)

    def end(self, session: Session) -> None:
        """Lets go of everything of a session."""
        self.forget(session)
        session.adapter, session.adapter_version, session.gradient_sum = None, 0, None
        session.adapter_parts.clear()
        self._memory.give_back(session, session.training_bytes)

    def forwarded(self, work: PassWork, payload: Payload) -> None:
        """Sends on the output of a forward pass, and keeps its input if a gradient may follow."""
        with self._lock:
            session, message = work.session, work.message
            assert isinstance(message, Forward)
            if session.closed or message.epoch != session.epoch:
                self._release(work)
                return
            session.last = max(session.last, message.number)
            timings = (*message.timings, timing_of(work, self._outbox))
            codec = session.codec.code
            if session.next is not None:
                onward = replace(message, codec=codec, payload=payload, boundary=session.end, timings=timings)
                self._outbox.send(session.next, onward)
            else:
                result = Result(session.id, message.epoch, message.number, session.end, codec, timings, payload)
                self._outbox.send(session.reply_to, result)
            if message.kept:
                self._drop(session, message.number)
                session.kept[message.number] = work
            else:
                self._release(work)

    def went_back(self, work: PassWork, payload: Payload, parts: list[bytes]) -> None:
        """Sends the gradient by the input up the route, and that by the adapter to the client."""
        with self._lock:
            session, message, forward = work.session, work.message, work.forward
            assert isinstance(message, Gradient) and forward is not None
            self._release(work)
            if session.closed or message.epoch != session.epoch:
                return
            for remaining, part in counted_down(parts):
                self._outbox.send(
                    session.reply_to, AdapterGradient(session.id, message.epoch, message.number, remaining, part)
                )
            codec = forward.gradient_codec
            self._outbox.send(work.source, replace(message, boundary=session.start, codec=codec, payload=payload))

    def adapter_loaded(self, work: PassWork) -> None:
        """The engine has taken an adapter over."""
        with self._lock:
            session, message = work.session, work.message
            assert isinstance(message, Adapter)
            # Of the former version, whose memory is free now, only the new one's parts remain accounted for.
            former, session.adapter_bytes = session.adapter_bytes, _nbytes(session.adapter_parts)
            session.adapter_parts.clear()
            if session.closed:
                return
            self._memory.give_back(session, former)
            self._outbox.send(session.reply_to, AdapterLoaded(session.id, session.epoch, message.version))

    def fetched_kv(self, work: PassWork, parts: list[bytes]) -> None:
        """Sends the client the keys and values that it has asked for."""
        with self._lock:
            session, message = work.session, work.message
            assert isinstance(message, FetchKV)
            for remaining, part in counted_down(parts if not session.closed else ()):
                self._outbox.send(
                    session.reply_to, FetchedKV(session.id, message.epoch, message.number, remaining, part)
                )

    def failed(self, work: PassWork, code: FailureCode, text: str) -> None:
        """Tells the client that the device could not do it."""
        with self._lock:
            self._counters.refused[code] += 1
            session, message = work.session, work.message
            if not isinstance(message, Adapter):
                self._release(work)
            elif not session.closed:
                self._give_back_parts(session)
            if not session.closed:
                failure = Failure(session.id, message.epoch, number_of(message), code, text[:500])
                self._outbox.send(session.reply_to, failure)

    def _check(self, message: Forward) -> None:
        if not message.lengths or not all(message.lengths):
            raise ProtocolError("a pass has no sequences, or an empty one")
        longest = max(message.lengths)
        if self._served.max_positions is not None and longest > self._served.max_positions:
            raise SessionTooLong(f"{longest} positions are more than the model's context")
        if message.positions > max(MAX_PASS_POSITIONS, longest):
            raise SessionTooLong(f"a pass has at most {MAX_PASS_POSITIONS} positions")
        codec_by_code(message.gradient_codec)
        self._served.check_payload(message.codec, message.payload, message.positions)

    def _release(self, work: PassWork) -> None:
        forward = work.message if isinstance(work.message, Forward) else work.forward
        if forward is not None and not work.session.closed:
            self._memory.give_back(work.session, len(forward.payload))

    def _drop(self, session: Session, number: int) -> None:
        work = session.kept.pop(number, None)
        if work is not None:
            self._release(work)

    def _give_back_parts(self, session: Session) -> None:
        self._memory.give_back(session, _nbytes(session.adapter_parts))
        session.adapter_parts.clear()


def _nbytes(parts: Iterable[Adapter]) -> int:
    return ADAPTER_COPIES * sum(len(part.payload) for part in parts)


def number_of(message: Request) -> int:
    """What a failure of the message is about; 0: no pass."""
    return 0 if isinstance(message, Adapter) else message.number


class MissingPass(ProtocolError):
    """A gradient for a pass of which nothing is kept any more; the client does it again."""
