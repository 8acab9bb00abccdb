"""Audits of a session: when a hop is examined, and what the examination needs.

The client asks all hops for receipts before it chooses a hop, fetches what the hops have logged on both sides of it,
and checks both against the receipts. The piece of work is then computed again (`splitnet.audit.examine`).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from splitnet.audit.comparison import MIN_POSITIONS
from splitnet.audit.piece import (
    Piece,
    StepRange,
    WeightsUsed,
    check_signature,
    received_digests,
    row_digests,
    sent_digests,
)
from splitnet.blocks.adapters import write_groups
from splitnet.errors import PeerLied, ProtocolError, SplitnetError
from splitnet.limits import TokenBucket
from splitnet.session.failover import RouteHop
from splitnet.session.inference import SentRow, Session
from splitnet.session.requests import StepRequest
from splitnet.wire.codecs import codec_by_code
from splitnet.wire.messages import (
    MAX_PAYLOAD_BYTES,
    AskReceipt,
    Chunk,
    Failure,
    FailureCode,
    FetchedSent,
    FetchSent,
    Message,
    Receipt,
)
from splitnet.wire.receipts import DIGEST, UNKNOWN
from splitnet.wire.sent_log import PAGE

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # within which hops must answer questions of an audit, in addition to the time of transfer
SLOWEST = 1 << 17  # bytes per second that are transferred at least
LOOK_S = 0.5  # between two looks whether a question has become pointless
MOST_PER_MINUTE = 3
"""Examinations that a session begins; as many may be saved up. Each asks a hop two questions, and hops answer no more
than one in ten seconds (`HopSession.count_resent`)."""
COMPUTED = 4  # times that an examination computes a position: exactly, coarsely, and with fewer bits
MOST_ROWS = 16  # rows whose outputs of the last hop a session keeps

Kept = dict[int, bytes]  # encoded outputs of a row, by position in rising order
Answer = TypeVar("Answer", Receipt, FetchedSent)


class Judge(Protocol):
    """What the audits of all sessions of a client share, see `Auditor`."""

    rate: float
    most_positions: int  # of a piece; later positions of a row are not examined

    def audits(self, hop: RouteHop) -> bool: ...

    def is_new(self, hop: RouteHop, stored: bool) -> bool: ...

    def enqueue(self, job: Callable[[], None]) -> Future[None]: ...

    def judge(self, hop: RouteHop, stored: bool, piece: Piece) -> PeerLied | None: ...

    def disagree(self, before: RouteHop, hop: RouteHop) -> PeerLied: ...

    def leave(self, text: str, *hops: RouteHop) -> PeerLied: ...


class SessionAudit:
    """Watches the steps of a session. Methods are called by the thread that uses the session."""

    def __init__(self, session: Session, judge: Judge, model: str, num_blocks: int, hidden_size: int) -> None:
        self._session, self._judge = session, judge
        self._model, self._num_blocks, self._hidden_size = model, num_blocks, hidden_size
        self._kept: dict[int, Kept] = {}  # by row
        self._lengths: dict[int, int] = {}  # positions that all hops have computed, by row
        self._examined: tuple[RouteHop, ...] = ()  # the route whose new hops were examined, or are being examined
        self._used: dict[RouteHop, None] = {}  # all hops of the session, also replaced ones
        self._bucket = TokenBucket()  # of examinations
        self._undrawn = 0  # positions since an examination was last drawn by lot
        self._waiting: list[Future[None]] = []
        self.lie: PeerLied | None = None  # names a hop that has lied
        self._lock = threading.Lock()  # of `_kept`

    def step_begins(self, parts: Sequence[Chunk]) -> None:
        """Drops the outputs of positions that the parts replace, and may begin an examination. Raises PeerLied."""
        self._raise_if_lied()
        with self._lock:
            for part in parts:
                kept = self._kept.get(part.row, {})
                self._lengths[part.row] = min(self._lengths.get(part.row, 0), part.start)
                while kept and next(reversed(kept)) >= part.start:
                    kept.popitem()
        row, hops = random.choice(parts).row, tuple(self._session.hops)
        self._used.update(dict.fromkeys(hops))
        self._undrawn += sum(each.length for each in parts)
        length, now = self._length(row), time.monotonic()
        if not length or self._bucket.wait_s(MOST_PER_MINUTE, now):
            return
        known = len(self._kept.get(row, ())) >= MIN_POSITIONS
        enough = known or length == self._judge.most_positions
        if enough and self._has_new(hops):
            self._begin(row, length, hops, self._is_new)
        elif able := hops if known else hops[:-1]:  # outputs of the last hop are known from the end of the prompt on
            chosen, part = random.choice(able), self._judge.rate * len(hops) * self._undrawn / (COMPUTED * length)
            self._undrawn = 0
            if random.random() < part and self._judge.audits(chosen):
                self._begin(row, length, hops, lambda hop: hop is chosen)

    def step_done(self, request: StepRequest) -> None:
        """Keeps the outputs of the last hop. Raises PeerLied."""
        self._raise_if_lied()
        self._used.update(dict.fromkeys(self._session.hops))
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
                    if position < self._judge.most_positions:
                        kept[position] = bytes(result.payload[index * size : (index + 1) * size])
                if keep:
                    self._lengths[row] = start + length
            while len(self._kept) > MOST_ROWS:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                self._lengths.pop(oldest, None)

    def finish(self) -> None:
        """Examines hops that are new to the client, if that was not begun, and waits for all examinations of the
        session. Call it after the last step of an answer. Raises PeerLied, also if the route was repaired before the
        work of a new hop was examined."""
        length = 0
        for _ in range(2):  # a lost hop may have ended the first examination
            row, hops = next(reversed(self._kept), 0), tuple(self._session.hops)
            if (length := self._length(row)) and self._has_new(hops):
                self._begin(row, length, hops, self._is_new)
            for each in self._waiting:
                with suppress(CancelledError):  # the client is closed
                    each.result()
            self._waiting.clear()
            self._raise_if_lied()
        if length >= MIN_POSITIONS and not self._used.keys() <= set(self._session.hops):
            for hop in filter(self._is_new, self._used):
                raise PeerLied(
                    f"the work of the peer at {hop.endpoint.address} was not examined before the route was repaired: "
                    "ask again"
                )

    def close(self) -> None:
        self._kept = {}

    def _is_new(self, hop: RouteHop) -> bool:
        return self._judge.is_new(hop, self._session.prefix_hit > 0)

    def _raise_if_lied(self) -> None:
        if self.lie is not None:
            self._session.close()  # later hops have computed with false inputs
            raise self.lie

    def _length(self, row: int) -> int:
        return min(self._lengths.get(row, 0), self._judge.most_positions)

    def _has_new(self, hops: tuple[RouteHop, ...]) -> bool:
        return self._examined != hops and any(map(self._is_new, hops))

    def _begin(self, row: int, length: int, hops: tuple[RouteHop, ...], chosen: Callable[[RouteHop], bool]) -> None:
        sent = self._session.sent_row(row, length)
        if sent is None or sent.hops != hops:
            return
        if chosen == self._is_new:
            self._examined = hops
        self._bucket.spend(1, MOST_PER_MINUTE, time.monotonic())
        with self._lock:
            fetched = _Fetched(self._session, sent, dict(self._kept.get(row, {})), lambda: self._kept.get(row, {}))
        self._waiting = [each for each in self._waiting if not each.done()]
        self._waiting.append(self._judge.enqueue(lambda: self._examine(fetched, chosen)))

    def _examine(self, fetched: _Fetched, chosen: Callable[[RouteHop], bool]) -> None:
        """Examines the chosen hops; called by the thread of audits."""
        session, missing = self._session, False
        try:
            fetched.ask_receipts(self._model)
            fetched.check_links()
            for index, hop in enumerate(fetched.sent.hops):
                if not chosen(hop):
                    continue
                piece = self._piece(fetched, index)
                if fetched.is_outdated():
                    raise _Outdated
                if piece is None:
                    missing = True
                elif (lie := self._judge.judge(hop, session.prefix_hit > 0, piece)) is not None:
                    self.lie = self.lie or lie
                    return
            if missing and fetched.sent.length < self._judge.most_positions:
                self._examined = ()
        except _Outdated:
            self._examined = ()  # is examined with later positions
        except _Disagreement as found:
            if fetched.is_outdated():
                self._examined = ()
            else:
                self.lie = self.lie or self._judge.disagree(found.before, found.hop)
        except _NoAnswer as found:
            if fetched.is_outdated():
                self._examined = ()
            else:
                text = f"the peer at {found.hop.endpoint.address} answers no audit: {found}"
                self.lie = self.lie or self._judge.leave(text, found.hop)
        except SplitnetError as error:
            log.info("a piece of work could not be examined: %s", error, extra={"session": session.id.hex()})
        except Exception:  # of the family's code, for example; the thread goes on with other pieces
            log.exception("a piece of work could not be examined")

    def _piece(self, fetched: _Fetched, index: int) -> Piece | None:
        """What a hop was given and gave; None: too little is known. Raises _Disagreement, _NoAnswer, _Outdated."""
        sent, hops, kept = fetched.sent, fetched.sent.hops, fetched.kept
        hop, receipt = hops[index], fetched.receipts[index]
        codec, given = (sent.codec, sent.payload) if not index else (hops[index - 1].codec.code, fetched.log(index - 1))
        told, own = received_digests(receipt), row_digests(given, fetched.ranges)
        stored = -(-max(self._session.prefix_hit, 0) // PAGE) * PAGE
        for position, (one, other) in enumerate(zip(told, own, strict=True)):
            if one == UNKNOWN and position >= stored and not sent.repairs:
                raise _NoAnswer(hop, "its receipt lacks positions that it was given")
            if one not in (other, UNKNOWN):
                if sent.repairs:  # a replaced hop has sent other bytes
                    return None
                raise _Disagreement(hops[index - 1] if index else hop, hop)
        if hop.planned.end == self._num_blocks:
            signed = sent_digests(receipt)
            positions = tuple(position for position in sorted(kept) if signed[position] != UNKNOWN)
            if not sent.repairs and len(positions) < len(kept):
                raise _NoAnswer(hop, "its receipt lacks outputs that it gave")
            outputs = b"".join(kept[position] for position in positions)
        else:
            positions, outputs = tuple(range(sent.length)), fetched.log(index)
        if len(positions) < MIN_POSITIONS:
            return None
        adapter = self._session.state.adapter
        parts = write_groups(adapter.of_blocks(*hop.blocks)) if adapter is not None else []
        size = codec_by_code(sent.codec).bytes_per_position(self._hidden_size)
        inputs = tuple((step.inputs, step.payload[size * step.parts[0].length :]) for step in sent.steps)
        known = positions, outputs, tuple(parts), inputs if any(given for given, _ in inputs) else ()
        piece = Piece(self._model, hop.endpoint.key, hop.blocks, receipt, fetched.ranges, codec, given, *known)
        try:
            piece.check()
        except ProtocolError as error:
            raise _NoAnswer(hop, str(error)) from None
        return piece


class _NoAnswer(SplitnetError):
    def __init__(self, hop: RouteHop, why: str) -> None:
        super().__init__(why)
        self.hop = hop


class _Disagreement(SplitnetError):
    """`hop` was sent something else than `before` says; `before` is `hop`: something else than the client says."""

    def __init__(self, before: RouteHop, hop: RouteHop) -> None:
        super().__init__()
        self.before, self.hop = before, hop


class _Outdated(SplitnetError):
    """The row or the route is another one by now."""


@dataclass
class _Fetched:
    """What the hops of a route have said about a row.

    kept: outputs of the last hop. now: all its outputs that the session keeps by now.
    """

    session: Session
    sent: SentRow
    kept: Kept
    now: Callable[[], Kept]
    receipts: list[Receipt] = field(default_factory=list[Receipt])
    _logs: dict[int, bytes] = field(default_factory=dict[int, bytes])  # by index of the hop

    @property
    def ranges(self) -> tuple[StepRange, ...]:
        """The steps of the row, the last one cut."""
        steps = [StepRange(*step.parts[0][1:3], step.rope_length) for step in self.sent.steps]
        return (*steps[:-1], steps[-1]._replace(length=self.sent.length - steps[-1].start))

    def is_outdated(self) -> bool:
        """Whether the row or the route is another one by now, or a position was sent again."""
        now, sent = self.session.sent_row(self.sent.row, self.sent.length), self.sent
        same = now is not None and (now.hops, now.repairs, now.payload) == (sent.hops, sent.repairs, sent.payload)
        return not same or not self.kept.items() <= self.now().items()

    def ask_receipts(self, model: str) -> None:
        """Asks all hops, before one is chosen. Raises _NoAnswer, _Outdated."""
        asked = [(hop, self.session.ask(hop, AskReceipt, self.sent.row, self.sent.length)) for hop in self.sent.hops]
        for hop, answer in asked:
            receipt = self._answer_of(hop, answer, Receipt, 2 * DIGEST * self.sent.length)
            try:
                check_signature(model, hop.endpoint.key, hop.blocks, receipt)
                facts = receipt.session, receipt.row, receipt.length, receipt.codec
                if facts != (self.session.id, self.sent.row, self.sent.length, hop.codec.code):
                    raise ProtocolError("the receipt is of something else")
                if receipt.weights != hop.weights:
                    raise ProtocolError(f"the receipt says {receipt.weights} weights, and the hop said {hop.weights}")
                WeightsUsed.parse(receipt.weights)
            except ProtocolError as error:
                raise _NoAnswer(hop, str(error)) from None
            self.receipts.append(receipt)

    def check_links(self) -> None:
        """Compares what all neighbours have signed, whichever hop is examined. Raises _Disagreement."""
        for index, hop in enumerate(self.sent.hops[1:] if not self.sent.repairs else ()):  # a replaced hop sent others
            pairs = zip(sent_digests(self.receipts[index]), received_digests(self.receipts[index + 1]), strict=True)
            if any(one != other and UNKNOWN not in (one, other) for one, other in pairs):
                raise _Disagreement(self.sent.hops[index], hop)

    def log(self, index: int) -> bytes:
        """The outputs of a hop from its log, checked against its receipt. Raises _NoAnswer, _Outdated."""
        if index not in self._logs:
            hop, length = self.sent.hops[index], self.sent.length
            size = hop.codec.bytes_per_position(self.session.state.hidden_size)
            if length * size > MAX_PAYLOAD_BYTES:
                raise SplitnetError(f"{length} positions are too many for one message")
            asked = self.session.ask(hop, FetchSent, self.sent.row, length)
            answer = self._answer_of(hop, asked, FetchedSent, length * size)
            if answer.codec != hop.codec.code or len(answer.payload) != length * size:
                raise _NoAnswer(hop, "its log has another size than its outputs")
            self._logs[index] = bytes(answer.payload)
            if row_digests(self._logs[index], self.ranges) != sent_digests(self.receipts[index]):
                raise _NoAnswer(hop, "its log is not what its receipt says")
        return self._logs[index]

    def _answer_of(self, hop: RouteHop, answer: Future[Message], kind: type[Answer], size: int) -> Answer:
        until, message = time.monotonic() + ANSWER_S + size / SLOWEST, None
        while message is None:
            try:
                message = answer.result(LOOK_S)
            except TimeoutError:
                if self.is_outdated():  # the hop was replaced, or the session was closed
                    raise _Outdated from None
                if time.monotonic() > until:
                    raise _NoAnswer(hop, f"within {ANSWER_S + size / SLOWEST:.0f} s") from None
        if isinstance(message, Failure) and message.code == FailureCode.BUSY and self.sent.repairs:
            raise _Outdated  # replays have used up what the hop answers; audits alone do not
        if not isinstance(message, kind):
            raise _NoAnswer(hop, getattr(message, "text", "another answer"))
        return message
