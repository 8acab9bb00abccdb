"""The life of a session as a state machine: events in, effects out. No socket, thread, clock, queue or tensor.

    NEW ──> PLANNING ──> OPENING ──> LOADING ──> REPLAYING ──> OPEN
               ^            │           │            │          │
               └────────────┴───────────┴────────────┴──────────┘  a hop is lost, or a better route exists
    any ──> BROKEN  no route: the next use tries again, with the hops that are left
    any ──> CLOSED

A hop that fails in any manner counts as dead: it is banned and replaced. Other peers are planned for the lost blocks
only, the route is opened again in a new epoch (messages of older epochs are dropped), logs fill the replacements (see
`splitnet.session.failover`), and requests under way are sent again. A cache that may be wrong is computed again, never
used. Waits are bounded by the time without progress, not by the total time.

`splitnet.session.prefix_lookup` looks up stored pages, and `splitnet.session.blame` decides who caused a failure.
The design follows the worker of Dask's distributed (`distributed/worker_state_machine.py`) and h11 (`h11/_state.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from scheduler.liveness import (
    ANSWER_S,
    DECODE_PROGRESS_S,
    MAX_QUEUE_S,
    OPEN_TIMEOUT_S,
    PROGRESS_TIMEOUT_S,
    RECOVERY_TIMEOUT_S,
    Liveness,
    PingAnswer,
    PingVerdict,
    silence_s,
)
from splitnet.blocks.adapters import AdapterTensors, counted_down, write_groups
from splitnet.errors import (
    AdapterError,
    ContextTooLong,
    NotAuthorized,
    OtherWeights,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    ProtocolError,
    SessionClosed,
    SessionLost,
    SplitnetError,
)
from splitnet.session import events
from splitnet.session.blame import Decision, Faults, OpenAgain, Replace, RequestsFault, error_of
from splitnet.session.events import TRANSITIONS, Cause, Phase, Recovered
from splitnet.session.failover import PeerSilent, RouteHop, RouteSetup, cause_of, next_refill
from splitnet.session.prefix_lookup import NO_PAGES, AskAgain, CopyFrom, PrefixLookup, Settled, Stage
from splitnet.session.requests import ReplayRequest, Request, StepRequest, check_beside, undone_by
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
from splitnet.wire.sent_log import SentLog

POLL_S = 0.5  # between two plans while no peer serves some blocks
COPY_S = 20.0  # longest wait for hops that copy pages from other peers
MAX_ATTEMPTS = 8  # routes that may fail before an answer arrives on one
_NOT_BANNED = (SessionLost, PeerBusy, NotAuthorized, OtherWeights)
"""Errors of peers that are not at fault, but cannot be used for this session."""


class SessionState:
    """A session: its route, the requests under way on the route, and the effects of each event.

    Args:
        model: fingerprint of the weights.
        blocks: `[start, end)`, which the hops run.
        reservation: positions of KV cache to reserve on every hop, over all rows.
        progress_timeout_s: how long hops may work without any progress.
        recovery_timeout_s: how long to wait for other peers when some blocks are suddenly not served.
        any_weights: whether blocks may be held in another format than before, if no peer holds them as before.
        answer_s: the time within which a live hop answers a ping.

    Attributes:
        held: formats of the weights of all blocks on the last open route; empty before the first one.
        first_codec: codec of the link from the client to the first hop.
        log: the activations that the client has sent; None before the first step.
        error: why there is no route; kept until the next `Use`.
        refusal: why the last `Resize` was refused, if nothing else changed.
        taps: boundaries at which hops send the client hidden states, in rising order; set before the first use.
        tap_codec: codec of these hidden states.
        timings: times of the last step, hop by hop, as reported by the tail.
        chunk_ms: predicted time of a chunk of a replay, which the driver sets during a replay; 0: unknown.
        usual_ms: usual time of a decode step, which the driver sets; 0: unknown.
        prefixes: the lookup of stored pages.
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
        self.adapter: AdapterTensors | None = None
        self.adapter_version = 0
        self.log: SentLog | None = None
        self.recoveries: list[Recovered] = []
        self.error: SplitnetError | None = None
        self.refusal: SplitnetError | None = None
        self.taps: tuple[int, ...] = ()
        self.tap_codec: Codec = codec_by_name("none")
        self.timings: tuple[Timing, ...] = ()
        self.chunk_ms = self.usual_ms = 0.0
        self._model = model
        self._max_positions = max_positions
        self._progress_timeout_s = progress_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._any_weights = any_weights
        self._answer_s = answer_s
        self.next_number = itertools.count(1).__next__
        self.prefixes = PrefixLookup(session, model, blocks, hidden_size, self.next_number)
        self._now = 0.0
        self._effects: list[events.Effect] = []
        self._in_flight: dict[int, Request[Any]] = {}
        self._faults = Faults()
        self._liveness = Liveness(answer_s)
        self._setup: RouteSetup | None = None
        self._has_stood = False  # there was an open route before
        # Hops that must answer an `Open` or an adapter, with the deadline; hops that were asked and have failed.
        self._asked: dict[Endpoint, float] = {}
        self._failed: dict[Endpoint, SplitnetError] = {}
        # Peers that were sent an `Open` and no `Close` since, with the blocks.
        self._members: dict[Endpoint, tuple[int, int]] = {}
        # Hops that were opened without a next hop, because they do not reach it.
        self._relays: set[Endpoint] = set()
        # Replays under way, and the hops that they fill.
        self._replays: dict[int, ReplayRequest] = {}
        self._filling: list[RouteHop] = []
        # Names of hops that were given up because they did not answer in time.
        self._silenced: dict[Endpoint, str] = {}
        self._for_passes = False
        self._opened_reservation = 0  # reservation that the hops were asked for when the route was opened
        self._former_reservation = 0  # reservation before a resize that is not done yet; 0: there is no such resize

    def __str__(self) -> str:
        """The phase and its cause, for people."""
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
        """Whether no route is being made or loaded."""
        return self.phase in (Phase.NEW, Phase.OPEN, Phase.BROKEN, Phase.CLOSED)

    @property
    def in_flight_count(self) -> int:
        """Number of requests without an answer."""
        return len(self._in_flight)

    @property
    def first_hop(self) -> Endpoint:
        """The hop that the client sends to."""
        return self.hops[0].endpoint

    @property
    def tail(self) -> Endpoint:
        """The hop that runs the last block."""
        return self.hops[-1].endpoint

    def endpoints(self) -> list[Endpoint]:
        """All hops in order."""
        return [hop.endpoint for hop in self.hops]

    def maker_of(self, boundary: int) -> Endpoint:
        """The hop that runs the block before a boundary."""
        return next(hop.endpoint for hop in self.hops if hop.blocks[0] < boundary <= hop.blocks[1])

    def adapted_hops(self) -> dict[Endpoint, dict[str, Tensor]]:
        """Hops whose blocks have tensors of the adapter, with these tensors."""
        parts = {hop.endpoint: self.adapter.of_blocks(*hop.blocks) for hop in self.hops} if self.adapter else {}
        return {each: part for each, part in parts.items() if part}

    @property
    def wake_at(self) -> float:
        """When the next `Tick` is due, in seconds of the clock of `handle`."""
        times = list(self._asked.values())
        setup = self._setup  # read once: another thread may handle an event meanwhile
        if setup is not None:
            times.append(setup.retry_at)
        if self._awaits_hops:
            times.append(self._liveness.wake_at(self._silence_s))
        return min(times, default=math.inf)

    def send_message(self, endpoint: Endpoint, message: Message) -> None:
        """Sends a message, without the labels that the hops must not get; for requests."""
        if isinstance(message, Step) and message.labels and not self.prefixes.namespace.stores_pages:
            message = replace(message, labels=())
        self._effects.append(events.Send(endpoint, message))

    def handle(self, event: events.Event, now: float) -> list[events.Effect]:
        """Handles an event, and returns its effects in order. now: seconds of a clock that never goes back."""
        self._now, self._effects = now, []
        match event:
            case _ if self.phase is Phase.CLOSED:
                pass
            case events.Received():
                self._receive_message(event.source, event.message)
            case events.Submit():
                self._submit_request(event.requests)
            case events.Backward():
                for request in event.batch.passes:
                    self._put_in_flight(request)
                if self.is_open:
                    event.batch.go_back(event.adapter, self)
                self._use_adapter()
            case events.Abandon():
                for number in event.numbers:
                    self._in_flight.pop(number, None)
            case events.Use():
                self._use_adapter()
            case events.LookUpPrefix():
                self._look_up(event)
            case events.Tick():
                self._check_timers()
            case PingAnswer():
                if event.late:
                    self._wait_longer(event.endpoint)
                elif (name := self._silenced.pop(event.endpoint, None)) is not None:
                    self._effects.append(events.Unban(name))  # the hop lives, but is far away
                if self._liveness.add_answer(event):
                    self._judge()
            case events.LinkFailed():
                self._link_failed(event.endpoint, event.error)
            case events.RoutePlanned() | events.RouteFailed():
                self._route_answered(event)
            case events.Resize():
                self._resize(event.reservation)
            case events.UseAdapter():
                if event.adapter is not self.adapter:
                    self.adapter, self._for_passes = event.adapter, event.for_passes
                    self.prefixes.use_adapter(event.adapter)
                    self.adapter_version += 1
                    if self.is_open:
                        self._load_adapter()
            case events.MoveRoute():
                self._move_route(event)
            case events.Distrust():
                self._distrust(event)
            case events.CloseSession():
                self._close_session()
        return self._effects

    # Events of the caller.

    def _use_adapter(self) -> None:
        if self.phase in (Phase.NEW, Phase.BROKEN):
            self.error = None
            self._begin_setup()
            self._go_on()

    def _submit_request(self, requests: Sequence[Request[Any]]) -> None:
        for request in requests:
            if isinstance(request, StepRequest):
                try:
                    # A hop does not notice the loss of a step that replaces positions, and would store the old ones.
                    sure = not any(getattr(each, "replaces", False) for each in self._in_flight.values())
                    request.replaces = self._replaces(request.message)
                    labels = self._record(request.message)
                    sure &= (
                        self.prefixes.namespace.stores_pages and len(labels) + len(request.message.parts) <= MAX_LABELS
                    )
                    request.message = replace(request.message, labels=labels if sure else ())
                except SplitnetError as error:
                    request.error = error
                    continue
            self._put_in_flight(request)
            if self.is_open:
                request.send(self)
        if self._in_flight:
            self._use_adapter()  # a hop may have left since the caller checked the route

    def _look_up(self, text: events.LookUpPrefix) -> None:
        may_begin = not self._in_flight and self.phase in (Phase.NEW, Phase.OPEN, Phase.BROKEN)
        if self.prefixes.namespace.stores_pages and may_begin:
            self.prefixes.begin_text(text)
            self.log = None
            if self.is_open:
                self._go_on()

    def _record(self, step: Step) -> tuple[bytes, ...]:
        """Logs a step, and returns the labels of its pages.

        Refuses all steps that an honest hop refuses, so that a hop which refuses a recorded step is at fault.
        """
        if self.log is None:
            codec = self.first_codec
            self.log = SentLog(codec.code, codec.bytes_per_position(self.hidden_size), self.prefixes.namespace.salt)
        longest = max((part.start + part.length for part in step.parts), default=0)
        if self._max_positions is not None and longest > self._max_positions:
            raise ContextTooLong(f"position {longest} is beyond the model's context of {self._max_positions}")
        under_way = [each for each in self._in_flight.values() if isinstance(each, StepRequest)]
        check_beside(step, under_way)
        labels = self.log.record_step(step.parts, step.forks, step.payload, step.rope_length, (), step.inputs)
        for request in undone_by(step, under_way):
            request.error = SplitnetError("a later step of the session began before the end of this one")
            self._in_flight.pop(request.number)
        return labels

    def _replaces(self, step: Step) -> bool:
        """Whether a step overwrites positions that hops hold."""
        log = self.log
        return log is not None and any(part.start < log.length(part.row) for part in step.parts)

    def _put_in_flight(self, request: Request[Any]) -> None:
        if not self._in_flight:
            self._liveness.message_received(self._now)
        self._in_flight[request.number] = request

    def _distrust(self, event: events.Distrust) -> None:
        """Replaces the sender of an unusable answer, then all hops involved; a third unusable answer is the
        request's fault."""
        request, where = event.request, event.source
        request.result = None
        self.prefixes.namespace = NO_PAGES  # hops may have stored pages of wrong outputs
        self._put_in_flight(request)
        error = PeerFailed(f"the peer at {where.address} {event.why}")
        hop = self._hop_at(where)
        if not request.makers:
            request.makers = [each.name for each in self.hops]
            lost = [hop] if hop is not None else []
        else:
            lost = [each for each in self.hops if each.name in request.makers]
            request.useless += 1
            if not lost or request.useless > 1:  # without other peers, the same hops return
                self._decide(self._faults.believe(0, error))
                return
            # The other hops have computed their caches from outputs of the lost ones.
            self._forget_caches([each for each in self.hops if each not in lost])
        self._reopen({each.endpoint: error for each in lost}, Cause.LOST)

    def _resize(self, reservation: int) -> None:
        """Opens the route again, so that a hop that has lost the session is found before it computes."""
        self.refusal = None
        if reservation > self.reservation:
            self._former_reservation = self._former_reservation or self.reservation
            self.reservation = reservation
            if self.is_open:
                self._go_on()

    def _move_route(self, event: events.MoveRoute) -> None:
        if self.is_open and not self._in_flight:
            setup = self._begin_setup()
            setup.cause = Cause.BETTER_ROUTE
            setup.reasons.append("there is a better route")
            self._open_route(event.route, event.codecs)

    def _close_session(self) -> None:
        for endpoint in list(self._members):
            self._leave_peer(endpoint)
        self._end_requests(SessionClosed("the session was closed while it was used: begin with a new one"))
        self.log = None
        self._enter(Phase.CLOSED)

    # Planning a route.

    def _begin_setup(self) -> RouteSetup:
        if self._setup is None:
            self._setup = RouteSetup(self._now, repairs=self._has_stood)
            self.prefixes.begin_route()
        return self._setup

    def _reopen(self, lost: dict[Endpoint, SplitnetError], cause: Cause, reason: str = "") -> None:
        """Repairs the route without the lost hops; at once if requests wait, else with the next use."""
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
        # A refusal while the route is opened is not a failed attempt: the hop is left out, and the setup is bounded
        # in time.
        self._faults.attempts += self.phase is not Phase.OPENING
        if self._faults.attempts > MAX_ATTEMPTS:
            self._fail(next(iter(lost.values()), PeerLost("the route fails again and again: try again later")))
        elif self.phase is not Phase.PLANNING:
            self._go_on()

    def _go_on(self) -> None:
        """Opens the hops that are left if they serve all blocks; otherwise asks for a plan."""
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

    def _route_answered(self, event: events.RoutePlanned | events.RouteFailed) -> None:
        setup = self._setup
        if setup is None or setup.question != event.number or self.phase is not Phase.PLANNING:
            return
        setup.question = 0
        if isinstance(event, events.RouteFailed):
            may_wait = setup.may_wait(event, grows=self._former_reservation > 0)
            if may_wait and self._now < setup.began + self._recovery_timeout_s:
                setup.excluded -= setup.refused.keys() if setup.repairs else setup.silent_hops
                setup.retry_at = self._now + POLL_S
            else:
                self._fail(setup.explanation(event))
        elif not any(hop.name in setup.excluded for hop in event.route):
            self._open_route(event.route, event.codecs)
        else:
            self._faults.attempts += 1  # a planned hop was lost since the question
            if self._faults.attempts > MAX_ATTEMPTS:
                self._fail(PeerLost("peers are lost faster than routes are planned: try again later"))
            else:
                self._ask_route(fresh=True, unban=False)

    # Opening the route.

    def _open_route(self, route: Sequence[PlannedHop], codecs: Sequence[Codec]) -> None:
        """Opens all hops in a new epoch; hops that run the same blocks as before keep their caches."""
        before = {(hop.endpoint, hop.blocks): hop for hop in self.hops if not hop.lost}
        hops: list[RouteHop] = []
        for index, planned in enumerate(route):
            hop = before.get((planned.record.endpoint, (planned.start, planned.end)))
            hops.append(hop if hop is not None else RouteHop(planned, codecs[index + 1]))
        if codecs and (self.log is None or self.prefixes.text is not None):
            self.first_codec = codecs[0]
        if self.prefixes.text is not None:
            self.log = self.prefixes.expected_log(self.first_codec)
        self.hops, self._faults.hops, self.chunk_ms = hops, hops, 0.0
        wanted = {hop.endpoint: hop.blocks for hop in hops}
        for endpoint, blocks in list(self._members.items()):
            if wanted.get(endpoint) != blocks:
                self._leave_peer(endpoint)
        for hop in hops:
            hop.relayed = False
        self._enter(Phase.OPENING)
        self._open_hops()

    def _open_hops(self) -> None:
        """Asks all hops in a new epoch, so that no answer belongs to an earlier question."""
        self.epoch += 1
        self._begin_setup()
        self.prefixes.begin_asking(self.hops, self.first_codec)
        self._opened_reservation = self.reservation
        self._relays = {hop.endpoint for hop in self.hops if hop.relayed}
        self._liveness.message_received(self._now)
        for index in range(len(self.hops)):
            self._open_hop(index)

    def _open_hop(self, index: int) -> None:
        hop = self.hops[index]
        previous = self.hops[index - 1] if index else None
        following = self.hops[index + 1] if index + 1 < len(self.hops) and not hop.relayed else None
        taps = self._taps_of(hop)
        row, labels = self.prefixes.question(hop, self.log)
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
            row=row,
            labels=labels,
            shared=bool(hop.context) and self.prefixes.namespace.shared,
        )
        self._members[hop.endpoint] = hop.blocks
        self._asked[hop.endpoint] = self._now + self._open_timeout_s(hop.endpoint)
        self.send_message(hop.endpoint, message)

    def _taps_of(self, hop: RouteHop) -> tuple[int, ...]:
        return tuple(tap for tap in self.taps if hop.planned.start < tap <= hop.planned.end)

    def _open_timeout_s(self, endpoint: Endpoint) -> float:
        """Grows with the round trip: the client may have to connect to the hop, and the hop to the next hop."""
        return OPEN_TIMEOUT_S + 2 * (self._answer_s(endpoint) - ANSWER_S)

    def _opened(self, hop: RouteHop, message: Opened) -> None:
        if self.phase is Phase.OPENING and self._asked.pop(hop.endpoint, None) is not None:
            hop.relayed |= not message.next_reachable
            self.prefixes.hop_opened(hop, message)
            hop.weights = message.weights or hop.weights
            if not self._any_weights and (changes := hop.changed_weights(self.held)):
                what = " and ".join(changes)
                text = f"the peer at {hop.endpoint.address} holds {what} in this session: {ALIKE_AGAIN}"
                self._failed[hop.endpoint] = OtherWeights(text)
            self._if_all_answered()

    def _if_all_answered(self) -> None:
        """Continues once all asked hops have answered or failed."""
        if self._asked:
            return
        failed, self._failed = self._failed, {}
        busy = [error for error in failed.values() if isinstance(error, PeerBusy)]
        if self._former_reservation and self._has_stood and busy and len(busy) == len(failed):
            # The hops keep the former reservation, so the route stays open with it.
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
        """All hops have opened the session. If the relayed hops have changed, all hops are opened again."""
        if self._relays != {hop.endpoint for hop in self.hops if hop.relayed}:
            self._open_hops()
            return
        setup = self._begin_setup()
        match self.prefixes.all_opened(self.log, setup.excluded):
            case AskAgain():
                self._open_hops()
                return
            case CopyFrom(requests):
                for endpoint, message in requests:
                    self._asked[endpoint] = self._now + COPY_S
                    self.send_message(endpoint, message)
                return
            case Settled(log):
                self.log = log
        setup.opened_at = self._now
        for hop in self.hops:
            hop.route_opened(self.log.positions if self.log is not None else 0)
        self._load_adapter()

    # Loading the adapter, and replaying.

    def _load_adapter(self) -> None:
        """Sends each hop that lacks the adapter its tensors, or an empty adapter if only passes need a version of the
        adapter."""
        self._enter(Phase.LOADING)
        self._liveness.message_received(self._now)
        for hop in self.hops:
            tensors = self.adapter.of_blocks(*hop.blocks) if self.adapter is not None else {}
            if (tensors or self._for_passes) and hop.adapter_version != self.adapter_version:
                self._asked[hop.endpoint] = self._now + self._progress_timeout_s
                for remaining, payload in counted_down(write_groups(tensors)):
                    ids = self.session, self.epoch, self.adapter_version
                    self.send_message(hop.endpoint, AdapterMessage(*ids, remaining, payload))
        self._if_all_answered()

    def _refill(self) -> None:
        """Fills the next hops that lack their cache; once all are filled, opens the route."""
        filling, replays = list[RouteHop](), list[ReplayRequest]()
        while self.log is not None and not replays:
            filling, replays = next_refill(self.hops, self.log, self.session, self.epoch, self.next_number)
            if not filling:
                break
            for each in filling if not replays else ():  # these hops hold all positions that were sent
                each.filled = True
        if not filling:
            self._enter_open()
            return
        self._enter(Phase.REPLAYING)
        self._liveness.message_received(self._now)
        self._filling = filling
        self._replays = {replay.number: replay for replay in replays}
        for replay in replays:
            replay.send(self)

    def _enter_open(self) -> None:
        """The route is complete: sends the requests under way again."""
        setup, self._setup = self._setup, None
        self._has_stood = True
        changes = [change for hop in self.hops for change in hop.changed_weights(self.held)]
        self.held = tuple(HeldBlocks(*hop.blocks, hop.weights) for hop in self.hops)
        self._enter(Phase.OPEN)
        if self.reservation == self._opened_reservation:
            self._former_reservation = 0
        self._liveness.message_received(self._now)
        if not self._in_flight:
            self._faults = Faults(self.hops)
        for number in sorted(self._in_flight):
            if not self._in_flight[number].is_done:
                self._in_flight[number].send(self)
        if setup is not None and setup.reasons:
            self.recoveries.append(recovered := setup.recovered(self._now))
            moved = setup.cause is Cause.BETTER_ROUTE
            what = "a session has moved to a better route" if moved else "a route is complete again"
            route = " -> ".join(f"{short_key(hop.name)} {blocks_text(*hop.blocks)}" for hop in self.hops)
            text = f"{what} after {recovered.total_ms:.0f} ms: {route}"
            self._note_load("rerouted" if moved else "repaired", text)
        if changes:
            what = " and ".join(changes)
            self._note_load(
                "weights", f"a session continues with {what}, which no peer holds as before: tokens may differ"
            )
        if self.reservation > self._opened_reservation:
            self._go_on()

    # Losing a hop, or the route.

    def _give_up(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """Records that a hop is lost, or refuses the session."""
        setup = self._begin_setup()
        hop = self._hop_at(endpoint)
        self._leave_peer(endpoint)
        if hop is None:
            return
        hop.lost = True
        if isinstance(error, PeerSilent):
            self._silenced[endpoint] = hop.name
        setup.refuse(hop.name, error)
        if not isinstance(error, _NOT_BANNED):
            self._effects.append(events.BanPeer(hop.name, isinstance(error, PeerLeaving)))
        if setup.repairs:
            setup.reasons.append(str(error))
            kind = "leaving" if isinstance(error, PeerLeaving) else "lost"
            self._note_load(kind, f"{error}: another peer replaces it", hop.name)
        else:
            self._note_load("refused", f"{short_key(hop.name)} is left out of a new route: {error}", hop.name)

    def _leave_peer(self, endpoint: Endpoint) -> None:
        """Closes the session at a peer."""
        if self._members.pop(endpoint, None) is not None:
            self.send_message(endpoint, Close(self.session))

    def _fail(self, error: SplitnetError) -> None:
        """There is no route: all requests under way get the error."""
        setup = self._setup
        if setup is not None and setup.repairs:
            self._note_load("failed", f"a route could not be repaired: {error}")
        for name, refused in setup.refused.items() if setup is not None else ():
            if not isinstance(refused, PeerLost):  # the refusal may be right, because no other peer did better
                self._effects.append(events.Unban(name))
        self._end_requests(error)
        self._enter(Phase.BROKEN)

    def _end_requests(self, error: SplitnetError) -> None:
        self.error = error
        for request in self._in_flight.values():
            request.error = error
        self._in_flight, self._setup = {}, None
        if self.prefixes.abandon():
            self.log = None
        if self._former_reservation:
            self.reservation, self._former_reservation = self._former_reservation, 0
        self._faults = Faults(self.hops)
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Stops waiting for answers of the former route."""
        if self._replays:
            for hop in self.hops:
                hop.relay_log = None  # the log may hold only a part of the replay
        self._asked, self._failed, self._replays, self._filling = {}, {}, {}, []
        self._liveness.cancel_round()

    def _hop_at(self, endpoint: Endpoint) -> RouteHop | None:
        return next((hop for hop in self.hops if hop.endpoint == endpoint and not hop.lost), None)

    def _note_load(self, kind: Kind, text: str, peer: str = "") -> None:
        self._effects.append(events.Note(kind, text, peer))

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            assert phase in TRANSITIONS[self.phase], f"{self.phase} -> {phase}"
            self.phase = phase

    # Messages of peers.

    def _receive_message(self, source: Endpoint, message: Message) -> None:
        hop = self._hop_at(source)
        if isinstance(message, CopiedPages):
            if hop is not None and self._awaits_copies and self._asked.pop(source, None) is not None:
                self._if_all_answered()
            return
        if hop is None or getattr(message, "epoch", None) != self.epoch:
            return  # the message is from a former hop, or of an earlier epoch
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
                self._take_answer(hop, message)

    def _take_answer(self, hop: RouteHop, message: Message) -> None:
        number: int = getattr(message, "number", 0)
        request = self._replays.get(number) or self._in_flight.get(number)
        if request is None:
            return
        if isinstance(request, StepRequest) and hop.endpoint == self.tail and self._came_too_soon(request):
            # Hops compute in order, so an earlier step was lost, and hops may have used positions that it replaces.
            self._decide(OpenAgain(Cause.STALLED, "a step was lost on its way", tuple(self.hops)))
            return
        try:
            taken = request.take_answer(hop.endpoint, message, self)
        except (ProtocolError, AdapterError) as error:
            self._decide(self._faults.answered_nonsense(hop, error))
            return
        if not taken:
            return
        self._liveness.message_received(self._now)
        if isinstance(request, StepRequest) and isinstance(message, Result):
            self.timings = message.timings
        if isinstance(request, ReplayRequest):
            del self._replays[number]
            if not self._replays:
                for each in self._filling:
                    each.filled = True
                self._filling = []
                self._refill()
        elif request.is_done:
            self._in_flight = {number: each for number, each in self._in_flight.items() if not each.is_done}
            self._faults = Faults(self.hops)

    def _came_too_soon(self, request: StepRequest) -> bool:
        earlier = (each for number, each in self._in_flight.items() if number < request.number)
        return any(isinstance(each, StepRequest) and each.result is None for each in earlier)

    def _failure(self, hop: RouteHop, failure: Failure) -> None:
        error = error_of(failure, hop.endpoint)
        if failure.code == FailureCode.LEAVING:
            self._lose(hop.endpoint, error)
        elif not failure.number:
            if self._asked.pop(hop.endpoint, None) is None:
                return
            if self.phase is Phase.LOADING and not isinstance(error, PeerBusy):
                self._decide(self._faults.blame(hop, failure.code, error))
                return
            self._failed[hop.endpoint] = error
            self._if_all_answered()
        elif self.phase not in (Phase.OPEN, Phase.REPLAYING):
            pass  # no request was sent in this epoch, or the route has ended
        elif failure.number in self._in_flight or failure.number in self._replays:
            request = self._in_flight.get(failure.number)
            self._decide(self._faults.request_failed(hop, failure.code, error, request))

    def _decide(self, decision: Decision) -> None:
        match decision:
            case Replace(lost, cleared):
                self._effects += [events.Unban(name) for name in cleared]
                if len(lost) == 1:
                    self._lose(*next(iter(lost.items())))
                else:
                    self._reopen(lost, Cause.LOST)
            case OpenAgain(cause, reason, wrong):
                self._forget_caches(wrong)
                self._reopen({}, cause, reason)
            case RequestsFault(error):
                self._begin_setup()
                self._fail(error)

    def _forget_caches(self, hops: Sequence[RouteHop]) -> None:
        """Makes hops compute their caches again."""
        for hop in hops:
            hop.forget_session()
            self._leave_peer(hop.endpoint)

    def _lose(self, endpoint: Endpoint, error: SplitnetError) -> None:
        if self.phase is Phase.OPENING and self._asked.pop(endpoint, None) is not None:
            self._failed[endpoint] = error
            self._if_all_answered()
        else:
            self._reopen({endpoint: error}, cause_of(error))

    def _link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        hop = self._hop_at(endpoint)
        setup = self._setup
        if hop is not None:
            self._lose(hop.endpoint, error)
        elif setup is not None and endpoint.key.text in setup.refused and isinstance(error, NotAuthorized):
            # A peer ends the connection of a withdrawn key first, and refuses the key at the next connection.
            setup.refused[endpoint.key.text] = error

    def _relay(self, hop: RouteHop, result: Result) -> None:
        """Sends the output of a hop on to the next hop, which the hop does not reach."""
        request = self._replays.get(result.number) or self._in_flight.get(result.number)
        message = request.message if request is not None else None
        if not isinstance(message, Step | Forward) or not hop.relayed or hop.planned.end != result.end:
            return
        try:
            relayed = hop.relay(replace(message, epoch=self.epoch), result, self.hidden_size)
        except ProtocolError as error:
            self._decide(self._faults.answered_nonsense(hop, error))
            return
        self._liveness.message_received(self._now)
        self.send_message(self.hops[self.hops.index(hop) + 1].endpoint, relayed)

    def _relay_back(self, hop: RouteHop, gradient: Gradient) -> None:
        index, request = self.hops.index(hop), self._in_flight.get(gradient.number)
        before = self.hops[index - 1] if index else None
        if before is None or not before.relayed or before.planned.end != gradient.boundary or request is None:
            return
        try:
            check_values(gradient.codec, gradient.payload, request.message.positions, self.hidden_size)
        except ProtocolError as error:
            self._decide(self._faults.answered_nonsense(hop, error))
            return
        self._liveness.message_received(self._now)
        self.send_message(before.endpoint, gradient)

    # Silence.

    @property
    def _awaits_hops(self) -> bool:
        """Whether hops must send something, so that silence is a fault."""
        under_way = self.phase is Phase.OPEN and bool(self._in_flight)
        return under_way or bool(self._opening) or self.phase in (Phase.LOADING, Phase.REPLAYING)

    @property
    def _opening(self) -> list[Endpoint]:
        """Hops that have not answered their `Open`. Unreachable peers are left out: the client may still be
        looking for a way to them. Any thread may ask, see `wake_at`."""
        return [each for each in list(self._asked) if not each.hidden] if self.phase is Phase.OPENING else []

    @property
    def _silence_s(self) -> float:
        if self.phase is not Phase.OPEN:
            return silence_s(0.0, self.chunk_ms)
        decodes = all(request.decodes for request in self._in_flight.values())
        predicted_ms = max((request.predicted_ms for request in self._in_flight.values()), default=0.0)
        return silence_s(self.usual_ms if decodes else 0.0, predicted_ms)

    def _check_timers(self) -> None:
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
                self._liveness.begin_round(asked, self._now)
                self._effects += [events.AskAlive(endpoint) for endpoint in asked]

    @property
    def _awaits_copies(self) -> bool:
        return self._setup is not None and self.prefixes.stage is Stage.COPYING

    def _wait_longer(self, endpoint: Endpoint) -> None:
        """Extends the deadline of an `Open` that waits behind other traffic of its link."""
        until, setup = self._asked.get(endpoint), self._setup
        if self.phase is Phase.OPENING and until is not None and setup is not None:
            longest = setup.began + MAX_QUEUE_S
            self._asked[endpoint] = max(until, min(self._now + self._open_timeout_s(endpoint), longest))

    def _unanswered(self, hops: Sequence[Endpoint]) -> None:
        """Records that hops have not answered an `Open` or an adapter."""
        for endpoint in hops:
            if self._asked.pop(endpoint, None) is not None and not self._awaits_copies:
                text = f"the peer at {endpoint.address} does not answer: check its network and firewall"
                self._failed[endpoint] = PeerSilent(text)
        self._if_all_answered()

    def _judge(self) -> None:
        """Judges a round of pings that is over."""
        if not self._awaits_hops:
            self._liveness.cancel_round()
            return
        decodes = self.phase is Phase.OPEN and all(request.decodes for request in self._in_flight.values())
        progress_s = min(self._progress_timeout_s, DECODE_PROGRESS_S) if decodes else self._progress_timeout_s
        number = 0 if self._replays else min(self._in_flight, default=0)
        # A hop may compute a decode step at once, and other steps position by position.
        parts = self.log.positions if self.log is not None else 0
        if self.phase is Phase.OPEN:
            sizes = (1 if each.decodes else getattr(each.message, "positions", 1) for each in self._in_flight.values())
            parts = sum(sizes)
        verdict = self._liveness.verdict(number, parts, progress_s, self._now)
        if self.phase is Phase.OPENING:
            # A live hop may still be connecting to its next hop, or hold nothing yet.
            if verdict is not None and verdict.finding is PingVerdict.SILENT:
                self._unanswered(verdict.hops)
        elif verdict is not None and not (self.phase is Phase.LOADING and verdict.finding is PingVerdict.IDLE):
            self._decide(self._faults.judge(verdict, self._filling, self._in_flight.values()))
