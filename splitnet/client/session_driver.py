"""Runs a session's state machine: its queue, its clock, its thread."""

from __future__ import annotations

import logging
import math
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from splitnet.client.bans import BAN_S
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.liveness import ANSWER_S
from splitnet.client.planner import Forecast, Needs
from splitnet.client.requests import Request
from splitnet.client.route_hop import RouteHop
from splitnet.client.routes import Routes
from splitnet.client.session_events import (
    Abandon,
    Alive,
    AskAlive,
    AskRoute,
    Ban,
    Close,
    Effect,
    Event,
    LinkFailed,
    Note,
    Received,
    Recovered,
    Send,
    Tick,
    Unban,
    Use,
)
from splitnet.client.session_route import Phase
from splitnet.client.session_state import SessionState
from splitnet.client.swarm import Swarm
from splitnet.errors import NotAuthorized, SessionClosed, SplitnetError
from splitnet.net import tcp
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.links import refusal
from splitnet.net.messages import SESSION_BYTES, Message, Open
from splitnet.net.prober import ANSWER_TRIPS, FIRST_TRIPS, Answer
from splitnet.net.sent_log import REPLAY_POSITIONS

log = logging.getLogger(__name__)

RECOVERY_TIMEOUT_S = 30.0
PROGRESS_TIMEOUT_S = 120.0

USUAL_POSITIONS = 64
"""Of a step, where many are under way: a micro-batch, or a chunk of a prefill. Otherwise it is a token."""


QUEUED_S = 10.0
"""So long a hop may be silent because the client sends much to others."""
ROUND_S = 0.1
"""All hops are asked within that."""


@dataclass(slots=True)
class Traffic:
    """What a session has moved so far."""

    steps: int = 0
    positions: int = 0
    bytes_sent: int = 0
    """By the client, headers included."""
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class _Asked:
    """first_at, at: when a hop was asked first, and last. passed: what its link had carried then. queues: the links on
    which something waited then.
    """

    first_at: float
    at: float
    passed: tcp.Traffic | None
    queues: Mapping[Endpoint, tcp.Traffic]


