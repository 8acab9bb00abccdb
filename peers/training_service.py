"""The work of a peer for clients that train: forward and backward passes over whole sequences, and adapters. Images to
read wait in the same queue, and their pixels use the same memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peers.counters import Counters
from peers.hop_outputs import HopOutputs, timing_of
from peers.peer_links import Outbox
from peers.queue import WorkQueue
from peers.sessions import (
    GradientSum,
    HopSession,
    MemoryAccount,
    MemoryPurpose,
    PassWork,
    SessionTooLong,
    TrainingState,
)
from splitnet.blocks import adapters
from splitnet.blocks.adapters import counted_down
from splitnet.blocks.passes import SavedGraph
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
    ImageFeatures,
    Payload,
)

if TYPE_CHECKING:
    import torch

Request = Forward | Gradient | Adapter | FetchKV

MAX_PASS_POSITIONS = 4096  # maximum number of positions in one pass; a single sequence may be longer


@dataclass(eq=False)
class Training:
    """Passes and adapters of all sessions: a part of the service, under its lock. The engine reports its results."""

    queue: WorkQueue
    outbox: Outbox
    outputs: HopOutputs
    memory: MemoryAccount
    lock: threading.RLock  # of the service
    counters: Counters
    hidden_size: int  # of the model
    max_positions: int | None  # of the model

    def __post_init__(self) -> None:
        # Forward passes with saved graphs, the oldest first, without the pass whose gradient is being computed.
        self._saved: dict[PassWork, None] = {}
        # Sessions of images that wait or are read, by CURVE key and id.
        self.reading: dict[tuple[bytes, bytes], HopSession] = {}

    def receive_request(self, session: HopSession, source: Connection, message: Request, now: float) -> None:
        """Queues the work of a message; the service has checked its sender. Raises ProtocolError or PeerBusy: the
        message is refused."""
        kept = session.training_state.kept
        if isinstance(message, Forward):
            for number in [number for number in kept if number < message.oldest]:
                self._drop_pass(session, number)
            self._put(PassWork(session, message, source, now))
        elif isinstance(message, Gradient):
            forward = kept.get(message.number)
            if forward is None:
                raise MissingPass(f"this peer has no forward pass {message.number} for this gradient")
            check_size(message.codec, message.payload, forward.positions, self.hidden_size)
            work = PassWork(session, message, forward.source, now, forward)
            self._put(work)
            del kept[message.number]
        elif isinstance(message, FetchKV):
            self._put(PassWork(session, message, source, now))
        else:
            self._take_part(session, message, source, now)

    def forget_passes(self, session: HopSession) -> None:
        """Frees the memory of all passes of a session; the adapter stays."""
        for work in self.queue.discard_passes(session):
            self._release_pass(work)
        for number in list(session.training_state.kept):
            self._drop_pass(session, number)

    def end_session(self, session: HopSession) -> None:
        self.forget_passes(session)
        session.adapter, session.training_state = None, TrainingState()
        for work in [work for work in self._saved if work.session is session]:
            self._drop_graph(work)
        self.memory.end_session(session)

    def reserve_graph(self, work: PassWork, nbytes: int) -> bool:
        """Reserves memory for the graph of a forward pass before the pass runs; False: memory is short."""
        with self.lock:
            session = work.session
            account = session.owner, session, MemoryPurpose.GRAPHS
            # The same amount of memory stays free for inputs and adapters, which cannot be recomputed.
            if session.closed or not self.memory.has_room(2 * nbytes, *account):
                return False
            self.memory.take_memory(session, MemoryPurpose.GRAPHS, nbytes)
            work.graph_bytes = nbytes
            return True

    def keep_graph(self, work: PassWork, graph: SavedGraph) -> None:
        """Keeps the graph of a forward pass until its gradient comes or other work needs the memory."""
        with self.lock:
            if not work.session.closed:
                work.graph = graph
                self._saved[work] = None

    def take_graph(self, work: PassWork) -> SavedGraph | None:
        with self.lock:
            self._saved.pop(work, None)
            graph, work.graph = work.graph, None
            return graph

    @staticmethod
    def adapter_of(session: HopSession, message: Forward) -> adapters.AdapterTensors | None:
        """The adapter of a forward pass. Raises ProtocolError: this peer has another version."""
        if message.adapter and message.adapter != session.training_state.adapter_version:
            raise ProtocolError(f"this peer does not have version {message.adapter} of the adapter")
        return session.adapter if message.adapter else None

    @staticmethod
    def added_up(session: HopSession, message: Gradient, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradient with respect to the adapter, for the client: the sum over a batch; empty until the batch's last
        pass."""
        state = session.training_state
        before, state.gradient_sum = state.gradient_sum, None
        # The sum of an abandoned batch has another epoch, or begins at another number.
        if tensors and before is not None and (before.epoch, before.since) == (message.epoch, message.since):
            tensors = {name: before.tensors[name] + tensor for name, tensor in tensors.items()}
        if tensors and message.held:
            state.gradient_sum = GradientSum(message.epoch, message.since, tensors)
            return {}
        return tensors

    def forwarded(self, work: PassWork, payload: Payload) -> None:
        """Sends the output of a forward pass, and keeps its input if a gradient may follow."""
        with self.lock:
            session, message = work.session, work.message
            assert isinstance(message, Forward)
            if session.closed or message.epoch != session.epoch:
                self._release_pass(work)
                return
            self.outputs.finish_pass(work, message, payload)
            if message.kept:
                self._drop_pass(session, message.number)
                session.training_state.kept[message.number] = work
            else:
                self._release_pass(work)

    def backward_done(self, work: PassWork, payload: Payload, parts: list[bytes]) -> None:
        """Sends the gradient with respect to the input to the previous hop, and that with respect to the adapter to the
        client."""
        with self.lock:
            session, message, forward = work.session, work.message, work.forward
            assert isinstance(message, Gradient) and forward is not None and isinstance(forward.message, Forward)
            self._release_pass(work)
            if session.closed or message.epoch != session.epoch:
                return
            ids = session.id, message.epoch, message.number
            for remaining, part in counted_down(parts):
                self.outbox.send(session.reply_to, AdapterGradient(*ids, remaining, part))
            codec = forward.message.gradient_codec
            timings = (*message.timings, timing_of(work, self.outbox))
            back = replace(message, boundary=session.start, codec=codec, payload=payload, timings=timings)
            self.outbox.send(work.source, back)

    def adapter_loaded(self, work: PassWork, adapter: adapters.AdapterTensors) -> None:
        with self.lock:
            session, message, state = work.session, work.message, work.session.training_state
            assert isinstance(message, Adapter)
            session.adapter, state.adapter_version, state.gradient_sum = adapter, message.version, None
            # The memory of the former version and of its gradient sum is free.
            former, state.adapter_bytes = state.adapter_bytes, work.nbytes
            self.memory.give_back(session, MemoryPurpose.ADAPTERS, former)
            if not session.closed:
                self.outbox.send(session.reply_to, AdapterLoaded(session.id, session.epoch, message.version))

    def fetched_kv(self, work: PassWork, parts: list[bytes]) -> None:
        with self.lock:
            session, message = work.session, work.message
            assert isinstance(message, FetchKV)
            self._release_pass(work)
            ids = session.id, message.epoch, message.number
            for remaining, part in counted_down(parts if not session.closed else ()):
                self.outbox.send(session.reply_to, FetchedKV(*ids, remaining, part))

    def put_images(self, work: PassWork) -> None:
        """Queues images to read. Raises PeerBusy: memory is short, or too much work of the key waits."""
        self._put(work)
        self.reading[work.session.owner, work.session.id] = work.session

    def images_read(self, work: PassWork, features: ImageFeatures) -> None:
        with self.lock:
            self._release_pass(work)
            self.outbox.send(work.source, features)

    def report_failure(self, work: PassWork, code: FailureCode, text: str) -> None:
        with self.lock:
            self.counters.refused[code] += 1
            session, message = work.session, work.message
            self._release_pass(work)
            if not session.closed:
                number: int = getattr(message, "number", 0)
                self.outbox.send(session.reply_to, Failure(session.id, message.epoch, number, code, text[:500]))

    def check_lengths(self, message: Forward) -> None:
        """Raises ProtocolError: the sequences of a pass are none, or longer than the model or this peer allows."""
        if not message.lengths or not all(message.lengths):
            raise ProtocolError("a pass has no sequences, or an empty one")
        longest = max(message.lengths)
        if self.max_positions is not None and longest > self.max_positions:
            raise SessionTooLong(f"{longest} positions are more than the model's context")
        if message.positions > max(MAX_PASS_POSITIONS, longest):
            raise SessionTooLong(f"a pass has at most {MAX_PASS_POSITIONS} positions")
        codec_by_code(message.gradient_codec)

    def _put(self, work: PassWork) -> None:
        """Queues a pass, and reserves its memory. Raises PeerBusy, and keeps no memory: the pass is refused."""
        purpose, nbytes = _purpose_of(work), work.nbytes - (work.forward.nbytes if work.forward is not None else 0)
        if purpose is MemoryPurpose.PASSES:  # for an adapter, memory was reserved with each part
            self._take_memory(work.session, purpose, nbytes)
        try:
            self.queue.put_pass(work)
        except PeerBusy:
            self.memory.give_back(work.session, purpose, nbytes)
            raise

    def _take_part(self, session: HopSession, message: Adapter, source: Connection, now: float) -> None:
        """Takes in a part of an adapter; a part that does not follow the last one begins another version."""
        if not message.payload:
            raise ProtocolError("a part of an adapter is empty")
        state = session.training_state
        last = state.adapter_parts[-1] if state.adapter_parts else None
        if last is not None and (last.version, last.remaining) != (message.version, message.remaining + 1):
            self._release_pass(PassWork(session, last, source, now, parts=state.adapter_parts))
            state.adapter_parts = []
        self._take_memory(
            session, MemoryPurpose.ADAPTERS, PassWork(session, message, source, now, parts=[message]).nbytes
        )
        state.adapter_parts.append(message)
        if not message.remaining:
            work = PassWork(session, message, source, now, parts=state.adapter_parts)
            state.adapter_parts = []
            self._put(work)

    def _take_memory(self, session: HopSession, purpose: MemoryPurpose, nbytes: int) -> None:
        """Reserves memory, after dropping saved graphs if necessary. Raises PeerBusy: there is too little
        memory."""
        while self._saved and not self.memory.has_room(nbytes, session.owner, session, purpose):
            own = (work for work in self._saved if work.session.owner == session.owner)
            self._drop_graph(next(own, None) or next(iter(self._saved)))
        self.memory.take_memory(session, purpose, nbytes)

    def _drop_graph(self, work: PassWork) -> None:
        self._saved.pop(work, None)
        self.memory.give_back(work.session, MemoryPurpose.GRAPHS, work.graph_bytes)
        work.graph, work.graph_bytes = None, 0

    def _release_pass(self, work: PassWork) -> None:
        for one in (work, work.forward):
            if one is not None:
                self._drop_graph(one)
        self.memory.give_back(work.session, _purpose_of(work), work.nbytes)
        self.reading.pop((work.session.owner, work.session.id), None)

    def _drop_pass(self, session: HopSession, number: int) -> None:
        work = session.training_state.kept.pop(number, None)
        if work is not None:
            self._release_pass(work)


def _purpose_of(work: PassWork) -> MemoryPurpose:
    return MemoryPurpose.ADAPTERS if isinstance(work.message, Adapter) else MemoryPurpose.PASSES


class MissingPass(ProtocolError):
    """A gradient for a forward pass that is not kept; the client repeats the pass."""
