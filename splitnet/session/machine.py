"""The life of a session as a state machine: events in, effects out. No socket, thread, clock, queue or tensor.

`splitnet.session.route_setup` has the phases, and makes the route. Here is what travels along it, and what is made of
what comes and of what does not come.

Whatever a hop does wrong is handled as its death: it is banned and replaced. A cache that may not be what the session
wants is computed again, never used. Waiting is bounded by progress: by how long nothing came, not by totals.

The model is the worker of Dask's distributed (`distributed/worker_state_machine.py`) and h11 (`h11/_state.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from splitnet.errors import (
    ContextTooLong,
    NotAuthorized,
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
from splitnet.session.events import (
    Abandon,
    Alive,
    AskAlive,
    Cause,
    Close,
    Distrust,
    Effect,
    Event,
    GoBack,
    LinkFailed,
    Move,
    NoRoute,
    Planned,
    Received,
    Resize,
    Submit,
    Tick,
    Unban,
    Use,
    UseAdapter,
)
from splitnet.session.liveness import ANSWER_S, MAX_QUEUE_S, Finding, Verdict, silence_s
from splitnet.session.requests import ReplayRequest, Request, RouteHop, StepRequest
from splitnet.session.route_setup import PeerSilent, Phase, SessionRoute, cause_of
from splitnet.wire.codecs import check_size
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.log import SentLog
from splitnet.wire.messages import (
    MAX_POSITIONS,
    AdapterLoaded,
    Failure,
    FailureCode,
    Gradient,
    Message,
    Opened,
    Result,
    Step,
    Timing,
)

DECODE_PROGRESS_S = 30.0
"""A hop that works on a decode step for so long without any progress counts as lost."""

_FORGETFUL = (FailureCode.UNKNOWN_SESSION, FailureCode.OUT_OF_ORDER, FailureCode.STALE_EPOCH, FailureCode.TOO_LONG)
"""A hop that says so once may be right: it restarted, or has work of an older epoch to do."""

_OF_WHAT_CAME = (FailureCode.BAD_MESSAGE, FailureCode.OUT_OF_ORDER, FailureCode.TOO_LONG)
"""What a hop says rightly if the hop before it sends on something else than it should."""


_ERROR_OF_CODE: dict[int, type[SplitnetError]] = {
    FailureCode.BUSY: PeerBusy,
    FailureCode.WRONG_MODEL: WrongSwarm,
    FailureCode.TOO_LONG: ContextTooLong,
    FailureCode.UNKNOWN_SESSION: SessionLost,
    FailureCode.OUT_OF_ORDER: SessionLost,
    FailureCode.STALE_EPOCH: SessionLost,
    FailureCode.LEAVING: PeerLeaving,
}


class SessionState(SessionRoute):
    """What is under way on a session's route, and what to do about whatever happens.

    Args:
        max_positions: context length of the model, if it has one.
        options: of `SessionRoute`.

    Attributes:
        timings: what the last step met, hop by hop, as the tail says.
        usual_ms: what a decode step usually takes, told by the driver; 0: not known.
    """

    def __init__(
        self,
        session: bytes,
        *,
        model: str,
        blocks: tuple[int, int],
        hidden_size: int,
        budget: int,
        max_positions: int | None = None,
        progress_timeout_s: float = 120.0,
        recovery_timeout_s: float = 30.0,
        any_weights: bool = False,
        answer_s: Callable[[Endpoint], float] = lambda _: ANSWER_S,
    ) -> None:
        super().__init__(
            session,
            model=model,
            blocks=blocks,
            hidden_size=hidden_size,
            budget=budget,
            progress_timeout_s=progress_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
            any_weights=any_weights,
            answer_s=answer_s,
        )
        self._max_positions = max_positions
        self.timings: tuple[Timing, ...] = ()
        self.usual_ms = 0.0
        self._in_flight: dict[int, Request] = {}
        self._suspects: list[Endpoint] = []
        """Of those who lose what is under way; empty as long as an answer has come since."""
        self._strikes: dict[str, int] = {}
        """How often peers had forgotten the session since an answer came, by name."""
        self._complaints: dict[int, list[str]] = {}
        """Who has answered with which failure since an answer came; 0: an answer that cannot be used."""
        self._refusing: dict[str, set[str]] = {}
        """By the name of a hop that pushes: who has refused what it sent on, since an answer came."""

    def __str__(self) -> str:
        """What it does now, for people."""
        making = self._making
        if making is None:
            return str(self.phase)
        waits = ["waits"] if making.retry_at < math.inf else []
        refused = sorted({type(error).__name__ for error in making.refused.values()})
        return f"{self.phase} ({', '.join([making.cause, *waits, *refused])})"

    @property
    def under_way(self) -> int:
        """Requests that are not answered."""
        return len(self._in_flight)

    @property
    def last_replay(self) -> int:
        """Number of the last replay that is under way; 0: none is."""
        return max(self._replays, default=0)

    @property
    def wake_at(self) -> float:
        """When a `Tick` is due, in seconds of the clock of `handle`."""
        times = list(self._asked.values())
        making = self._making  # read once: another thread may handle an event meanwhile
        if making is not None:
            times.append(making.retry_at)
        if self._awaits_hops:
            times.append(self._liveness.wake_at(self._silence_s))
        return min(times, default=math.inf)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes in what has happened, and says what is to be done, in order.

        Args:
            event: what has happened.
            now: seconds of a clock that never goes back.
        """
        self._now, self._effects = now, []
        if self.phase is not Phase.CLOSED:
            self._handle(event)
        return self._effects

    def _handle(self, event: Event) -> None:
        match event:
            case Received():
                self._received(event.source, event.message)
            case Submit():
                self._submit(event.requests)
            case GoBack():
                self._go_back(event)
            case Abandon():
                for number in event.numbers:
                    self._in_flight.pop(number, None)
            case Use():
                self._use()
            case Tick():
                self._tick()
            case Alive():
                if event.late:
                    self._wait_longer(event.endpoint)
                elif (name := self._silenced.pop(event.endpoint, None)) is not None:
                    self._effects.append(Unban(name))  # it was not dead, but far away
                if self._liveness.answered(event):
                    self._judge()
            case LinkFailed():
                self._link_failed(event.endpoint, event.error)
            case Planned():
                self._planned(event)
            case NoRoute():
                self._no_route(event)
            case Resize():
                self._resize(event.budget)
            case UseAdapter():
                self._use_adapter(event.adapter, event.for_passes)
            case Move():
                self._move(event)
            case Distrust():
                self._distrust(event)
            case Close():
                self._close()

    # What the caller wants.

    def _use(self) -> None:
        if self.phase in (Phase.NEW, Phase.BROKEN):
            self.error = None
            self._begin_making()
            self._go_on()

    def _submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if isinstance(request, StepRequest):
                try:
                    self._record(request.step)
                except SplitnetError as error:
                    request.error = error
                    continue
            self._put_under_way(request)
            if self.is_open:
                request.send(self)
        if self._in_flight:
            self._use()  # a hop may have left since the caller found the route open

    def _record(self, step: Step) -> None:
        """Logs a step. What hops would rightly refuse is refused here, so that one that refuses what fits is wrong."""
        if self.log is None:
            self.log = SentLog(self.first_codec.code, self.first_codec.bytes_per_position(self.hidden_size))
        longest = max((part.start + part.length for part in step.parts), default=0)
        if self._max_positions is not None and longest > self._max_positions:
            raise ContextTooLong(f"position {longest} is beyond the model's context of {self._max_positions}")
        if step.forks and self._in_flight:
            # A hop that has forked rows does not fork them again, so it could not be told of what was lost before.
            raise SplitnetError("rows were to be forked while steps are under way: wait for them before")
        starts = {part.row: part.start for part in step.parts}
        for request in self._in_flight.values():
            for part in request.step.parts if isinstance(request, StepRequest) else ():
                if part.start < starts.get(part.row, 0) < part.start + part.length:
                    # Were it lost, nobody would send its first positions again, which this one builds on.
                    raise SplitnetError("a step was to begin inside of one under way: wait for that, or begin with it")
            parts = request.step.parts if isinstance(request, StepRequest) else ()
            if len({starts.get(part.row, MAX_POSITIONS) < part.start + part.length for part in parts}) > 1:
                # It would end, and with it what the steps of its other rows build on.
                raise SplitnetError(
                    "a step was to undo some rows of one under way: wait for that, or undo all its rows"
                )
        self.log.record(step.parts, step.forks, step.payload, step.reach)
        self._end_what_is_undone(step)

    def _end_what_is_undone(self, step: Step) -> None:
        """A step that begins before the end of one under way undoes it; sent again, that would build on this one."""
        starts = {part.row: part.start for part in step.parts}
        rows = {fork.row for fork in step.forks} if step.forks is not None else None
        for number, request in list(self._in_flight.items()):
            for part in request.step.parts if isinstance(request, StepRequest) else ():
                is_dropped = rows is not None and part.row not in rows
                if is_dropped or starts.get(part.row, MAX_POSITIONS) < part.start + part.length:
                    request.error = SplitnetError("a later step of the session began before the end of this one")
                    self._in_flight.pop(number, None)

    def _put_under_way(self, request: Request) -> None:
        if not self._in_flight:
            self._liveness.heard(self._now)
        self._in_flight[request.number] = request

    def _go_back(self, event: GoBack) -> None:
        for request in event.batch.passes:
            self._put_under_way(request)
        if self.is_open:
            event.batch.go_back(event.adapter, self)
        self._use()

    def _distrust(self, event: Distrust) -> None:
        """An answer that is no use: its sender is replaced, then all who had a part in it, then it is believed."""
        request, where = event.request, event.source
        request.undo()
        self._put_under_way(request)
        error = PeerFailed(f"the peer at {where.address} {event.why}")
        hop = self._hop_at(where)
        if not request.makers:
            request.makers = [each.name for each in self.hops]
            lost = [hop] if hop is not None else []
        else:
            lost = [each for each in self.hops if each.name in request.makers]
            if not lost:
                self._believe(0, error)
                return
            for each in self.hops:  # what those that stay have computed was made of what these sent on
                if each not in lost:
                    each.forget()
                    self._leave(each.endpoint)
        self._reopen({each.endpoint: error for each in lost}, Cause.LOST)

    def _close(self) -> None:
        for endpoint in list(self._members):
            self._leave(endpoint)
        self._end_requests(SessionClosed("the session was closed while it was used: begin with a new one"))
        self.log = None
        self._enter(Phase.CLOSED)

    # What the route asks.

    @property
    def _is_used(self) -> bool:
        return bool(self._in_flight)

    def _resume(self) -> None:
        if not self._in_flight:
            self._forgive()
        for number in sorted(self._in_flight):
            if not self._in_flight[number].done:
                self._in_flight[number].send(self)

    def _end_requests(self, error: SplitnetError) -> None:
        self.error = error
        for request in self._in_flight.values():
            request.error = error
        self._in_flight, self._making = {}, None
        if self._former_budget:
            self.budget, self._former_budget = self._former_budget, 0
        self._forgive()
        self._stop_waiting()

    def _forgive(self) -> None:
        """An answer has come, or none is awaited: what went wrong before counts no more."""
        self._attempts = 0
        self._strikes, self._complaints, self._refusing, self._suspects = {}, {}, {}, []

    # What comes from peers.

    def _received(self, source: Endpoint, message: Message) -> None:
        hop = self._hop_at(source)
        if hop is None or getattr(message, "epoch", None) != self.epoch:
            return  # of a hop that is no longer on the route, or of an epoch that is no more
        match message:
            case Failure():
                self._failure(hop, message)
            case Opened():
                self._opened(hop, message)
            case AdapterLoaded():
                self._adapter_loaded(hop, message)
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
        except ProtocolError as error:
            self._blame(hop, 0, PeerFailed(f"the peer at {hop.endpoint.address} answered nonsense: {error}"))
            return
        if not taken:
            return
        self._liveness.heard(self._now)
        if isinstance(request, StepRequest) and isinstance(message, Result):
            self.timings = message.timings
        if isinstance(request, ReplayRequest):
            self._replayed(request)
        elif request.done:
            self._in_flight = {number: each for number, each in self._in_flight.items() if not each.done}
            self._forgive()

    def _came_too_soon(self, request: StepRequest) -> bool:
        earlier = (each for number, each in self._in_flight.items() if number < request.number)
        return any(isinstance(each, StepRequest) for each in earlier)

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
            self._request_failed(hop, failure.code, error)

    def _request_failed(self, hop: RouteHop, code: int, error: SplitnetError) -> None:
        feeder = self._feeder(hop)
        if feeder is not None and code in _OF_WHAT_CAME:
            refusing = self._refusing.setdefault(feeder.name, set())
            refusing.add(hop.name)
            if len(refusing) > 1:
                text = f"what the peer at {feeder.endpoint.address} sends on is refused by two others: {error}"
                self._lose(feeder, PeerFailed(text))
                return
        if code == FailureCode.BUSY:
            self._lose(hop, error)
        elif code in _FORGETFUL:
            self._forgot(hop, code, error)
        else:
            self._blame(hop, code, error)

    def _forgot(self, hop: RouteHop, code: int, error: SplitnetError) -> None:
        """A hop says that it lacks what a request needs; or its next hop does, which it passes on.

        The first time all are opened again, and those that hold nothing are filled. If that is no help, one of the two
        is wrong.
        """
        strikes = self._strikes[hop.name] = self._strikes.get(hop.name, 0) + 1
        if strikes == 1:
            if code != FailureCode.UNKNOWN_SESSION:  # it holds something else than it should
                hop.forget()
                self._leave(hop.endpoint)
            self._reopen({}, Cause.SESSION_LOST, str(error))
            return
        index = self.hops.index(hop)
        may_be_next = (
            code == FailureCode.UNKNOWN_SESSION and self._feeder(hop) is not None and index + 1 < len(self.hops)
        )
        self._lose(self.hops[index + 1] if may_be_next and strikes == 2 else hop, PeerFailed(str(error)))

    def _feeder(self, hop: RouteHop) -> RouteHop | None:
        """Who pushes steps to a hop; None: the client sends them."""
        index = self.hops.index(hop)
        before = self.hops[index - 1] if index else None
        return before if before is not None and not before.relayed else None

    def _blame(self, hop: RouteHop, code: int, error: SplitnetError) -> None:
        """A hop has failed. If another says the same of the same, it is the request's own fault, and the caller's."""
        if code:
            complaints = self._complaints.setdefault(code, [])
            complaints.append(hop.name)
            if len(complaints) > 1:
                self._believe(code, error)
                return
        self._lose(hop, error)

    def _believe(self, code: int, error: SplitnetError) -> None:
        self._complaints.pop(code, None)
        self._begin_making()
        self._fail(error)

    def _lose(self, hop: RouteHop, error: SplitnetError) -> None:
        if self.phase is Phase.OPENING and self._asked.pop(hop.endpoint, None) is not None:
            self._failed[hop.endpoint] = error
            self._if_all_answered()
        else:
            self._reopen({hop.endpoint: error}, cause_of(error))

    def _link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        hop = self._hop_at(endpoint)
        making = self._making
        if hop is not None:
            self._lose(hop, error)
        elif making is not None and endpoint.key.text in making.refused and isinstance(error, NotAuthorized):
            # A key that is taken away ends the connection first, and is refused when that is made anew.
            making.refused[endpoint.key.text] = error

    def _relay(self, hop: RouteHop, result: Result) -> None:
        """The client stands between two hops that do not reach each other."""
        request = self._replays.get(result.number) or self._in_flight.get(result.number)
        message = request.message if request is not None else None
        if message is None or not hop.relayed or hop.planned.end != result.end:
            return
        try:
            if result.codec != hop.codec.code:
                raise ProtocolError(f"codec {result.codec} was not agreed upon")
            check_size(result.codec, result.payload, message.positions, self.hidden_size)
        except ProtocolError as error:
            self._blame(hop, 0, PeerFailed(f"the peer at {hop.endpoint.address} answered nonsense: {error}"))
            return
        if isinstance(message, Step):
            hop.log_relayed(message, result)
        self._liveness.heard(self._now)
        relayed = replace(
            message,
            epoch=self.epoch,
            codec=result.codec,
            payload=result.payload,
            boundary=result.end,
            timings=result.timings,
        )
        self.send(self.hops[self.hops.index(hop) + 1].endpoint, relayed)

    def _relay_back(self, hop: RouteHop, gradient: Gradient) -> None:
        index = self.hops.index(hop)
        before = self.hops[index - 1] if index else None
        if before is not None and before.relayed and before.planned.end == gradient.boundary:
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

    @property
    def _awaited_parts(self) -> int:
        """In how many parts a hop may compute what is awaited: a decode step in one, others position by position."""
        if self.phase is not Phase.OPEN:
            return self.log.positions if self.log is not None else 0
        return sum(
            1 if request.decodes or request.message is None else request.message.positions
            for request in self._in_flight.values()
        )

    def _tick(self) -> None:
        making = self._making
        if making is not None and self._now >= making.retry_at:
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
                self._effects += [AskAlive(endpoint) for endpoint in asked]

    def _wait_longer(self, endpoint: Endpoint) -> None:
        """An `Open` waits behind what else goes over the link."""
        until, making = self._asked.get(endpoint), self._making
        if self.phase is Phase.OPENING and until is not None and making is not None:
            longest = making.began + MAX_QUEUE_S
            self._asked[endpoint] = max(until, min(self._now + self._open_timeout_s(endpoint), longest))

    def _unanswered(self, hops: Sequence[Endpoint]) -> None:
        """Hops say nothing to what was asked of them before anything is sent along the route."""
        for endpoint in hops:
            if self._asked.pop(endpoint, None) is not None:
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
        verdict = self._liveness.verdict(number, self._awaited_parts, progress_s, self._now)
        if self.phase is Phase.OPENING:
            # Those that live may have to reach their next hops, or hold nothing yet.
            if verdict is not None and verdict.finding is Finding.SILENT:
                self._unanswered(verdict.hops)
        elif verdict is not None and not (self.phase is Phase.LOADING and verdict.finding is Finding.IDLE):
            self._act_on(verdict)

    def _act_on(self, verdict: Verdict) -> None:
        if verdict.finding is Finding.SILENT:
            errors = {each: PeerSilent(f"the peer at {each.address} does not answer") for each in verdict.hops}
            self._reopen(dict(errors), Cause.LOST)
        elif verdict.finding is Finding.FORGOTTEN:
            hop = self._hop_at(verdict.hops[0])
            if hop is not None:
                error = SessionLost(f"the peer at {hop.endpoint.address} does not hold the session any more")
                self._request_failed(hop, FailureCode.UNKNOWN_SESSION, error)
        elif verdict.finding is Finding.STUCK:
            self._suspects = self._suspects or self.endpoints()
            likeliest = [*verdict.hops, *(hop.endpoint for hop in self._filling)]
            self._replace_likeliest(likeliest, "has worked for too long without any progress")
        else:
            self._stalled(verdict.hops)

    def _stalled(self, hops: Sequence[Endpoint]) -> None:
        """All hops live, and what was under way is at none of them. `hops`: the likeliest culprit first."""
        if not self._suspects:  # opened again, hops find out whether they reach each other
            self._suspects = self.endpoints()
            self._reopen({}, Cause.STALLED, "what was under way was lost between two hops that live")
            return
        # One of those that were there at the first time loses messages, or keeps them.
        self._replace_likeliest([*(hop.endpoint for hop in self._filling), *hops], "loses what is sent to it")

    def _replace_likeliest(self, likeliest: Sequence[Endpoint], what: str) -> None:
        where = next((each for each in likeliest if each in self._suspects), likeliest[0])
        self._suspects = [each for each in self._suspects if each != where] or [where]
        self._reopen({where: PeerLost(f"the peer at {where.address} {what}")}, Cause.LOST)


def error_of(failure: Failure, source: Endpoint) -> SplitnetError:
    """The exception that a peer's answer means; any code that has none of its own is `PeerFailed`."""
    kind = _ERROR_OF_CODE.get(failure.code, PeerFailed)
    return kind(f"the peer at {source.address} answered: {failure.text}")
