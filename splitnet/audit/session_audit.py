"""Audits of a session: when a hop is examined, and what the examination needs.

The client asks all hops for receipts before it chooses a hop, fetches what the hops have logged on both sides of it,
and checks both against the receipts. The piece of work is then computed again (`splitnet.audit.examine`).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from splitnet.audit.comparison import MIN_POSITIONS
from splitnet.audit.piece import (
    Piece,
    StepRange,
    check_signature,
    received_digests,
    row_digests,
    sent_digests,
)
from splitnet.blocks.adapters import write_groups
from splitnet.errors import PeerFailed, PeerLied, ProtocolError, SplitnetError
from splitnet.session.failover import RouteHop
from splitnet.session.inference import SentRow, Session
from splitnet.session.requests import StepRequest
from splitnet.wire.codecs import codec_by_code
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, AskReceipt, Chunk, FetchedSent, FetchSent, Message, Receipt
from splitnet.wire.receipts import UNKNOWN
from splitnet.wire.sent_log import PAGE

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # within which hops must answer questions of an audit
COMPUTED = 4  # times that an examination computes a position: exactly, coarsely, and with fewer bits
MOST_POSITIONS = 4096  # of a piece; later positions of a row are not examined
MOST_ROWS = 16  # rows whose outputs of the last hop a session keeps

Kept = dict[int, bytes]  # encoded outputs of a row, by position in rising order


class Judge(Protocol):
    """What the audits of all sessions of a client share, see `Auditor`."""

    rate: float

    def is_new(self, hop: RouteHop, stored: bool) -> bool: ...

    def enqueue(self, job: Callable[[], None]) -> Future[None]: ...

    def judge(self, hop: RouteHop, stored: bool, piece: Piece) -> PeerLied | None: ...

    def disagree(self, before: RouteHop, hop: RouteHop) -> PeerLied | None: ...


class SessionAudit:
    """Watches the steps of a session. Methods are called by the thread that uses the session."""

    def __init__(self, session: Session, judge: Judge, model: str, num_blocks: int, hidden_size: int) -> None:
        self._session, self._judge = session, judge
        self._model, self._num_blocks, self._hidden_size = model, num_blocks, hidden_size
        self._kept: dict[int, Kept] = {}  # by row
        self._examined = False  # new hops of the present route are being examined
        self._waiting: list[Future[None]] = []
        self.lie: PeerLied | None = None  # names a hop that has lied
        self._lock = threading.Lock()  # of `_kept`

    def step_begins(self, parts: Sequence[Chunk]) -> None:
        """All positions before the parts are final. Raises PeerLied."""
        self._raise_if_lied()
        with self._lock:
            for part in parts:
                kept = self._kept.get(part.row, {})
                while kept and next(reversed(kept)) >= part.start:
                    kept.popitem()
        part = random.choice(parts)
        if not 0 < part.start <= MOST_POSITIONS:
            return
        hops, new = self._session.hops, sum(each.length for each in parts)
        known = len(self._kept.get(part.row, ()))
        if known >= MIN_POSITIONS and not self._examined and any(map(self._is_new, hops)):
            self._examined = True
            self._begin(part.row, part.start, self._is_new)
        elif random.random() < self._judge.rate * len(hops) * new / (COMPUTED * part.start):
            chosen = int(random.random() * len(hops))
            self._begin(part.row, part.start, lambda hop: hop is hops[chosen])

    def step_done(self, request: StepRequest) -> None:
        """Keeps the outputs of the last hop. Raises PeerLied."""
        self._raise_if_lied()
        result, count = request.result, request.kept
        if result is None or not count:
            return
        size = len(result.payload) // count
        at = iter(range(count))
        with self._lock:
            for row, start, length, keep in request.message.parts:
                kept = self._kept.setdefault(row, {})
                for position in range(start + length - keep, start + length):
                    index = next(at)
                    if position < MOST_POSITIONS:
                        kept[position] = bytes(result.payload[index * size : (index + 1) * size])
            while len(self._kept) > MOST_ROWS:
                del self._kept[next(iter(self._kept))]

    def finish(self) -> None:
        """Examines hops that are new to the client, if that was not begun, and waits for all examinations of the
        session. Call it after the last step of an answer. Raises PeerLied."""
        row = next(reversed(self._kept), None)
        if row is not None and not self._examined and any(map(self._is_new, self._session.hops)):
            self._begin(row, max(self._kept[row], default=-1) + 1, self._is_new)
        wait(self._waiting)
        self._waiting.clear()
        self._raise_if_lied()

    def close(self) -> None:
        self._kept = {}

    def _is_new(self, hop: RouteHop) -> bool:
        return self._judge.is_new(hop, self._session.prefix_hit > 0)

    def _raise_if_lied(self) -> None:
        if self.lie is not None:
            self._session.close()  # later hops have computed with false inputs
            raise self.lie

    def _begin(self, row: int, length: int, chosen: Callable[[RouteHop], bool]) -> None:
        sent = self._session.sent_row(row, length)
        if sent is None or not length:
            self._examined = False
            return
        with self._lock:
            kept = {position: data for position, data in self._kept.get(row, {}).items() if position < length}
        self._waiting = [each for each in self._waiting if not each.done()]
        self._waiting.append(self._judge.enqueue(lambda: self._examine(sent, kept, chosen)))

    def _examine(self, sent: SentRow, kept: Kept, chosen: Callable[[RouteHop], bool]) -> None:
        """Examines the chosen hops; called by the thread of audits."""
        session = self._session
        fetched = _Fetched(session, sent)
        try:
            fetched.ask_receipts(self._model)
            for index, hop in enumerate(sent.hops):
                if not chosen(hop):
                    continue
                piece, lie = self._piece(fetched, index, kept)
                if fetched.is_outdated():
                    return
                if lie is None and piece is not None:
                    lie = self._judge.judge(hop, session.prefix_hit > 0, piece)
                if lie is not None:
                    self.lie = self.lie or lie
                    return
        except _NoAnswer as missing:
            if not fetched.is_outdated():
                error = PeerFailed(f"the peer at {missing.hop.endpoint.address} answers no audit: {missing}")
                session.link_failed(missing.hop.endpoint, error)
        except SplitnetError as error:
            log.info("a piece of work could not be examined: %s", error, extra={"session": session.id.hex()})
        except Exception:  # of the family's code, for example; the thread goes on with other pieces
            log.exception("a piece of work could not be examined")

    def _piece(self, fetched: _Fetched, index: int, kept: Kept) -> tuple[Piece | None, PeerLied | None]:
        """What a hop was given and gave. A lie: the hop, or the link before it, is found out without computing."""
        sent, hops = fetched.sent, fetched.sent.hops
        hop, receipt = hops[index], fetched.receipts[index]
        codec, given = (sent.codec, sent.payload) if not index else (hops[index - 1].codec.code, fetched.log(index - 1))
        told, own = received_digests(receipt), row_digests(given, fetched.ranges)
        stored = -(-max(self._session.prefix_hit, 0) // PAGE) * PAGE
        for position, (one, other) in enumerate(zip(told, own, strict=True)):
            if one == UNKNOWN and position >= stored and not sent.repairs:
                raise _NoAnswer(hop, "its receipt lacks positions that it was given")
            if one not in (other, UNKNOWN):
                if sent.repairs:  # a replaced hop has sent other bytes
                    return None, None
                return None, self._judge.disagree(hops[index - 1] if index else hop, hop)
        if hop.planned.end == self._num_blocks:
            signed = sent_digests(receipt)
            positions = tuple(position for position in sorted(kept) if signed[position] != UNKNOWN)
            if not sent.repairs and len(positions) < len(kept):
                raise _NoAnswer(hop, "its receipt lacks outputs that it gave")
            outputs = b"".join(kept[position] for position in positions)
        else:
            positions, outputs = tuple(range(sent.length)), fetched.log(index)
        if len(positions) < MIN_POSITIONS:
            return None, None
        adapter = self._session.state.adapter
        parts = write_groups(adapter.of_blocks(*hop.blocks)) if adapter is not None else []
        size = codec_by_code(sent.codec).bytes_per_position(self._hidden_size)
        inputs = tuple((step.inputs, step.payload[size * step.parts[0].length :]) for step in sent.steps)
        known = positions, outputs, tuple(parts), inputs if any(given for given, _ in inputs) else ()
        return Piece(self._model, hop.endpoint.key, hop.blocks, receipt, fetched.ranges, codec, given, *known), None


class _NoAnswer(SplitnetError):
    def __init__(self, hop: RouteHop, why: str) -> None:
        super().__init__(why)
        self.hop = hop


@dataclass
class _Fetched:
    """What the hops of a route have said about a row."""

    session: Session
    sent: SentRow
    receipts: list[Receipt] = field(default_factory=list[Receipt])
    _logs: dict[int, bytes] = field(default_factory=dict[int, bytes])  # by index of the hop

    @property
    def ranges(self) -> tuple[StepRange, ...]:
        """The steps of the row, the last one cut."""
        steps = [StepRange(*step.parts[0][1:3], step.rope_length) for step in self.sent.steps]
        return (*steps[:-1], steps[-1]._replace(length=self.sent.length - steps[-1].start))

    def is_outdated(self) -> bool:
        """Whether the row or the route is another one by now."""
        now = self.session.sent_row(self.sent.row, self.sent.length)
        return now is None or (now.hops, now.payload) != (self.sent.hops, self.sent.payload)

    def ask_receipts(self, model: str) -> None:
        """Asks all hops, before one is chosen. Raises _NoAnswer."""
        asked = [(hop, self.session.ask(hop, AskReceipt, self.sent.row, self.sent.length)) for hop in self.sent.hops]
        for hop, answer in asked:
            receipt = _answer_of(hop, answer, Receipt)
            try:
                check_signature(model, hop.endpoint.key, hop.blocks, receipt)
                facts = receipt.session, receipt.row, receipt.length, receipt.codec
                if facts != (self.session.id, self.sent.row, self.sent.length, hop.codec.code):
                    raise ProtocolError("the receipt is of something else")
                if receipt.weights != hop.weights:
                    raise ProtocolError(f"the receipt says {receipt.weights} weights, and the hop said {hop.weights}")
            except ProtocolError as error:
                raise _NoAnswer(hop, str(error)) from None
            self.receipts.append(receipt)

    def log(self, index: int) -> bytes:
        """What a hop has sent on, as it was committed to. Raises _NoAnswer."""
        if index not in self._logs:
            hop, length = self.sent.hops[index], self.sent.length
            size = hop.codec.bytes_per_position(self.session.state.hidden_size)
            if length * size > MAX_PAYLOAD_BYTES:
                raise SplitnetError(f"{length} positions are too many for one message")
            answer = _answer_of(hop, self.session.ask(hop, FetchSent, self.sent.row, length), FetchedSent)
            if answer.codec != hop.codec.code or len(answer.payload) != length * size:
                raise _NoAnswer(hop, "its log has another size than its outputs")
            self._logs[index] = bytes(answer.payload)
            if row_digests(self._logs[index], self.ranges) != sent_digests(self.receipts[index]):
                raise _NoAnswer(hop, "its log is not what its receipt says")
        return self._logs[index]


Answer = TypeVar("Answer", Receipt, FetchedSent)


def _answer_of(hop: RouteHop, answer: Future[Message], kind: type[Answer]) -> Answer:
    try:
        message = answer.result(ANSWER_S)
    except TimeoutError:
        raise _NoAnswer(hop, f"within {ANSWER_S:.0f} s") from None
    if not isinstance(message, kind):
        raise _NoAnswer(hop, getattr(message, "text", "another answer"))
    return message
