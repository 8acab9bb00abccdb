"""Runs a session's state machine: its queue, its clock, its thread."""

from __future__ import annotations

import logging
import math
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from scheduler.cost import CODING_MS, Encoding, choose_codec, encodings_of
from scheduler.facts import Link
from scheduler.liveness import ANSWER_S, ANSWER_TRIPS, FIRST_TRIPS, UPLINK_QUEUE_S, PingAnswer
from scheduler.replan import RouteWatch, changed_hops
from splitnet.errors import CoverageError, NotAuthorized, PeerBusy, SessionClosed, SplitnetError
from splitnet.session import events
from splitnet.session.events import Phase, Recovered
from splitnet.session.failover import RouteHop
from splitnet.session.machine import SessionState
from splitnet.session.options import ConnectionOptions
from splitnet.session.prefix_lookup import PrefixSource
from splitnet.session.requests import Request
from splitnet.swarm.client_links import refusal
from splitnet.swarm.plan import Needs, PlannedHop, Prediction, repaired_route, with_kept_hops
from splitnet.swarm.swarm import Swarm
from splitnet.transport import flow
from splitnet.transport.prober import PingReply
from splitnet.wire.codecs import CODECS, DEFAULT_INT8, Codec, codec_by_name
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import SESSION_BYTES, Gradient, Message, Open, Result
from splitnet.wire.sent_log import REPLAY_POSITIONS

log = logging.getLogger(__name__)

USUAL_POSITIONS = 64  # assumed positions of a step when several are under way: a micro-batch, or a chunk of a prefill
ROUND_S = 0.1  # time within which all hops of a round are pinged
EMBEDDINGS = codec_by_name("fp16")


class LinkCodecs:
    """Chooses codecs for the links of routes.

    Args:
        name: of the codec of every link, or "auto" to choose a codec for each link by cost.
        exact_embeddings: the link to the first hop has at least the precision of `EMBEDDINGS`. Gradients need this
            precision, because blocks amplify the errors of integer codecs.

    Attributes:
        vary: whether another route may have other codecs, and therefore give other tokens.

    Raises:
        CodecError: there is no such codec.
    """

    def __init__(self, swarm: Swarm, name: str, *, exact_embeddings: bool = False) -> None:
        self.vary = name == "auto"
        if not self.vary:
            codec_by_name(name)
        self._swarm = swarm
        self._name = name
        self._exact_embeddings = exact_embeddings

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """Sizes and times of the codecs that a link may use, for the planner."""
        sizes = {name: codec.bytes_per_position(self._swarm.facts.hidden_size) for name, codec in CODECS.items()}
        if self.vary:
            return encodings_of(sizes)
        times = CODING_MS.get(self._name, CODING_MS[DEFAULT_INT8])
        return (Encoding(self._name, sizes[self._name], *times),)

    @property
    def of_taps(self) -> Codec:
        """The codec of hidden states that hops send to the client."""
        return codec_by_name(DEFAULT_INT8 if self.vary else self._name)

    def along(self, route: Sequence[PlannedHop]) -> tuple[Codec, ...]:
        """The codecs of a route's links: from the client to the first hop, then after each hop."""
        records, hidden = [hop.record for hop in route], self._swarm.facts.hidden_size
        first = self._choose(self._swarm.link(None, records[0]), records[0].codecs)
        if self._exact_embeddings and first.bytes_per_position(hidden) < EMBEDDINGS.bytes_per_position(hidden):
            first = EMBEDDINGS
        codecs = [first]
        for record, following in zip(records, [*records[1:], None], strict=True):
            shared = [name for name in record.codecs if following is None or name in following.codecs]
            codecs.append(self._choose(self._swarm.link(record, following), shared))
        return tuple(codecs)

    def _choose(self, link: Link, spoken: Sequence[str]) -> Codec:
        if not self.vary:
            return codec_by_name(self._name)
        hidden = self._swarm.facts.hidden_size
        sizes = {name: CODECS[name].bytes_per_position(hidden) for name in spoken if name in CODECS}
        return codec_by_name(choose_codec(sizes, link.bytes_per_ms))