class SessionDriver:
    """A session along a route of peers. One thread uses a session at a time.

    Messages come in the transport's thread, which has them handled and sends what follows from them, so that the client
    relays without waiting for the thread that uses the session. What blocks (planning) is done by that thread.

    Args:
        swarm: the peers.
        budget: positions of KV cache to reserve over all rows.
        codecs: chooses the codec of each link.
        blocks: what the peers run of the model, `[start, end)`; None: all of it.
        in_flight: how many steps are under way at the same time.
        energy_slowdown: see `splitnet.client.planner.Needs`.
        progress_timeout_s: how long hops may work on something without any progress.
        recovery_timeout_s: how long to wait for other peers when blocks of the route are served by nobody any more.
        any_weights: whether it goes on with weights held otherwise where nobody is left who holds them as on the route
            before; None: if codecs vary with the route, too.
    """

    def __init__(
        self,
        swarm: Swarm,
        *,
        budget: int,
        codecs: LinkCodecs,
        blocks: tuple[int, int] | None,
        in_flight: int,
        progress_timeout_s: float,
        recovery_timeout_s: float,
        energy_slowdown: float | None = None,
        any_weights: bool | None = None,
    ) -> None:
        self.id = secrets.token_bytes(SESSION_BYTES)
        self.traffic = Traffic()
        if any_weights is None:
            any_weights = codecs.vary
        self.state = SessionState(
            self.id,
            model=swarm.facts.fingerprint,
            blocks=blocks or (0, swarm.facts.num_blocks),
            hidden_size=swarm.facts.hidden_size,
            max_positions=swarm.facts.max_positions,
            budget=budget,
            progress_timeout_s=progress_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
            any_weights=any_weights,
            answer_s=self._answer_s,
        )
        self._swarm = swarm
        self._codecs = codecs
        self._in_flight = in_flight
        self._energy_slowdown = energy_slowdown
        self._prompt = 0
        self._routes = Routes(swarm, codecs, self.state.blocks, any_weights=any_weights)
        self._events: deque[Event] = deque()
        self._asked: deque[AskRoute] = deque(maxlen=1)
        """The route to be planned, if there is one: filled by any thread, emptied by the one that waits."""
        self._handling = threading.RLock()
        self._is_handling = False
        self._unanswered: dict[Endpoint, _Asked] = {}
        """Hops that were asked whether they live, and have not answered since."""
        self._changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._until: Callable[[], bool] | None = None
        """What the thread in `_wait` waits for: it is woken for that alone, not for every event."""
        self._wakes_at = math.inf
        swarm.links.register(self)

    @property
    def hops(self) -> list[RouteHop]:
        """The route; empty before the first step."""
        return self.state.hops

    @property
    def recoveries(self) -> list[Recovered]:
        """Repairs of the route so far."""
        return self.state.recoveries

    @property
    def needs(self) -> Needs:
        """What the session wants of its route once it decodes."""
        return self._needs(0)

    def forecasts(self) -> Callable[[int], Forecast]:
        """What steps are expected to take on the route, by their positions."""
        return self._swarm.planner.forecasts(self.needs, [hop.planned for hop in self.hops])

    def open(self, prompt: int = 0) -> None:
        """Plans a route and reserves memory on it; called by the first step at the latest.

        Args:
            prompt: positions of the first step; with them the route is chosen for the time to the first token, too.

        Raises:
            CoverageError: blocks are served by nobody; if they once were, nor after `recovery_timeout_s`.
            PeerBusy: no peer of some blocks has memory for the budget.
            NotAuthorized: the peers do not accept this client's key, or are not those that it trusts.
            PeerLost: peers do not answer, nor does anybody take their place in time.
            SessionClosed: another thread has closed the session.
        """
        for hop in self.hops:
            if not self._swarm.trusts(hop.endpoint.key):
                error = NotAuthorized(f"the peer at {hop.endpoint.address} is not one that you trust any more")
                self.link_failed(hop.endpoint, error)
        if self.state.is_open and self.state.is_settled:
            return
        self._prompt = 0 if self.state.hops else prompt
        self.feed(Use())
        self._wait(lambda: self.state.is_settled)
        self._raise_if_broken()

    def close(self) -> None:
        """Frees the memory on all hops; from any thread. A thread that uses the session gets `SessionClosed`."""
        self._swarm.links.unregister(self)
        self.feed(Close())

    def close_later(self) -> None:
        """Has another thread do so within a second; the only way for finalizers, see `Links.close_later`."""
        self._swarm.links.close_later(self)

    def deliver(self, source: Endpoint, message: Message) -> None:
        """Takes a message from the transport's thread."""
        self.traffic.bytes_received += len(getattr(message, "payload", b""))
        self.feed(Received(source, message))

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """Takes from the transport's thread that a link of the client is lost or refused."""
        self.feed(LinkFailed(endpoint, error))

    def feed(self, event: Event) -> None:
        """Has the machine handle an event, and does what follows from it; from any thread."""
        self._events.append(event)
        with self._handling:
            if self._is_handling:
                return  # what is done about an event has caused another: it comes next
            self._is_handling = True
            try:
                while self._events:
                    for effect in self.state.handle(self._events.popleft(), time.monotonic()):
                        self._perform(effect)
            finally:
                self._is_handling = False
        if self._has_work():
            self._changed.put(None)

    def _has_work(self) -> bool:
        state, until = self.state, self._until
        return until is not None and bool(
            self._asked
            or state.phase is Phase.CLOSED
            or state.wake_at < self._wakes_at
            or self._wants_forecast()
            or until()
        )

    def _wants_forecast(self) -> bool:
        return self.state.phase is Phase.REPLAYING and not self.state.chunk_ms

    def _perform(self, effect: Effect) -> None:
        swarm = self._swarm
        match effect:
            case Send(endpoint, message):
                if isinstance(message, Open) and (state := swarm.links.state(endpoint)).is_final:
                    self._events.append(LinkFailed(endpoint, refusal(endpoint, state)))
                else:
                    self.traffic.bytes_sent += swarm.links.send(endpoint, message)
            case AskAlive(endpoint):
                links, before = swarm.links, self._unanswered.get(endpoint)
                now = time.perf_counter()
                first_at = before.first_at if before is not None and now - before.at < QUEUED_S else now
                self._unanswered[endpoint] = _Asked(first_at, now, links.traffic(endpoint), links.queues())
                swarm.ping(endpoint, self.id).add_done_callback(lambda pong: self._alive(endpoint, pong))
            case AskRoute():
                self._asked.append(effect)
            case Ban(name, leaves):
                swarm.ban(name, BAN_S, leaves=leaves)
            case Unban(name):
                swarm.unban(name)
            case Note(kind, text, peer):
                log.log(
                    logging.WARNING if kind in ("lost", "failed", "weights") else logging.INFO,
                    "%s",
                    text,
                    extra={"session": self.id.hex()} | ({"peer": peer} if peer else {}),
                )
                swarm.events.note(kind, text)

    def _alive(self, endpoint: Endpoint, pong: Future[Answer]) -> None:
        answer = pong.result()
        self._unanswered.pop(endpoint, None)
        self.feed(Alive(endpoint, answer.queue_ms, answer.holds, answer.waiting, answer.done, answer.last))

    def _wait(self, until: Callable[[], bool]) -> None:
        """Waits for something, and does meanwhile what takes time.

        Raises:
            SessionClosed: another thread has closed the session.
        """
        # set before the first look: what happens after a look wakes this thread
        self._until = until
        try:
            self._wait_awake(until)
        finally:
            self._until = None
        self._refuse_if_closed()

    def _wait_awake(self, until: Callable[[], bool]) -> None:
        while True:
            self._wakes_at = math.inf
            if until():
                return
            self._refuse_if_closed()
            if self._asked:
                self.feed(self._routes.answer(self._asked.popleft(), self._needs(self._prompt)))
                continue
            if self._wants_forecast():
                self.state.chunk_ms = self.forecasts()(REPLAY_POSITIONS).latency_ms
            self._wakes_at = self.state.wake_at
            try:
                self._changed.get(timeout=max(0.0, min(self._wakes_at - time.monotonic(), threading.TIMEOUT_MAX)))
            except queue.Empty:
                for endpoint in self._late():
                    self.feed(Alive(endpoint, 0.0, late=True))
                self.feed(Tick())

    def _late(self) -> list[Endpoint]:
        """Of the hops that were asked and have not answered those that something else holds up.

        That is what their own links carry. Or, for a while, what goes to others: the way up of a home is one queue, in
        which a ping may stand behind a prompt; but then nobody answers quickly.
        """
        links, now = self._swarm.links, time.perf_counter()
        late: list[Endpoint] = []
        for endpoint, asked in list(self._unanswered.items()):
            if asked.passed is None or now - asked.at >= 2 * self._answer_s(endpoint):
                continue
            passed = links.traffic(endpoint)
            if passed is None:
                continue
            # A tunnel confirms at once what goes into it.
            carries = passed.has_received(asked.passed) or (not endpoint.hidden and passed.has_sent(asked.passed))
            if carries or self._stands_behind_others(endpoint, asked, passed):
                late.append(endpoint)
        return late

    def _answer_s(self, endpoint: Endpoint) -> float:
        links = self._swarm.links
        trips = ANSWER_TRIPS if links.state(endpoint) is LinkState.UP else FIRST_TRIPS
        return links.prober.patience_s(endpoint, ANSWER_S, trips)

    def _stands_behind_others(self, endpoint: Endpoint, asked: _Asked, passed: tcp.Traffic) -> bool:
        links, now = self._swarm.links, time.perf_counter()
        # The first time it may have arrived just now, or have been dropped by a full queue and sent again.
        if asked.at > asked.first_at:
            quick = links.prober.quick_at >= asked.at - ROUND_S
            if quick or not passed.unsent or now - asked.first_at >= QUEUED_S:
                return False
        others = [(before, links.traffic(other)) for other, before in asked.queues.items() if other != endpoint]
        return any(passed is not None and passed.has_sent(before) for before, passed in others)

    def _wait_for(self, requests: Sequence[Request]) -> None:
        """Waits until all have what they asked for; raises the error of the first that has not."""
        try:
            for request in requests:
                self._wait(lambda request=request: request.done or request.error is not None)
                if request.error is not None:
                    raise request.error
        except BaseException:
            self.feed(Abandon(tuple(request.number for request in requests)))
            raise

    def _refuse_if_closed(self) -> None:
        if self.state.phase is Phase.CLOSED:
            raise SessionClosed("the session was closed while it was used: begin with a new one")

    def _raise_if_broken(self) -> None:
        if not self.state.is_open and self.state.error is not None:
            raise self.state.error

    def _needs(self, prompt: int) -> Needs:
        one_step = self._in_flight == 1
        return Needs(
            self.state.budget,
            self._codecs.encodings,
            self.state.blocks,
            1 if one_step else USUAL_POSITIONS,
            self._in_flight,
            self._energy_slowdown,
            prompt if one_step else 0,
            self.state.held,
        )
