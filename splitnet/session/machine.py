"""The life of a session as a state machine: events in, effects out. No socket, thread, clock, queue or tensor.

    NEW ──> PLANNING ──> OPENING ──> LOADING ──> REPLAYING ──> OPEN
               ^            │           │            │          │
               └────────────┴───────────┴────────────┴──────────┘  a hop is lost, or a better route is there
    any ──> BROKEN  no route: the next use tries again, with the hops that are left
    any ──> CLOSED

A hop that fails in any way counts as dead: it is banned and replaced. Other peers are planned for just the lost blocks,
the route is opened again in a new epoch (messages of the old one are dropped), logs fill the replacements (see
`splitnet.session.failover`), and requests under way are sent again. A cache that may be wrong is computed again, never
used. Waiting is bounded by progress: by how long nothing came, not by totals.

The model is the worker of Dask's distributed (`distributed/worker_state_machine.py`) and h11 (`h11/_state.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from scheduler.liveness import (
    ANSWER_S,
    DECODE_PROGRESS_S,
    MAX_QUEUE_S,
    OPEN_TIMEOUT_S,
    PROGRESS_TIMEOUT_S,
    RECOVERY_TIMEOUT_S,
    Alive,
    Finding,
    Liveness,
    Verdict,
    silence_s,
)
from splitnet.blocks.adapters import Adapter, counted_down, write_groups
from splitnet.errors import (
    AdapterError,
    ContextTooLong,
    NotAuthorized,
    NotFinite,
    OtherWeights,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    ProtocolError,
    SessionClosed,
    SessionLost,
    SplitnetError,
    WrongSwarm,
)
from splitnet.session import events
from splitnet.session.events import TRANSITIONS, Cause, Phase, Recovered
from splitnet.session.failover import PeerSilent, RouteHop, RouteSetup, Source, cause_of, next_refill
from splitnet.session.requests import PassRequest, ReplayRequest, Request, StepRequest, check_beside, undone_by
from splitnet.swarm.plan import ALIKE_AGAIN, HeldBlocks, PlannedHop, blocks_text
from splitnet.swarm.swarm import Kind, short_key
from splitnet.wire.codecs import Codec, check_values, codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import (
    MAX_LABELS,
    AdapterLoaded,
    Close,
    CopiedPages,
    Failure,
    FailureCode,
    Forward,
    Gradient,
    Message,
    Open,
    Opened,
    Result,
    Step,
    Timing,
)
from splitnet.wire.messages import Adapter as AdapterMessage
from splitnet.wire.sent_log import PAGE, SentLog, digest

POLL_S = 0.5  # between two plans where no peer serves some blocks
COPY_S = 20.0  # hops get pages from others for this time at most
WORTH_COPYING = 16 * PAGE  # positions that another peer must have beyond those of a hop
MAX_ATTEMPTS = 8  # routes that may fail before an answer comes on one
_NOT_BANNED = (SessionLost, PeerBusy, NotAuthorized, OtherWeights)
"""Errors of peers that are not at fault, but of no use for this session."""
_FORGETFUL = (FailureCode.UNKNOWN_SESSION, FailureCode.OUT_OF_ORDER, FailureCode.STALE_EPOCH, FailureCode.TOO_LONG)
"""A hop that says so once may be right: it restarted, or has work of an older epoch to do."""
_OF_WHAT_CAME = (FailureCode.BAD_MESSAGE, FailureCode.OUT_OF_ORDER, FailureCode.TOO_LONG, FailureCode.NOT_FINITE)
"""A hop says so rightly if its feeder sends on something else than it should."""
_ERROR_OF_CODE: dict[int, type[SplitnetError]] = {
    FailureCode.BUSY: PeerBusy,
    FailureCode.WRONG_MODEL: WrongSwarm,
    FailureCode.TOO_LONG: ContextTooLong,
    FailureCode.UNKNOWN_SESSION: SessionLost,
    FailureCode.OUT_OF_ORDER: SessionLost,
    FailureCode.STALE_EPOCH: SessionLost,
    FailureCode.LEAVING: PeerLeaving,
}


@dataclass(slots=True)
class _Faults:
    """Faults since an answer came, or since nothing was under way.

    attempts: routes that have failed. suspects: hops that may lose requests. strikes: how often peers had forgotten the
    session, by name. complaints: peers by the failure that they have answered with; 0: an answer that cannot be used.
    refusing: peers that have refused what a hop sent on, by its name.
    """

    attempts: int = 0
    suspects: list[Endpoint] = field(default_factory=list[Endpoint])
    strikes: dict[str, int] = field(default_factory=dict[str, int])
    complaints: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    refusing: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


class SessionState:
    """A session: its route, the requests under way on it, and the answer to each event.

    Args:
        model: fingerprint of the weights.
        blocks: `[start, end)`, which the hops run.
        reservation: positions of KV cache to reserve on every hop, over all rows.
        progress_timeout_s: how long hops may work without any progress.
        recovery_timeout_s: how long to wait for other peers when some blocks are not served any more.
        any_weights: whether weights may be held otherwise than before, if no peer holds them so.
        answer_s: in which time a hop that lives answers a ping.

    Attributes:
        held: what the weights of blocks are held as, on the last route that stood; empty: none has.
        first_codec: of the client's own link to the first hop.
        log: what the client itself has sent; None before the first step.
        error: why there is no route, until the next `Use`.
        refusal: why the last `Resize` was refused, if nothing else changed.
        taps: boundaries at which hops send the client hidden states, in rising order; set before the first use.
        tap_codec: of these.
        timings: of the last step, hop by hop, as the tail says.
        chunk_ms: predicted time of a chunk of a replay, set by the driver during one; 0: not known.
        usual_ms: usual time of a decode step, set by the driver; 0: not known.
        salt: of the labels of pages, set before the first use; None: hops store none.
        shared: pages are shared with other keys, where the owners of peers let them.
        recalled: positions of the text that a hop had stored before, so that it goes on behind them.
        reused: those that all hops had stored.
        sources: peers that may have stored pages of the text, set by the driver.
    """

    def __init__(
        self,
        session: bytes,
        *,
        model: str,
        blocks: tuple[int, int],
        hidden_size: int,
        reservation: int,
        max_positions: int | None = None,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
        recovery_timeout_s: float = RECOVERY_TIMEOUT_S,
        any_weights: bool = False,
        answer_s: Callable[[Endpoint], float] = lambda _: ANSWER_S,
    ) -> None:
        self.session = session
        self.blocks = blocks
        self.hidden_size = hidden_size
        self.reservation = max(1, reservation)
        self.phase = Phase.NEW
        self.epoch = 0
        self.hops: list[RouteHop] = []
        self.held: tuple[HeldBlocks, ...] = ()
        self.first_codec: Codec = codec_by_name("none")
        self.adapter: Adapter | None = None
        self.adapter_version = 0
        self.log: SentLog | None = None
        self.recoveries: list[Recovered] = []
        self.error: SplitnetError | None = None
        self.refusal: SplitnetError | None = None
        self.taps: tuple[int, ...] = ()
        self.tap_codec: Codec = codec_by_name("none")
        self.timings: tuple[Timing, ...] = ()
        self.chunk_ms = self.usual_ms = 0.0
        self.salt: bytes | None = None
        self.shared = False
        self.recalled = self.reused = 0
        self.sources: tuple[Source, ...] = ()
        self._model = model
        self._max_positions = max_positions
        self._progress_timeout_s = progress_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._any_weights = any_weights
        self._answer_s = answer_s
        self.next_number = itertools.count(1).__next__
        self._now = 0.0
        self._effects: list[events.Effect] = []
        self._in_flight: dict[int, Request[Any]] = {}
        self._faults = _Faults()
        self._liveness = Liveness(answer_s)
        self._setup: RouteSetup | None = None
        self._has_stood = False  # there was a route before
        # Hops that are to answer an `Open` or an adapter, and until when; those that were asked and cannot.
        self._asked: dict[Endpoint, float] = {}
        self._failed: dict[Endpoint, SplitnetError] = {}
        # Peers that were sent an `Open`, for which blocks, and no `Close` since.
        self._members: dict[Endpoint, tuple[int, int]] = {}
        # Hops that were opened without a next hop, as they do not reach it.
        self._relays: set[Endpoint] = set()
        # Replays under way, and the hops that they fill.
        self._replays: dict[int, ReplayRequest] = {}
        self._filling: list[RouteHop] = []
        # The names of hops that were given up as they did not answer in time.
        self._silenced: dict[Endpoint, str] = {}
        # Names of peers that do not send hidden states where this session wants them.
        self._for_passes = False
        self._recall: events.Recall | None = None  # whose positions the log has, although they were not submitted
        self._adapter_label: tuple[int, bytes] = 0, b""  # with the version that it is of
        self._opened_reservation = 0  # what the hops were asked to reserve when the route was opened
        self._former_reservation = 0  # before a resize that no route stands with yet; 0: there is none

    def __str__(self) -> str:
        """What it does now, for people."""
        setup = self._setup
        if setup is None:
            return str(self.phase)
        waits = ["waits"] if setup.retry_at < math.inf else []
        refused = sorted({type(error).__name__ for error in setup.refused.values()})
        return f"{self.phase} ({', '.join([setup.cause, *waits, *refused])})"

    @property
    def is_open(self) -> bool:
        return self.phase is Phase.OPEN

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being made or loaded."""
        return self.phase in (Phase.NEW, Phase.OPEN, Phase.BROKEN, Phase.CLOSED)

    @property
    def under_way(self) -> int:
        """Requests that are not answered."""
        return len(self._in_flight)

    @property
    def first(self) -> Endpoint:
        """The hop that the client sends to."""
        return self.hops[0].endpoint

    @property
    def tail(self) -> Endpoint:
        """The hop that runs the last of the blocks."""
        return self.hops[-1].endpoint

    def endpoints(self) -> list[Endpoint]:
        """All hops in order."""
        return [hop.endpoint for hop in self.hops]

    def maker_of(self, boundary: int) -> Endpoint:
        """The hop that runs the block before a boundary."""
        return next(hop.endpoint for hop in self.hops if hop.blocks[0] < boundary <= hop.blocks[1])

    def adapted_hops(self) -> dict[Endpoint, dict[str, Tensor]]:
        """Hops with a part of the adapter, and that part."""
        parts = {hop.endpoint: self.adapter.within(*hop.blocks) for hop in self.hops} if self.adapter else {}
        return {each: part for each, part in parts.items() if part}

    @property
    def wake_at(self) -> float:
        """When a `Tick` is due, in seconds of the clock of `handle`."""
        times = list(self._asked.values())
        setup = self._setup  # read once: another thread may handle an event meanwhile
        if setup is not None:
            times.append(setup.retry_at)
        if self._awaits_hops:
            times.append(self._liveness.wake_at(self._silence_s))
        return min(times, default=math.inf)

    def send(self, endpoint: Endpoint, message: Message) -> None:
        """Has a message sent; for requests."""
        if isinstance(message, Step) and message.labels and self.salt is None:
            message = replace(message, labels=())
        self._effects.append(events.Send(endpoint, message))

    def handle(self, event: events.Event, now: float) -> list[events.Effect]:
        """Takes in an event, and returns what is to be done, in order. now: seconds of a clock that never goes back."""
        self._now, self._effects = now, []
        match event:
            case _ if self.phase is Phase.CLOSED:
                pass
            case events.Received():
                self._received(event.source, event.message)
            case events.Submit():
                self._submit(event.requests)
            case events.Backward():
                for request in event.batch.passes:
                    self._put_under_way(request)
                if self.is_open:
                    event.batch.go_back(event.adapter, self)
                self._use()
            case events.Abandon():
                for number in event.numbers:
                    self._in_flight.pop(number, None)
            case events.Use():
                self._use()
            case events.Recall():
                self._begin_text(event)
            case events.Tick():
                self._tick()
            case Alive():
                if event.late:
                    self._wait_longer(event.endpoint)
                elif (name := self._silenced.pop(event.endpoint, None)) is not None:
                    self._effects.append(events.Unban(name))  # it was not dead, but far away
                if self._liveness.answered(event):
                    self._judge()
            case events.LinkFailed():
                self._link_failed(event.endpoint, event.error)
            case events.Planned():
                self._planned(event)
            case events.NoRoute():
                self._no_route(event)
            case events.Resize():
                self._resize(event.reservation)
            case events.UseAdapter():
                if event.adapter is not self.adapter:
                    self.adapter, self._for_passes = event.adapter, event.for_passes
                    self.adapter_version += 1
                    if self.is_open:
                        self._load_adapter()
            case events.Move():
                self._move(event)
            case events.Distrust():
                self._distrust(event)
            case events.Close():
                self._close()
        return self._effects

    # What the caller wants.

    def _use(self) -> None:
        if self.phase in (Phase.NEW, Phase.BROKEN):
            self.error = None
            self._begin_setup()
            self._go_on()

    def _submit(self, requests: Sequence[Request[Any]]) -> None:
        for request in requests:
            if isinstance(request, StepRequest):
                try:
                    # A hop that had lost a step which replaces others could not tell, and would store what it replaces.
                    sure = not any(getattr(each, "replaces", False) for each in self._in_flight.values())
                    request.replaces = self._replaces(request.message)
                    labels = self._record(request.message)
                    sure &= self.salt is not None and len(labels) + len(request.message.parts) <= MAX_LABELS
                    request.message = replace(request.message, labels=labels if sure else ())
                except SplitnetError as error:
                    request.error = error
                    continue
            self._put_under_way(request)
            if self.is_open:
                request.send(self)
        if self._in_flight:
            self._use()  # a hop may have left since the caller found the route open

    def _begin_text(self, event: events.Recall) -> None:
        if self.salt is None or self._in_flight or self.phase not in (Phase.NEW, Phase.OPEN, Phase.BROKEN):
            return
        self._recall, self.log, self.recalled, self.reused = event, None, 0, 0
        if self.is_open:
            self._go_on()

    def _expect(self, recall: events.Recall) -> None:
        """Logs what hops may have stored before, so that its labels are known, and hops that lack it can be filled."""
        try:
            self.log = recall.log(self.first_codec, self.hidden_size, self.salt)
        except SplitnetError:  # the step has the same fault, and says so to the caller
            self._recall = self.log = None

    def _settle_recall(self, recall: events.Recall) -> None:
        """All hops have said what they hold of a text: the log keeps the most that one has, and fills the others."""
        assert self.log is not None
        self._recall = None
        for hop in self.hops:
            if not hop.recalled:
                hop.cached_positions = 0
        most = len(self.log.labels(recall.part.row)) * PAGE
        self.recalled = min(most, max(hop.cached_positions for hop in self.hops)) // PAGE * PAGE
        self.reused = min(self.recalled, min(hop.cached_positions for hop in self.hops))
        if self.recalled:
            self.log.crop(recall.part.row, self.recalled)
        else:
            self.log = None

    def _new_log(self) -> SentLog:
        return SentLog(self.first_codec.code, self.first_codec.bytes_per_position(self.hidden_size), self.salt)

    def _record(self, step: Step) -> tuple[bytes, ...]:
        """Logs a step, and returns the labels of its pages. Steps that hops would rightly refuse are refused here, so a
        hop that refuses others is wrong."""
        if self.log is None:
            self.log = self._new_log()
        longest = max((part.start + part.length for part in step.parts), default=0)
        if self._max_positions is not None and longest > self._max_positions:
            raise ContextTooLong(f"position {longest} is beyond the model's context of {self._max_positions}")
        under_way = [each for each in self._in_flight.values() if isinstance(each, StepRequest)]
        check_beside(step, under_way)
        labels = self.log.record(step.parts, step.forks, step.payload, step.reach)
        for request in undone_by(step, under_way):
            request.error = SplitnetError("a later step of the session began before the end of this one")
            self._in_flight.pop(request.number)
        return labels

    def _replaces(self, step: Step) -> bool:
        """Whether hops hold other positions now in the place of those of a step."""
        log = self.log
        return log is not None and any(part.start < log.length(part.row) for part in step.parts)

    def _put_under_way(self, request: Request[Any]) -> None:
        if not self._in_flight:
            self._liveness.heard(self._now)
        self._in_flight[request.number] = request

    def _distrust(self, event: events.Distrust) -> None:
        """Replaces the sender of a useless answer; on a second one all hops involved; on a third the error is real."""
        request, where = event.request, event.source
        request.result, self.salt = None, None  # pages may have been computed from what was wrong
        self._put_under_way(request)
        error = PeerFailed(f"the peer at {where.address} {event.why}")
        hop = self._hop_at(where)
        if not request.makers:
            request.makers = [each.name for each in self.hops]
            lost = [hop] if hop is not None else []
        else:
            lost = [each for each in self.hops if each.name in request.makers]
            request.useless += 1
            if not lost or request.useless > 1:  # where no other peer serves their blocks, the same ones come again
                self._believe(0, error)
                return
            for each in self.hops:  # what those that stay have computed was made of what these sent on
                if each not in lost:
                    each.forget()
                    self._leave(each.endpoint)
        self._reopen({each.endpoint: error for each in lost}, Cause.LOST)

    def _resize(self, reservation: int) -> None:
        """The route is opened anew: a hop that has lost the session meanwhile is found out before it computes."""
        self.refusal = None
        if reservation > self.reservation:
            self._former_reservation = self._former_reservation or self.reservation
            self.reservation = reservation
            if self.is_open:
                self._go_on()

    def _move(self, event: events.Move) -> None:
        if self.is_open and not self._in_flight:
            setup = self._begin_setup()
            setup.cause = Cause.BETTER_ROUTE
            setup.reasons.append("there is a better route")
            self._open_route(event.route, event.codecs)

    def _close(self) -> None:
        for endpoint in list(self._members):
            self._leave(endpoint)
        self._end_requests(SessionClosed("the session was closed while it was used: begin with a new one"))
        self.log = None
        self._enter(Phase.CLOSED)

    # Planning a route.

    def _begin_setup(self) -> RouteSetup:
        if self._setup is None:
            self._setup = RouteSetup(self._now, repairs=self._has_stood)
        return self._setup

    def _reopen(self, lost: dict[Endpoint, SplitnetError], cause: Cause, reason: str = "") -> None:
        """Makes the route whole without the lost hops; if nothing waits for it, with the next use."""
        idle = self.is_open and not self._in_flight
        setup = self._begin_setup()
        if not setup.reasons:
            setup.cause = cause
        if reason:
            setup.reasons.append(reason)
        for endpoint, error in lost.items():
            self._give_up(endpoint, error)
        if idle or (self.phase is Phase.BROKEN and not self._in_flight):
            self._stop_waiting()
            self._enter(Phase.BROKEN)
            return
        # A hop that refuses while the route is opened is left out, and waited for in time.
        self._faults.attempts += self.phase is not Phase.OPENING
        if self._faults.attempts > MAX_ATTEMPTS:
            self._fail(next(iter(lost.values()), PeerLost("the route fails again and again: try again later")))
        elif self.phase is not Phase.PLANNING:
            self._go_on()

    def _go_on(self) -> None:
        """Opens the hops that are left, if they make a whole route; otherwise has one planned."""
        setup = self._begin_setup()
        self._stop_waiting()
        if self.phase is Phase.BROKEN:
            setup.began = self._now
        kept = tuple(hop.planned for hop in self.hops if not hop.lost)
        position = self.blocks[0]
        for hop in kept:
            position = hop.end if hop.start == position else -1
        if position == self.blocks[1]:
            self._open_route(kept, ())
        else:
            self._ask_route(fresh=bool(setup.refused), unban=False)

    def _ask_route(self, *, fresh: bool, unban: bool) -> None:
        setup = self._setup
        assert setup is not None
        setup.question, setup.retry_at = self.next_number(), math.inf
        kept = tuple(hop.planned for hop in self.hops if not hop.lost)
        self._enter(Phase.PLANNING)
        self._effects.append(events.AskRoute(setup.question, kept, frozenset(setup.excluded), fresh, unban))

    def _planned(self, event: events.Planned) -> None:
        setup = self._setup
        if setup is None or setup.question != event.number or self.phase is not Phase.PLANNING:
            return
        setup.question = 0
        if not any(hop.name in setup.excluded for hop in event.route):
            self._open_route(event.route, event.codecs)
            return
        self._faults.attempts += 1  # it was lost meanwhile
        if self._faults.attempts > MAX_ATTEMPTS:
            self._fail(PeerLost("peers are lost faster than routes are planned: try again later"))
        else:
            self._ask_route(fresh=True, unban=False)

    def _no_route(self, event: events.NoRoute) -> None:
        setup = self._setup
        if setup is None or setup.question != event.number or self.phase is not Phase.PLANNING:
            return
        setup.question = 0
        may_wait = setup.may_wait(event, grows=self._former_reservation > 0)
        if may_wait and self._now < setup.began + self._recovery_timeout_s:
            setup.excluded -= setup.refused.keys() if setup.repairs else setup.silent
            setup.retry_at = self._now + POLL_S
        else:
            self._fail(setup.explanation(event))

    # Opening it.

    def _open_route(self, route: Sequence[PlannedHop], codecs: Sequence[Codec]) -> None:
        """Opens all hops in a new epoch; those that run the same blocks as before keep their caches."""
        before = {(hop.endpoint, hop.blocks): hop for hop in self.hops if not hop.lost}
        hops: list[RouteHop] = []
        for index, planned in enumerate(route):
            hop = before.get((planned.record.endpoint, (planned.start, planned.end)))
            hops.append(hop if hop is not None else RouteHop(planned, codecs[index + 1]))
        if self._recall is not None:
            self.log = None
        if self.log is None and codecs:
            self.first_codec = codecs[0]
        if self._recall is not None:
            self._expect(self._recall)
        self.hops, self.chunk_ms = hops, 0.0
        wanted = {hop.endpoint: hop.blocks for hop in hops}
        for endpoint, blocks in list(self._members.items()):
            if wanted.get(endpoint) != blocks:
                self._leave(endpoint)
        for hop in hops:
            hop.relayed = False
        self._enter(Phase.OPENING)
        self._open_hops()

    def _open_hops(self) -> None:
        """Asks all hops, in an epoch of its own: so no answer is taken for that to another question."""
        self.epoch += 1
        self._begin_setup().copies = None if self._begin_setup().copies is None else 0
        self._opened_reservation = self.reservation
        self._relays = {hop.endpoint for hop in self.hops if hop.relayed}
        self._liveness.heard(self._now)
        for index in range(len(self.hops)):
            self._open_hop(index)

    def _open_hop(self, index: int) -> None:
        hop = self.hops[index]
        previous = self.hops[index - 1] if index else None
        following = self.hops[index + 1] if index + 1 < len(self.hops) and not hop.relayed else None
        taps = self._taps_of(hop)
        hop.context = self._context(index) if self.salt is not None else b""
        row = self.log.only_row if self.log is not None and (self._recall is not None or not hop.filled) else None
        asks = hop.asked = row is not None and bool(hop.context)
        message = Open(
            session=self.session,
            epoch=self.epoch,
            model=self._model,
            start=hop.planned.start,
            end=hop.planned.end,
            reservation=self.reservation,
            codec=hop.codec.code,
            previous=previous.planned.record.key.raw if previous is not None and not previous.relayed else b"",
            next_key=following.planned.record.key.raw if following is not None else b"",
            next_address=following.planned.record.address if following is not None else "",
            next_relays=following.endpoint.relays if following is not None else (),
            asks_weights=True,
            taps=taps,
            tap_codec=self.tap_codec.code if taps else 0,
            context=hop.context,
            row=row if asks and row is not None else 0,
            labels=self.log.labels(row)[:MAX_LABELS] if asks and self.log is not None and row is not None else (),
            shared=self.shared and bool(hop.context),
        )
        self._members[hop.endpoint] = hop.blocks
        self._asked[hop.endpoint] = self._now + self._open_timeout_s(hop.endpoint)
        self.send(hop.endpoint, message)

    def _context(self, index: int) -> bytes:
        """All that the keys and values of a hop depend on besides the text."""
        if self.adapter is not None and self._adapter_label[0] != self.adapter_version:
            parts = write_groups(self.adapter.within(*self.blocks))
            self._adapter_label = self.adapter_version, digest(*parts)
        codecs = [self.first_codec, *(hop.codec for hop in self.hops)]
        hops = [
            f"{hop.blocks} {hop.weights} {codec.name}"
            for hop, codec in zip(self.hops[: index + 1], codecs, strict=False)
        ]
        return digest(self._model.encode(), self._adapter_label[1], *(hop.encode() for hop in hops))

    def _taps_of(self, hop: RouteHop) -> tuple[int, ...]:
        return tuple(tap for tap in self.taps if hop.planned.start < tap <= hop.planned.end)

    def _open_timeout_s(self, endpoint: Endpoint) -> float:
        """Longer where round trips are: a link may have to be made, to the hop and from it to the next one."""
        return OPEN_TIMEOUT_S + 2 * (self._answer_s(endpoint) - ANSWER_S)

    def _opened(self, hop: RouteHop, message: Opened) -> None:
        if self.phase is Phase.OPENING and self._asked.pop(hop.endpoint, None) is not None:
            hop.relayed |= not message.next_reachable
            hop.cached_positions, hop.recalled = message.cached_positions, message.recalled and hop.asked
            if hop.recalled:  # unasked, it would still hold what it was asked for before
                hop.filled, hop.adapter_version = False, 0
            hop.stores = message.stores
            hop.weights = message.weights or hop.weights
            if not self._any_weights and (changes := self._changes_of_weights(hop)):
                what = " and ".join(changes)
                text = f"the peer at {hop.endpoint.address} holds {what} in this session: {ALIKE_AGAIN}"
                self._failed[hop.endpoint] = OtherWeights(text)
            self._if_all_answered()

    def _if_all_answered(self) -> None:
        """Goes on once no hop is to answer any more."""
        if self._asked:
            return
        failed, self._failed = self._failed, {}
        busy = [error for error in failed.values() if isinstance(error, PeerBusy)]
        if self._former_reservation and self._has_stood and busy and len(busy) == len(failed):
            # Nobody lost anything: the route stands with what it had.
            self.reservation, self._former_reservation, self.refusal = self._former_reservation, 0, busy[0]
            self._go_on()
            return
        if failed:
            self._reopen(failed, cause_of(next(iter(failed.values()))))
        elif self.phase is Phase.OPENING:
            self._all_opened()
        elif self.phase is Phase.LOADING:
            if self._setup is None:
                self._enter(Phase.OPEN)
            else:
                self._refill()

    def _all_opened(self) -> None:
        """All hops have opened the session. If some do not reach their next hop, all are told who is relayed."""
        if self._relays != {hop.endpoint for hop in self.hops if hop.relayed}:
            self._open_hops()
            return
        setup = self._begin_setup()
        if any(hop.context and hop.context != self._context(index) for index, hop in enumerate(self.hops)):
            # A hop holds its weights otherwise than its record said. One that says something else each time is not
            # believed.
            if not setup.renamed:
                setup.renamed = True
                self._open_hops()
                return
            self.salt = None
            for hop in self.hops:
                hop.cached_positions = 0 if hop.recalled else hop.cached_positions
        if setup.copies is None:
            setup.copies = self._ask_copies()
            if setup.copies:
                return
        elif setup.copies:  # they have answered: how much they hold now, they say when they are opened again
            self._open_hops()
            return
        setup.opened_at = self._now
        if self._recall is not None:
            self._settle_recall(self._recall)
        for hop in self.hops:
            hop.opened(self.log.positions if self.log is not None else 0)
        self._load_adapter()

    def _ask_copies(self) -> int:
        """Has hops copy pages that they lack from other peers; returns how many hops were asked."""
        log = self.log
        row = log.only_row if log is not None and self.salt is not None and not self.shared else None
        if log is None or row is None:
            return 0
        labels, excluded = log.labels(row)[:MAX_LABELS], self._begin_setup().excluded
        for hop in self.hops:
            held = hop.cached_positions if hop.recalled else 0
            lacks = hop.recalled or not hop.cached_positions
            if not hop.stores or not hop.context or not lacks or (self._recall is None and hop.filled):
                continue
            living = (each for each in self.sources if each.name not in excluded)
            covering = [each for each in living if each.has_more(hop, held + WORTH_COPYING)]
            if covering:
                source = max(covering, key=lambda each: each.positions)
                self._asked[hop.endpoint] = self._now + COPY_S
                wanted = labels[: source.positions // PAGE]
                message = hop.copy_of(self.session, self.next_number(), source.endpoint, wanted, rate=None)
                self.send(hop.endpoint, message)
        return len(self._asked)

    def _changes_of_weights(self, hop: RouteHop) -> list[str]:
        """Which blocks a hop holds otherwise than the session had them, for people."""
        start, end = hop.blocks
        return [
            f"blocks {blocks_text(max(start, one.start), min(end, one.end))} as {hop.weights} that were {one.weights}"
            for one in self.held
            if one.start < end and one.end > start and one.weights != hop.weights
        ]

    # Loading the adapter, and replaying.

    def _load_adapter(self) -> None:
        """Sends the hops that lack it their parts of the adapter, which are empty where passes alone need one."""
        self._enter(Phase.LOADING)
        self._liveness.heard(self._now)
        for hop in self.hops:
            tensors = self.adapter.within(*hop.blocks) if self.adapter is not None else {}
            if (tensors or self._for_passes) and hop.adapter_version != self.adapter_version:
                self._asked[hop.endpoint] = self._now + self._progress_timeout_s
                for remaining, payload in counted_down(write_groups(tensors)):
                    ids = self.session, self.epoch, self.adapter_version
                    self.send(hop.endpoint, AdapterMessage(*ids, remaining, payload))
        self._if_all_answered()

    def _refill(self) -> None:
        """Has the next hops filled; once all are, the route stands."""
        filling: list[RouteHop] = []
        replays: list[ReplayRequest] = []
        if self.log is not None:
            filling, replays = next_refill(self.hops, self.log, self.session, self.epoch, self.next_number)
            while filling and not replays:  # they hold all that was sent to them
                for each in filling:
                    each.filled = True
                filling, replays = next_refill(self.hops, self.log, self.session, self.epoch, self.next_number)
        if not filling:
            self._stands()
            return
        self._enter(Phase.REPLAYING)
        self._liveness.heard(self._now)
        self._filling = filling
        self._replays = {replay.number: replay for replay in replays}
        for replay in replays:
            replay.send(self)

    def _stands(self) -> None:
        """The route is whole: what is under way is sent again."""
        setup, self._setup = self._setup, None
        self._has_stood = True
        changes = [change for hop in self.hops for change in self._changes_of_weights(hop)]
        self.held = tuple(HeldBlocks(*hop.blocks, hop.weights) for hop in self.hops)
        self._enter(Phase.OPEN)
        if self.reservation == self._opened_reservation:
            self._former_reservation = 0
        self._liveness.heard(self._now)
        if not self._in_flight:
            self._faults = _Faults()
        for number in sorted(self._in_flight):
            if not self._in_flight[number].done:
                self._in_flight[number].send(self)
        if setup is not None and setup.reasons:
            opened_ms = ((setup.opened_at or self._now) - setup.began) * 1000
            total_ms = (self._now - setup.began) * 1000
            self.recoveries.append(Recovered(tuple(setup.reasons), opened_ms, total_ms, setup.cause))
            moved = setup.cause is Cause.BETTER_ROUTE
            what = "a session has moved to a better route" if moved else "a route is whole again"
            route = " -> ".join(f"{short_key(hop.name)} {blocks_text(*hop.blocks)}" for hop in self.hops)
            text = f"{what} after {total_ms:.0f} ms: {route}"
            self._note("rerouted" if moved else "repaired", text)
        if changes:
            what = " and ".join(changes)
            self._note("weights", f"a session goes on with {what}, as nobody else holds them: it may get other tokens")
        if self.reservation > self._opened_reservation:
            self._go_on()

    # The end of a hop, or of the route.

    def _give_up(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """A hop is lost, or did not take the session."""
        setup = self._begin_setup()
        hop = self._hop_at(endpoint)
        self._leave(endpoint)
        if hop is None:
            return
        hop.lost = True
        if isinstance(error, PeerSilent):
            self._silenced[endpoint] = hop.name
        setup.refuse(hop.name, error)
        if not isinstance(error, _NOT_BANNED):
            self._effects.append(events.Ban(hop.name, isinstance(error, PeerLeaving)))
        if setup.repairs:
            setup.reasons.append(str(error))
            kind = "leaving" if isinstance(error, PeerLeaving) else "lost"
            self._note(kind, f"{error}: another peer takes its place", hop.name)
        else:
            self._note("refused", f"{short_key(hop.name)} is left out of a new route: {error}", hop.name)

    def _leave(self, endpoint: Endpoint) -> None:
        """Has a peer forget the session."""
        if self._members.pop(endpoint, None) is not None:
            self.send(endpoint, Close(self.session))

    def _fail(self, error: SplitnetError) -> None:
        """There is no route for now: what waits gets the error."""
        setup = self._setup
        if setup is not None and setup.repairs:
            self._note("failed", f"a route could not be repaired: {error}")
        for name, refused in setup.refused.items() if setup is not None else ():
            if not isinstance(refused, PeerLost):  # it may have been right, as nothing else did better
                self._effects.append(events.Unban(name))
        self._end_requests(error)
        self._enter(Phase.BROKEN)

    def _end_requests(self, error: SplitnetError) -> None:
        self.error = error
        for request in self._in_flight.values():
            request.error = error
        self._in_flight, self._setup = {}, None
        if self._recall is not None:
            self._recall = self.log = None
        if self._former_reservation:
            self.reservation, self._former_reservation = self._former_reservation, 0
        self._faults = _Faults()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Awaits no answers from the former route."""
        if self._replays:
            for hop in self.hops:
                hop.relay_log = None  # it may be a part of what was to be replayed
        self._asked, self._failed, self._replays, self._filling = {}, {}, {}, []
        self._liveness.stop()

    def _hop_at(self, endpoint: Endpoint) -> RouteHop | None:
        return next((hop for hop in self.hops if hop.endpoint == endpoint and not hop.lost), None)

    def _note(self, kind: Kind, text: str, peer: str = "") -> None:
        self._effects.append(events.Note(kind, text, peer))

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            assert phase in TRANSITIONS[self.phase], f"{self.phase} -> {phase}"
            self.phase = phase

    # What comes from peers.

    def _received(self, source: Endpoint, message: Message) -> None:
        hop = self._hop_at(source)
        if isinstance(message, CopiedPages):
            copies = self._setup is not None and bool(self._setup.copies)
            if hop is not None and copies and self._asked.pop(source, None) is not None:
                self._if_all_answered()
            return
        if hop is None or getattr(message, "epoch", None) != self.epoch:
            return  # of a hop that is no longer on the route, or of an epoch that is no more
        match message:
            case Failure():
                self._failure(hop, message)
            case Opened():
                self._opened(hop, message)
            case AdapterLoaded():
                if message.version == self.adapter_version and self._asked.pop(source, None) is not None:
                    hop.adapter_version = message.version
                    self._if_all_answered()
            case Result() if message.end != self.blocks[1] and len(message.payload):
                self._relay(hop, message)
            case Gradient() if message.boundary != self.blocks[0]:
                self._relay_back(hop, message)
            case _:
                self._answer(hop, message)

    def _answer(self, hop: RouteHop, message: Message) -> None:
        number: int = getattr(message, "number", 0)
        request = self._replays.get(number) or self._in_flight.get(number)
        if request is None:
            return
        if isinstance(request, StepRequest) and hop.endpoint == self.tail and self._came_too_soon(request):
            # Hops compute in order, so an earlier step was lost, and they may have gone on from what it was to replace.
            for each in self.hops:
                each.forget()
                self._leave(each.endpoint)
            self._reopen({}, Cause.STALLED, "a step was lost on its way")
            return
        try:
            taken = request.take(hop.endpoint, message, self)
        except (ProtocolError, AdapterError) as error:
            self._blame(hop, 0, PeerFailed(f"the peer at {hop.endpoint.address} answered nonsense: {error}"))
            return
        if not taken:
            return
        self._liveness.heard(self._now)
        if isinstance(request, StepRequest) and isinstance(message, Result):
            self.timings = message.timings
        if isinstance(request, ReplayRequest):
            del self._replays[number]
            if not self._replays:
                for each in self._filling:
                    each.filled = True
                self._filling = []
                self._refill()
        elif request.done:
            self._in_flight = {number: each for number, each in self._in_flight.items() if not each.done}
            self._faults = _Faults()

    def _came_too_soon(self, request: StepRequest) -> bool:
        earlier = (each for number, each in self._in_flight.items() if number < request.number)
        return any(isinstance(each, StepRequest) and each.result is None for each in earlier)

    def _failure(self, hop: RouteHop, failure: Failure) -> None:
        error = error_of(failure, hop.endpoint)
        if failure.code == FailureCode.LEAVING:
            self._lose(hop, error)
        elif not failure.number:
            if self._asked.pop(hop.endpoint, None) is None:
                return
            if self.phase is Phase.LOADING and not isinstance(error, PeerBusy):
                self._blame(hop, failure.code, error)
                return
            self._failed[hop.endpoint] = error
            self._if_all_answered()
        elif self.phase not in (Phase.OPEN, Phase.REPLAYING):
            pass  # nothing was sent yet in this epoch that it could be about, or the route that it is about is no more
        elif failure.number in self._in_flight or failure.number in self._replays:
            self._request_failed(hop, failure.code, error, self._in_flight.get(failure.number))

    def _request_failed(
        self, hop: RouteHop, code: int, error: SplitnetError, request: Request[Any] | None = None
    ) -> None:
        feeder = self._feeder(hop, request)
        if feeder is not None and code in _OF_WHAT_CAME:
            refusing = self._faults.refusing.setdefault(feeder.name, [])
            if code not in _FORGETFUL or hop.name not in refusing:
                refusing.append(hop.name)
            if len(refusing) == 2:  # if another takes its place and is refused as well, the hop that refuses is wrong
                self._faults.complaints.setdefault(code, []).append(hop.name)
                self._effects += [events.Unban(name) for name in refusing]
                text = f"what the peer at {feeder.endpoint.address} sends on is refused twice: {error}"
                self._lose(feeder, PeerFailed(text))
                return
        if code == FailureCode.BUSY:
            self._lose(hop, error)
        elif code in _FORGETFUL:
            self._forgot(hop, code, error)
        else:
            self._blame(hop, code, error)

    def _forgot(self, hop: RouteHop, code: int, error: SplitnetError) -> None:
        """A hop, or its next one, lacks what a request needs. First all are opened again; after that one is wrong."""
        strikes = self._faults.strikes[hop.name] = self._faults.strikes.get(hop.name, 0) + 1
        if strikes == 1:
            if code != FailureCode.UNKNOWN_SESSION:  # it holds something else than it should
                hop.forget()
                self._leave(hop.endpoint)
            self._reopen({}, Cause.SESSION_LOST, str(error))
            return
        following = self.hops[self.hops.index(hop) + 1 :]
        may_be_next = code == FailureCode.UNKNOWN_SESSION and strikes == 2 and self._feeder(hop) is not None
        self._lose(following[0] if may_be_next and following else hop, PeerFailed(str(error)))

    def _feeder(self, hop: RouteHop, request: Request[Any] | None = None) -> RouteHop | None:
        """The hop that pushes to another what a request needs; None: the client sends it."""
        index = self.hops.index(hop)
        if isinstance(request, PassRequest) and request.is_on_way_back:
            return self.hops[index + 1] if index + 1 < len(self.hops) and not hop.relayed else None
        before = self.hops[index - 1] if index else None
        return before if before is not None and not before.relayed else None

    def _blame(self, hop: RouteHop, code: int, error: SplitnetError) -> None:
        """A hop has failed. If another says the same, the fault is the request's own, and the caller's."""
        if code:
            complaints = self._faults.complaints.setdefault(code, [])
            complaints.append(hop.name)
            if len(complaints) > 1:
                self._believe(code, error)
                return
        self._lose(hop, error)

    def _believe(self, code: int, error: SplitnetError) -> None:
        names = self._faults.complaints.pop(code, [])
        if code == FailureCode.NOT_FINITE and len(set(names)) > 1:
            error = NotFinite(f"{error}; another peer says the same")
        self._begin_setup()
        self._fail(error)

    def _lose(self, hop: RouteHop, error: SplitnetError) -> None:
        if self.phase is Phase.OPENING and self._asked.pop(hop.endpoint, None) is not None:
            self._failed[hop.endpoint] = error
            self._if_all_answered()
        else:
            self._reopen({hop.endpoint: error}, cause_of(error))

    def _link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        hop = self._hop_at(endpoint)
        setup = self._setup
        if hop is not None:
            self._lose(hop, error)
        elif setup is not None and endpoint.key.text in setup.refused and isinstance(error, NotAuthorized):
            # A key that is taken away ends the connection first, and is refused when that is made anew.
            setup.refused[endpoint.key.text] = error

    def _relay(self, hop: RouteHop, result: Result) -> None:
        """The client stands between two hops that do not reach each other."""
        request = self._replays.get(result.number) or self._in_flight.get(result.number)
        message = request.message if request is not None else None
        if not isinstance(message, Step | Forward) or not hop.relayed or hop.planned.end != result.end:
            return
        try:
            if result.codec != hop.codec.code:
                raise ProtocolError(f"codec {result.codec} was not agreed upon")
            check_values(result.codec, result.payload, message.positions, self.hidden_size)
        except ProtocolError as error:
            self._blame(hop, 0, PeerFailed(f"the peer at {hop.endpoint.address} answered nonsense: {error}"))
            return
        if isinstance(message, Step):
            hop.log_relayed(message, result)
        self._liveness.heard(self._now)
        relayed = replace(message, epoch=self.epoch, codec=result.codec, payload=result.payload, boundary=result.end)
        following = self.hops[self.hops.index(hop) + 1]
        self.send(following.endpoint, replace(relayed, timings=result.timings))

    def _relay_back(self, hop: RouteHop, gradient: Gradient) -> None:
        index, request = self.hops.index(hop), self._in_flight.get(gradient.number)
        before = self.hops[index - 1] if index else None
        if before is None or not before.relayed or before.planned.end != gradient.boundary or request is None:
            return
        try:
            check_values(gradient.codec, gradient.payload, request.message.positions, self.hidden_size)
        except ProtocolError as error:
            self._blame(hop, 0, PeerFailed(f"the peer at {hop.endpoint.address} answered nonsense: {error}"))
            return
        self._liveness.heard(self._now)
        self.send(before.endpoint, gradient)

    # What does not come.

    @property
    def _awaits_hops(self) -> bool:
        """Whether silence means something."""
        under_way = self.phase is Phase.OPEN and bool(self._in_flight)
        return under_way or bool(self._opening) or self.phase in (Phase.LOADING, Phase.REPLAYING)

    @property
    def _opening(self) -> list[Endpoint]:
        """Hops that have not answered their `Open`, without those to which the client may still look for a way."""
        return [each for each in self._asked if not each.hidden] if self.phase is Phase.OPENING else []

    @property
    def _silence_s(self) -> float:
        if self.phase is not Phase.OPEN:
            return silence_s(0.0, self.chunk_ms)
        decodes = all(request.decodes for request in self._in_flight.values())
        predicted_ms = max((request.predicted_ms for request in self._in_flight.values()), default=0.0)
        return silence_s(self.usual_ms if decodes else 0.0, predicted_ms)

    def _tick(self) -> None:
        setup = self._setup
        if setup is not None and self._now >= setup.retry_at:
            self._ask_route(fresh=True, unban=True)
            return
        late = [endpoint for endpoint, until in self._asked.items() if self._now >= until]
        if late:
            self._unanswered(late)
        elif self._awaits_hops:
            if self._liveness.is_late(self._now):
                self._judge()
            elif not self._liveness.asking and self._now >= self._liveness.wake_at(self._silence_s):
                asked = self._opening or self.endpoints()
                self._liveness.ask(asked, self._now)
                self._effects += [events.AskAlive(endpoint) for endpoint in asked]

    def _wait_longer(self, endpoint: Endpoint) -> None:
        """An `Open` waits behind other traffic of the link."""
        until, setup = self._asked.get(endpoint), self._setup
        if self.phase is Phase.OPENING and until is not None and setup is not None:
            longest = setup.began + MAX_QUEUE_S
            self._asked[endpoint] = max(until, min(self._now + self._open_timeout_s(endpoint), longest))

    def _unanswered(self, hops: Sequence[Endpoint]) -> None:
        """Hops have not answered an `Open` or an adapter."""
        copies = self._setup is not None and bool(self._setup.copies)
        for endpoint in hops:
            if self._asked.pop(endpoint, None) is not None and not copies:
                text = f"the peer at {endpoint.address} does not answer: check its network and firewall"
                self._failed[endpoint] = PeerSilent(text)
        self._if_all_answered()

    def _judge(self) -> None:
        """A round of pings is over."""
        if not self._awaits_hops:
            self._liveness.stop()
            return
        decodes = self.phase is Phase.OPEN and all(request.decodes for request in self._in_flight.values())
        progress_s = min(self._progress_timeout_s, DECODE_PROGRESS_S) if decodes else self._progress_timeout_s
        number = 0 if self._replays else min(self._in_flight, default=0)
        # A hop may compute a decode step in one part, others position by position.
        parts = self.log.positions if self.log is not None else 0
        if self.phase is Phase.OPEN:
            sizes = (1 if each.decodes else getattr(each.message, "positions", 1) for each in self._in_flight.values())
            parts = sum(sizes)
        verdict = self._liveness.verdict(number, parts, progress_s, self._now)
        if self.phase is Phase.OPENING:
            # Those that live may have to reach their next hops, or hold nothing yet.
            if verdict is not None and verdict.finding is Finding.SILENT:
                self._unanswered(verdict.hops)
        elif verdict is not None and not (self.phase is Phase.LOADING and verdict.finding is Finding.IDLE):
            self._act_on(verdict)

    def _act_on(self, verdict: Verdict[Endpoint]) -> None:
        if verdict.finding is Finding.SILENT:
            errors = {each: PeerSilent(f"the peer at {each.address} does not answer") for each in verdict.hops}
            self._reopen(dict(errors), Cause.LOST)
        elif verdict.finding is Finding.FORGOTTEN:
            hop = self._hop_at(verdict.hops[0])
            if hop is not None:
                error = SessionLost(f"the peer at {hop.endpoint.address} does not hold the session any more")
                self._request_failed(hop, FailureCode.UNKNOWN_SESSION, error)
        elif verdict.finding is Finding.STUCK:
            self._faults.suspects = self._faults.suspects or self.endpoints()
            likeliest = [*verdict.hops, *(hop.endpoint for hop in self._filling)]
            self._replace_likeliest(likeliest, "has worked for too long without any progress")
        elif not self._faults.suspects:
            # All live, and the requests are at none of them. Opened again, hops find out whether they reach each other.
            self._faults.suspects = self.endpoints()
            self._reopen({}, Cause.STALLED, "what was under way was lost between two hops that live")
        else:
            # One of those that were there at the first time loses messages, or keeps them.
            steps = [each for each in self._in_flight.values() if isinstance(each, StepRequest) and each.result]
            owing = [self.maker_of(tap) for step in steps for tap in step.taps if tap not in step.tapped]
            likeliest = [*(hop.endpoint for hop in self._filling), *owing, *verdict.hops]
            self._replace_likeliest(likeliest, "loses what is sent to it")

    def _replace_likeliest(self, likeliest: Sequence[Endpoint], what: str) -> None:
        where = next((each for each in likeliest if each in self._faults.suspects), likeliest[0])
        self._faults.suspects = [each for each in self._faults.suspects if each != where] or [where]
        self._reopen({where: PeerLost(f"the peer at {where.address} {what}")}, Cause.LOST)


def error_of(failure: Failure, source: Endpoint) -> SplitnetError:
    """The exception that a peer's answer means; any code that has none of its own is `PeerFailed`."""
    kind = _ERROR_OF_CODE.get(failure.code, PeerFailed)
    return kind(f"the peer at {source.address} answered: {failure.text}")