class Routes:
    """Plans routes for one session. Calls block, because they read the directory and measure links.

    any_weights: whether blocks may be held in another format, where no peer holds them in the session's format.
    """

    def __init__(self, swarm: Swarm, codecs: LinkCodecs, blocks: tuple[int, int], *, any_weights: bool = False) -> None:
        self.watch = RouteWatch()  # times of steps on the present route
        self._swarm = swarm
        self._codecs = codecs
        self._blocks = blocks
        self._any_weights = any_weights
        self._news = swarm.measurer.news
        self._route: list[PlannedHop] = []
        self._lost = False  # the latest plan replaces a route that was lost
        self._planned: tuple[list[PlannedHop], float] = [], 0.0  # the latest plan, and its predicted ms per step

    def answer_query(self, asked: events.AskRoute, needs: Needs) -> events.RoutePlanned | events.RouteFailed:
        """The route that was asked for, or the reason why there is none."""
        swarm = self._swarm

        def route_for(needs: Needs) -> list[PlannedHop]:
            plan = partial(swarm.plan_route, needs, fresh=asked.fresh)
            return repaired_route(asked.kept, asked.excluded, self._blocks, plan)

        try:
            if asked.unban:
                swarm.unban_living()
            try:
                route = route_for(needs)
            except (CoverageError, PeerBusy):
                if not (needs.held and self._any_weights):
                    raise
                route = route_for(replace(needs, held=()))
        except SplitnetError as error:
            try:
                present = frozenset(record.key.text for record in swarm.peers())
            except SplitnetError:
                present = frozenset[str]()
            return events.RouteFailed(asked.number, error, present, swarm.was_covered)
        self._planned, self._lost = (route, swarm.planner.cost_ms(replace(needs, prompt=0), route)), True
        return events.RoutePlanned(asked.number, tuple(route), self._codecs.along(route))

    def step_took(self, elapsed_ms: float, positions: int) -> None:
        """Notes the time of a decode step during which nothing else was under way."""
        ratio = self.watch.observe_step(elapsed_ms, positions, time.monotonic())
        if ratio is not None:
            self._swarm.measurements.add_prediction(tuple(hop.name for hop in self._route), ratio)

    def better_route(
        self, hops: Sequence[PlannedHop], needs_now: Callable[[], Needs], cached: int, steps_left: int
    ) -> events.MoveRoute | None:
        """A better route than `hops` whose gain exceeds the cost of the move; None: there is none, or no need.

        cached: positions that new hops would have to compute. steps_left: largest expected number of decode steps.
        """
        swarm, watch = self._swarm, self.watch
        if self._route != list(hops):
            self._route = list(hops)
            # Compares with the prediction at planning, because facts that arrive before the first step may show that
            # the route is slow.
            route, predicted_ms = self._planned
            known = route == self._route
            watch.begin_route(predicted_ms if known else swarm.planner.cost_ms(needs_now(), hops), lost=self._lost)
        now = time.monotonic()
        news = self._news != swarm.measurer.news
        if not watch.may_look(now, news=news):
            return None
        self._news = swarm.measurer.news
        needs = needs_now()
        known_ms = swarm.planner.cost_ms(needs, hops)
        silent = swarm.measurements.silent_peers() & {hops[0].name, hops[-1].name}
        look = watch.advise(now, known_ms, news=news, ends_silent=bool(silent))
        if look.suspects:
            swarm.measurer.look_again([hops[0].record, hops[-1].record], probe=look.measures)
        if not look.plans:
            return None
        try:
            route = with_kept_hops(swarm.plan_route(needs, holders={hop.name for hop in hops}), hops)
        except SplitnetError as error:
            log.debug("no other route: %s", error)
            return None
        if route == list(hops):
            return None
        predicted_ms = swarm.planner.cost_ms(needs, route)
        before, changed = changed_hops(hops, route)
        links, new_links = (set(pairwise(hop.name for hop in each)) for each in (hops, route))
        move_ms, error = (
            swarm.planner.move_ms(needs, before, changed, max(cached, 1)),
            swarm.measurements.prediction_error,
        )
        shares_links = bool(links & new_links)
        new_ms = watch.better_ms(known_ms, predicted_ms, error, move_ms, steps_left, shares_links=shares_links)
        if new_ms is None:
            return None
        current_ms = watch.present_ms(known_ms)
        self._planned, self._lost = (route, predicted_ms), False
        told = {"step_ms": round(new_ms, 1), "former_step_ms": round(current_ms, 1)}
        log.info("a better route: %.0f ms per step instead of %.0f ms", new_ms, current_ms, extra=told)
        return events.MoveRoute(tuple(route), self._codecs.along(route))


