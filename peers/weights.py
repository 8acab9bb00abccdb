"""Sends weights to other peers and clients from a separate thread, with limits per key, and slower while sessions are
served."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from peers.peer_links import ReplyTarget
from splitnet.checkpoint.transfer.weight_pieces import HeldPieces
from splitnet.limits import MINUTE_S, TokenBucket
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import LABEL_BYTES, AskWeights, Failure, FailureCode, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

DEFAULT_RATE: Final = 64 << 20  # bytes per second, to all receivers together
SERVING_SHARE: Final = 0.25  # share of the rate while sessions are served
QUESTION_BYTES: Final = 1024  # bytes that a question counts besides its answer
# Maximum age of the list of present pieces that is sent again, because a new list costs as much as many pieces.
BITS_S: Final = 1.0
WAITING_PER_KEY: Final = 64  # maximum number of waiting questions of one key
MAX_WAITING: Final = 1024  # maximum number of waiting questions of all keys


@dataclass(eq=False)
class WeightService:
    """Answers questions about weights. Thread-safe; close it when done."""

    held: HeldPieces
    outbox: ReplyTarget
    shares: Callable[[], bool]  # whether pieces are sent; the manifest is always sent, because clients need it
    rate: float = DEFAULT_RATE  # bytes per second
    swarm: OpenSwarm = OPEN  # key of a closed swarm
    serving: Callable[[], bool] = lambda: False  # whether sessions are being served
    # Returns the stored page of this name, and whether this call has packed the page; see `PrefixStore.packed`.
    page: Callable[[bytes], tuple[bytes, bool] | None] = lambda _: None

    def __post_init__(self) -> None:
        self.sent = 0  # bytes of pieces that were sent
        self._spent = TokenBucket()
        self._model = bytes.fromhex(self.swarm.place(self.held.manifest.fingerprint))
        self._pieces: dict[bytes, bytes] | None = None  # digests, by their names in a closed swarm
        self._packed: bytes | None = None
        self._bits = b""
        self._bits_at = -math.inf
        self._waiting: OrderedDict[bytes, deque[tuple[Connection, AskWeights]]] = OrderedDict()  # by key, next first
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._answer_all, name="splitnet-weights", daemon=True)
        self.start = self._thread.start

    def receive_request(self, source: Connection, message: AskWeights) -> None:
        with self._changed:
            own = self._waiting.get(source.curve, ())
            if len(own) >= WAITING_PER_KEY or sum(map(len, self._waiting.values())) >= MAX_WAITING:
                self._refuse_request(source, message, FailureCode.BUSY, "too many questions about weights wait here")
                return
            self._waiting.setdefault(source.curve, deque()).append((source, message))
            self._changed.notify()

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _answer_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                if self._closed.is_set():
                    return
                key, questions = self._waiting.popitem(last=False)
                source, message = questions.popleft()
                if questions:
                    self._waiting[key] = questions  # this key comes after all other keys
            try:
                nbytes = self._answer_request(source, message)
            except Exception:
                log.exception("could not send weights")
                nbytes = 0
                self._refuse_request(source, message, FailureCode.INTERNAL, "an error at this peer")
            # Pages have the full rate, because served sessions need them.
            is_page = message.kind == WeightsKind.PAGE
            rate = self.rate * (SERVING_SHARE if self.serving() and not is_page else 1.0)
            # The rate is even: an idle time allows no burst.
            owed = self._spent.spend(nbytes + QUESTION_BYTES, rate * MINUTE_S, time.monotonic())
            self._closed.wait(owed / rate)

    def _answer_request(self, source: Connection, message: AskWeights) -> int:
        """Answers a question; returns the bytes that were sent or read."""
        data: bytes | None = None
        whole = message.kind == WeightsKind.PIECE  # a whole piece is read and hashed for any part
        if message.kind == WeightsKind.PIECE:
            data = self._piece(message.name) if self.shares() else None
        elif message.name == self._model and message.kind == WeightsKind.MANIFEST:
            if self._packed is None:
                self._packed = self.held.manifest.pack()
            data = self._packed
        elif message.name == self._model and message.kind == WeightsKind.HELD and self.shares():
            if time.monotonic() - self._bits_at > BITS_S:
                self._bits, self._bits_at = self.held.bits(), time.monotonic()
            data = self._bits
        elif message.kind == WeightsKind.PAGE:
            data, whole = self.page(message.name[:LABEL_BYTES]) or (None, False)
        if data is None:
            code = FailureCode.WRONG_BLOCKS if message.kind == WeightsKind.PIECE else FailureCode.WRONG_MODEL
            self._refuse_request(source, message, code, "this peer does not send these weights")
            return 0
        part = memoryview(data)[message.offset : message.offset + message.length]
        self.outbox.send(source, WeightsPart(message.number, len(data), part))
        self.sent += len(part)
        return len(data) if whole else len(part)

    def _piece(self, name: bytes) -> bytes | None:
        if self.swarm.is_closed:
            if self._pieces is None:
                self._pieces = {bytes.fromhex(self.swarm.place(one.hex())): one for one in self.held.piece_names}
            name = self._pieces.get(name, b"")
        return self.held.read_piece(name)

    def _refuse_request(self, source: Connection, message: AskWeights, code: FailureCode, text: str) -> None:
        self.outbox.send(source, Failure(b"", 0, message.number, code, text))