@dataclass(slots=True)
class SessionTraffic:
    """Traffic of a session. bytes_sent: by the client, with headers. joules: spent by peers on whole sequences
    and long prompts; nan: not all peers report their watts."""

    steps: int = 0
    positions: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    joules: float = 0.0


@dataclass(frozen=True, slots=True)
class _HopQuery:
    """Times of the first and the last ping of a hop; traffic of its link at the last ping, and of links with queues."""

    first_at: float
    at: float
    passed: flow.LinkTraffic | None
    queues: Mapping[Endpoint, flow.LinkTraffic]


class SessionDriver:
    """A session along a route of peers. One thread uses a session at a time.

    The transport's thread handles messages and sends the effects, so that the client relays without waiting for the
    thread that uses the session. Only the latter plans routes, because planning blocks.

    Args:
        options: options of the client. If `any_weights` is None, weights may vary where codecs vary.
        reservation, progress_timeout_s: see `SessionState`.
        blocks: the blocks `[start, end)` that the peers run; None: all blocks.
        in_flight, energy_slowdown: see `splitnet.swarm.plan.Needs`.
    """

    def __init__(
        self,
        swarm: Swarm,
        options: ConnectionOptions,
        *,
        reservation: int,
        codecs: LinkCodecs,
        blocks: tuple[int, int] | None,
        in_flight: int,
        progress_timeout_s: float,
        energy_slowdown: float | None = None,
    ) -> None:
        self.id = secrets.token_bytes(SESSION_BYTES)
        self.traffic = SessionTraffic()
        any_weights = codecs.vary if options.any_weights is None else options.any_weights
        self.state = SessionState(
            self.id,
            model=swarm.facts.fingerprint,
            blocks=blocks or (0, swarm.facts.num_blocks),
            hidden_size=swarm.facts.hidden_size,
            max_positions=swarm.facts.max_positions,
            reservation=reservation,
            progress_timeout_s=progress_timeout_s,
            recovery_timeout_s=options.recovery_timeout_s,
            any_weights=any_weights,
            answer_s=self._answer_s,
        )
        self.avoid = frozenset[str]()  # names of peers that may not be used
        self.recoveries: list[Recovered] = self.state.recoveries  # repairs of the route so far
        self._swarm = swarm
        self._codecs = codecs
        self._in_flight = in_flight
        self._energy_slowdown = energy_slowdown
        self._kv_at_least = options.kv_at_least
        self._prompt = 0
        self._stored: dict[str, int] = {}  # positions of the new text that peers have stored, by name
        self._routes = Routes(swarm, codecs, self.state.blocks, any_weights=any_weights)
        self._events: deque[events.Event] = deque()
        self._asked: deque[events.AskRoute] = deque(maxlen=1)  # filled by any thread, emptied by the waiting thread
        self._handling = threading.RLock()
        self._is_handling = False
        self._unanswered: dict[Endpoint, _HopQuery] = {}  # pinged hops without an answer
        self._changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._until: Callable[[], bool] | None = None  # condition of `_wait_until`, which wakes its thread
        self._wakes_at = math.inf
        swarm.links.register(self)

    def count_energy(self, answers: Iterable[Result | Gradient | None]) -> None:
        """Adds the energy that hops have spent on answers, from the times and watts that they report."""
        watts = [hop.planned.record.watts for hop in self.hops]
        for answer in answers:
            timings = answer.timings if answer is not None else ()
            order = watts[::-1] if isinstance(answer, Gradient) else watts
            spent = sum(each * timing.compute_us / 1e6 for each, timing in zip(order, timings, strict=False))
            self.traffic.joules += spent if all(watts) and len(timings) == len(watts) else math.nan

    @property
    def hops(self) -> list[RouteHop]:
        """The route; empty before the first step."""
        return self.state.hops

    def needs(self, prompt: int = 0) -> Needs:
        """Requirements of the route of a decoding session. prompt: positions of the first step; 0: its time does not
        count."""
        state, encodings = self.state, self._codecs.encodings
        positions, prompt = (1, prompt) if self._in_flight == 1 else (USUAL_POSITIONS, 0)
        steps = positions, self._in_flight, self._energy_slowdown, prompt
        context = prompt + (state.log.positions if state.log is not None else 0)
        kv = self._kv_at_least
        return Needs(
            state.reservation, encodings, state.blocks, *steps, state.held, context, kv_at_least=kv, avoid=self.avoid
        )

    def _needs_of_new(self) -> Needs:
        """Requirements of a new route, whose peers may have stored pages of the text."""
        log, needs, stored = self.state.log, self.needs(self._prompt), self._stored
        row = log.only_row if log is not None else None
        if log is not None and row is not None:
            stored = self._swarm.prefix_index.positions(log.labels(row))
        records = {record.key.text: record for record in self._swarm.peers()} if stored else {}
        unusable = self._swarm.bans.unusable(records.values(), self._swarm.links)
        self.state.prefixes.sources = tuple(
            PrefixSource(name, record.endpoint, (record.start, record.end), stored[name])
            for name, record in records.items()
            if name in stored and name not in unusable
        )
        if log is None or row is None or not self.state.hops:
            return replace(needs, stored=stored)
        return replace(needs, prompt=log.length(row), stored=stored) if stored and self._in_flight == 1 else needs

    def predictions(self) -> Callable[[int], Prediction]:
        """Predicted times of steps on the route, by their positions."""
        return self._swarm.planner.predictions(self.needs(), [hop.planned for hop in self.hops])

    def open(self, prompt: int = 0) -> None:
        """Plans a route and reserves memory on its hops; the first step calls this if the caller has not.

        prompt: positions of the first step, to weigh the time to the first token in the choice of the route.

        Raises:
            CoverageError: no peer serves some blocks; if they were served before, no peer
                served them again within `recovery_timeout_s`.
            PeerBusy: no peer of some blocks has memory for the reservation.
            NotAuthorized: peers do not accept this client's key, or are not trusted.
            PeerLost: peers do not answer, and are not replaced in time.
            SessionClosed: another thread has closed the session.
        """
        trusted = self._swarm.trusted
        for hop in self.state.hops if trusted is not None else ():
            if trusted is not None and not trusted.allows(hop.endpoint.key.curve_raw):
                error = NotAuthorized(f"the peer at {hop.endpoint.address} is not one of your trusted peers any more")
                self.link_failed(hop.endpoint, error)
        if self.state.is_open:
            return
        self._prompt = 0 if self.state.hops else prompt
        self.feed(events.Use())
        self._wait_until(lambda: self.state.is_settled)
        self._raise_if_broken()

    def close(self) -> None:
        """Frees the memory on all hops, from any thread; a thread that uses the session gets `SessionClosed`."""
        self._swarm.links.unregister(self)
        self.feed(events.CloseSession())

    def close_later(self) -> None:
        """Closes the session within a second, in another thread; for finalizers, see `Links.close_later`."""
        self._swarm.links.close_later(self)

    def deliver(self, source: Endpoint, message: Message) -> None:
        """Handles a message; called by the transport's thread."""
        self.traffic.bytes_received += len(getattr(message, "payload", b""))
        self.feed(events.Received(source, message))

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """Handles the loss or refusal of a link of the client; called by the transport's thread."""
        self.feed(events.LinkFailed(endpoint, error))

    def feed(self, event: events.Event) -> None:
        """Handles an event and performs its effects. Any thread may call this. Raises the first error of an effect."""
        failure: Exception | None = None
        self._events.append(event)
        with self._handling:
            if self._is_handling:
                return  # an effect has caused this event: the outer call handles it next
            self._is_handling = True
            try:
                while self._events:
                    for effect in self.state.handle(self._events.popleft(), time.monotonic()):
                        # An error must not skip later effects: a skipped request for a route is never repeated.
                        try:
                            self._perform(effect)
                        except Exception as error:
                            failure = failure or error
            finally:
                self._is_handling = False
        state, until = self.state, self._until
        has_work = self._asked or state.phase is Phase.CLOSED or state.wake_at < self._wakes_at
        if until is not None and (has_work or self._wants_prediction() or until()):
            self._changed.put(None)
        if failure is not None:
            raise failure

    def _wants_prediction(self) -> bool:
        return self.state.phase is Phase.REPLAYING and not self.state.chunk_ms

    def _perform(self, effect: events.Effect) -> None:
        swarm = self._swarm
        match effect:
            case events.Send(endpoint, message):
                if isinstance(message, Open) and (state := swarm.links.link_state(endpoint)).is_final:
                    self._events.append(events.LinkFailed(endpoint, refusal(endpoint, state)))
                else:
                    self.traffic.bytes_sent += swarm.links.send(endpoint, message)
            case events.AskAlive(endpoint):
                links, before = swarm.links, self._unanswered.get(endpoint)
                now = time.perf_counter()
                first_at = before.first_at if before is not None and now - before.at < UPLINK_QUEUE_S else now
                self._unanswered[endpoint] = _HopQuery(first_at, now, links.traffic(endpoint), links.queues())
                swarm.ping(endpoint, self.id).add_done_callback(lambda pong: self._alive(endpoint, pong))
            case events.AskRoute():
                self._asked.append(effect)
            case events.BanPeer(name, leaves):
                swarm.ban(name, leaves=leaves)
            case events.Unban(name):
                swarm.bans.lift(name)
            case events.Note(kind, text, peer):
                level = logging.WARNING if kind in ("lost", "failed", "weights") else logging.INFO
                log.log(level, "%s", text, extra={"session": self.id.hex()} | ({"peer": peer} if peer else {}))
                swarm.events.note(kind, text)

    def _alive(self, endpoint: Endpoint, pong: Future[PingReply]) -> None:
        answer = pong.result()
        self._unanswered.pop(endpoint, None)
        self.feed(PingAnswer(endpoint, answer.queue_ms, answer.holds, answer.waiting, answer.done, answer.last))

    def _wait_until(self, until: Callable[[], bool]) -> None:
        """Waits for a condition, and plans meanwhile. Raises SessionClosed: another thread has closed the session."""
        self._until = until  # set before the first check, so that later events wake this thread
        try:
            while True:
                self._wakes_at = math.inf
                done = until()
                if self.state.phase is Phase.CLOSED:
                    raise SessionClosed("the session was closed while it was used: begin with a new one")
                if done:
                    return
                if self._asked:
                    self.feed(self._routes.answer_query(self._asked.popleft(), self._needs_of_new()))
                    continue
                if self._wants_prediction():
                    self.state.chunk_ms = self.predictions()(REPLAY_POSITIONS).latency_ms
                self._wakes_at = self.state.wake_at
                try:
                    self._changed.get(timeout=max(0.0, min(self._wakes_at - time.monotonic(), threading.TIMEOUT_MAX)))
                except queue.Empty:
                    for endpoint in self._late():
                        self.feed(PingAnswer(endpoint, 0.0, late=True))
                    self.feed(events.Tick())
        finally:
            self._until = None

    def _late(self) -> list[Endpoint]:
        """Hops without an answer whose pings wait behind other traffic, on their own link or on another one.

        The uplink of a home is one queue, in which a ping may wait behind a prompt to another peer. The wait is
        excused only for a bounded time, and only if no peer answers quickly.
        """
        links, now = self._swarm.links, time.perf_counter()
        late: list[Endpoint] = []
        for endpoint, asked in list(self._unanswered.items()):
            if asked.passed is None or now - asked.at >= 2 * self._answer_s(endpoint):
                continue
            passed = links.traffic(endpoint)
            if passed is None:
                continue
            # A tunnel confirms data before it has delivered the data, so sent bytes prove nothing for hidden peers.
            carries = passed.has_received(asked.passed) or (not endpoint.hidden and passed.has_sent(asked.passed))
            if carries or self._stands_behind_others(endpoint, asked, passed):
                late.append(endpoint)
        return late

    def _answer_s(self, endpoint: Endpoint) -> float:
        links = self._swarm.links
        trips = ANSWER_TRIPS if links.link_state(endpoint) is LinkState.UP else FIRST_TRIPS
        return links.prober.answer_limit_s(endpoint, ANSWER_S, trips)

    def _stands_behind_others(self, endpoint: Endpoint, asked: _HopQuery, passed: flow.LinkTraffic) -> bool:
        links, now = self._swarm.links, time.perf_counter()
        # The first ping is not checked: it may have arrived a moment ago, or a full queue may have dropped it.
        if asked.at > asked.first_at:
            quick = links.prober.quick_at >= asked.at - ROUND_S
            if quick or not passed.unsent or now - asked.first_at >= UPLINK_QUEUE_S:
                return False
        others = [(before, links.traffic(other)) for other, before in asked.queues.items() if other != endpoint]
        return any(passed is not None and passed.has_sent(before) for before, passed in others)

    def _wait_for(self, requests: Sequence[Request[Any]]) -> None:
        """Waits until all requests are done; raises the error of the first request that fails."""
        try:
            for request in requests:
                self._wait_until(lambda request=request: request.is_done or request.error is not None)
                if request.error is not None:
                    raise request.error
        except BaseException:
            self.feed(events.Abandon(tuple(request.number for request in requests)))
            raise

    def _raise_if_broken(self) -> None:
        if not self.state.is_open and self.state.error is not None:
            raise self.state.error
