"""A client's session: it runs the machine of real sessions in simulated time."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from scheduler.facts import CLIENT
from scheduler.replan import Forecasts, RouteWatch
from simulator.clients import Client
from simulator.events import Events
from simulator.identities import MODEL, Identities, device_at
from simulator.node import Node, Parcel
from simulator.policies import SeenHop
from simulator.route import Hops, Route
from simulator.world import Request, World
from splitnet.session.events import (
    AskAlive,
    AskRoute,
    Ban,
    Cause,
    Close,
    Effect,
    Event,
    Note,
    Planned,
    Received,
    Send,
    Submit,
    Tick,
    Unban,
    Use,
)
from splitnet.session.machine import SessionState
from splitnet.session.requests import StepRequest
from splitnet.session.route_setup import Phase
from splitnet.swarm.peers import BAN_S, Bans
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.log import REPLAY_POSITIONS
from splitnet.wire.messages import Close as CloseMessage
from splitnet.wire.messages import Failure, FailureCode, Open, Part, Replay, Result, Step

if TYPE_CHECKING:
    from simulator.calls import Calls
    from simulator.planning import Planning
    from simulator.traffic import Traffic

RUNNING: Final = "running"
FINISHED: Final = "finished"
FAILED: Final = "failed"

RETRY_MS: Final = 2000.0
"""After so long a client whose session was given up tries again."""

_POSITION: Final = bytes(4)
"""An activation of one value: what it stands for takes time in `Wire`, and no memory here."""


@dataclass(slots=True)
class Surroundings:
    """What sessions act on. running: how many of them. tokens_in_time: that they got while clients still came."""

    world: World
    events: Events
    identities: Identities
    nodes: dict[str, Node]
    planning: Planning
    traffic: Traffic
    calls: Calls
    running: int = 0
    tokens_in_time: int = 0


class Session:
    """One request and its way through the swarm. All times in ms.

    Attributes:
        machine: its life.
        route: the hops of the present epoch; None: there are none. hops: the same; after the end the last ones.
        first_ms, last_ms: when the client had its first and its latest token.
        predicted_ms: of a token, by the plan of the whole route; 0: hops were replaced since.
        seen, latencies: what it met at its hops, and between them.
        doubt: by what factor routes were slower than predicted.
        contacts: since when the client is connected to peers.
    """

    def __init__(self, request: Request, client: Client, around: Surroundings) -> None:
        settings = around.world.settings
        self.request = request
        self.client = client
        self.arrived_ms = around.events.now
        self.state = RUNNING
        self.tokens = 0
        self.first_ms = 0.0
        self.last_ms = 0.0
        self.ended_ms = 0.0
        self.predicted_ms = 0.0
        self._lost = False
        """The route that was planned last is not better than the former, but takes its place."""
        self.forecasts = Forecasts()
        self.hops: Hops = []
        self.route: Route | None = None
        self.seen: dict[Node, SeenHop] = {}
        self.latencies: dict[tuple[str, str], float] = {}
        self.contacts: dict[Node, float] = {}
        self.bans = Bans(lambda: around.events.now / 1000)
        self.machine = SessionState(
            request.number.to_bytes(16, "big"),
            model=MODEL,
            blocks=(0, settings.num_blocks),
            hidden_size=1,
            budget=request.positions,
            recovery_timeout_s=settings.patience_s,
        )
        self._around = around
        self.watch = RouteWatch()
        self._pending: deque[Event] = deque()
        self._handling = False
        self._wakes_ms = math.inf
        self._requests: tuple[StepRequest, ...] = ()
        self._sent_ms = 0.0
        self._sent_repairs = 0
        self._looked_ms = 0.0
        self._retries = False

    @property
    def context(self) -> int:
        """Positions that its hops hold between two tokens."""
        return self.request.prompt + max(0, self.tokens - 1)

    @property
    def moves(self) -> int:
        """To a better route."""
        return sum(each.cause is Cause.BETTER_ROUTE for each in self.machine.recoveries)

    @property
    def repairs(self) -> int:
        """Of a route that had lost a hop, or what was under way on it."""
        return len(self.machine.recoveries) - self.moves

    def endpoint(self, node: Node) -> Endpoint:
        return self._around.identities.endpoint(node.id)

    def failure(self, node: Node, epoch: int, number: int, code: FailureCode) -> Received:
        """That a peer refuses something; number 0: the session itself."""
        message = Failure(self.machine.session, epoch, number, code, code.name.lower().replace("_", " "))
        return Received(self.endpoint(node), message)

    def met(self, node: Node, block_ms: float, wait_ms: float) -> None:
        """Takes in what a token met at a hop."""
        seen = self.seen.get(node)
        if seen is None:
            seen = self.seen[node] = SeenHop()
        seen.block_ms.add(block_ms)
        seen.wait_ms.add(wait_ms)

    def answered(self, parcel: Parcel) -> None:
        """The client is told that a request, or a replay, is done."""
        if parcel.route is self.route:
            node, _, end = parcel.route.hops[parcel.last_hop]
            payload = _POSITION * parcel.keep
            result = Result(self.machine.session, parcel.route.epoch, parcel.number, end, 0, (), payload)
            self.feed(Received(self.endpoint(node), result))

    def begin(self) -> None:
        """The client wants its answer."""
        self._around.running += 1
        self.feed(Use())

    def feed(self, event: Event) -> None:
        """Has the machine handle an event, and does what follows from it."""
        self._pending.append(event)
        if self._handling:
            return
        self._handling = True
        while self._pending:
            for effect in self.machine.handle(self._pending.popleft(), self._around.events.now / 1000):
                self._perform(effect)
            if not self._pending and self.state == RUNNING:
                self._go_on()
        if self.machine.phase is Phase.REPLAYING and not self.machine.chunk_ms:
            self.machine.chunk_ms = self._around.planning.step_ms(self, REPLAY_POSITIONS)
        self._handling = False
        self._arm()

    def end(self, state: str) -> None:
        """Ends it, and gives back what it has reserved."""
        self.state = state
        self._around.running -= 1
        self.ended_ms = self._around.events.now
        self.route = None
        self.feed(Close())

    # Time.

    def _arm(self) -> None:
        wakes_ms = self._due_ms()
        if wakes_ms < self._wakes_ms:
            self._wakes_ms = wakes_ms
            self._around.events.at(wakes_ms, self._wake, wakes_ms)

    def _due_ms(self) -> float:
        """When the machine wants a tick; a hair later, so that the time in seconds is not before it."""
        return self.machine.wake_at * 1000 + 1e-6

    def _wake(self, planned_ms: float) -> None:
        if planned_ms == self._wakes_ms:
            self._wakes_ms = math.inf
        if self._around.events.now >= self._due_ms():
            self.feed(Tick())
        else:
            self._arm()

    # Effects.

    def _perform(self, effect: Effect) -> None:
        around = self._around
        match effect:
            case Send(endpoint, message):
                node = around.nodes[device_at(endpoint)]
                match message:
                    case Step():
                        self._send(message)
                    case Open():
                        self._follow_route(message.epoch)
                        around.calls.send(self, node, message)
                    case CloseMessage() | Replay():
                        around.calls.send(self, node, message)
                    case _:
                        raise AssertionError(f"no simulated session sends {message}")
            case AskAlive(endpoint):
                around.calls.send(self, around.nodes[device_at(endpoint)], effect)
            case AskRoute():
                answer, planned = around.planning.answer(self, effect)
                self._lost = True
                if isinstance(answer, Planned):
                    self.predicted_ms = 0.0 if effect.kept else planned.token_ms
                self._later(planned.asked_ms, answer)
            case Ban(name):
                self.bans.add(name, BAN_S)
            case Unban(name):
                self.bans.lift(name)
            case Note():
                pass

    def _later(self, ms: float, event: Event) -> None:
        if ms:
            self._around.events.at(self._around.events.now + ms, self.feed, event)
        else:
            self.feed(event)

    def _follow_route(self, epoch: int) -> None:
        """Takes over the route that the machine opens."""
        if self.route is not None and self.route.epoch == epoch:
            return
        around = self._around
        planned = [hop.planned for hop in self.machine.hops]
        self.hops = [(around.nodes[device_at(hop.endpoint)], hop.start, hop.end) for hop in planned]
        self.route = Route(self, epoch, self.hops, around.traffic.wires(self.hops, self.client.number))
        own = (CLIENT, self.client.number)
        stations = [own, *((node.id, node.number) for node, _, _ in self.hops), own]
        for (sender, here), (receiver, there) in pairwise(stations):
            self.latencies[sender, receiver] = around.world.geography.one_way_ms(here, there)
        self.watch.begin(self.predicted_ms or around.planning.step_ms(self, 1), lost=self._lost)

    def _send(self, step: Step) -> None:
        route, (part,) = self.route, step.parts
        assert route is not None
        replay = step.replay_until > 0
        last = len(route.hops) - 1
        if replay:
            last = next(index for index, (_, _, end) in enumerate(route.hops) if end == step.replay_until)
        parcel = Parcel(route, step.number, 0, last, part.start, part.length, part.keep, replay=replay)
        self._around.traffic.send(parcel)

    # What the client does.

    def _go_on(self) -> None:
        """Takes what has come, and asks for more."""
        machine = self.machine
        if machine.phase is Phase.BROKEN:
            self._requests = ()
            if machine.error is None:  # a hop was lost while nothing was under way
                self.feed(Use())
            else:
                self._try_later()
        elif machine.is_open:
            if not all(request.done for request in self._requests):
                return
            if self._requests:
                self._got_token()
                if self.state != RUNNING:
                    return
            if not self._moves():
                self._submit()

    def _try_later(self) -> None:
        if self._retries:
            return
        now = self._around.events.now
        if now + RETRY_MS - max(self.arrived_ms, self.last_ms) > self._around.world.settings.patience_s * 1000:
            self.end(FAILED)
        else:
            self._retries = True
            self._around.events.at(now + RETRY_MS, self._try_again, None)

    def _try_again(self, _: None) -> None:
        self._retries = False
        if self.state == RUNNING:
            self.feed(Use())

    def _got_token(self) -> None:
        now = self._around.events.now
        if self.tokens == 0:
            self.first_ms = now
        elif self._sent_repairs == len(self.machine.recoveries):
            ratio = self.watch.step_took(now - self._sent_ms)
            self.machine.usual_ms = self.watch.usual_ms
            if ratio is not None:
                self.forecasts.came(tuple(hop.name for hop in self.machine.hops), ratio)
        self.tokens += 1
        self._around.tokens_in_time += now <= self._around.world.settings.duration_s * 1000
        self.last_ms = now
        self._requests = ()
        if self.tokens >= self.request.output:
            self.end(FINISHED)

    def _moves(self) -> bool:
        """Looks for a better route between two tokens, when it is time to, and goes over to it if that pays."""
        around = self._around
        now = around.events.now
        due = now - self._looked_ms >= around.world.settings.replan_s * 1000
        if not self.tokens or not around.planning.replans or not due:
            return False
        self._looked_ms = now
        found = around.planning.better(self)
        if found is None:
            return False
        move, planned = found
        self.predicted_ms, self._lost = planned.token_ms, False
        self._later(planned.asked_ms, move)
        return True

    def _submit(self) -> None:
        """Sends the prompt, or the latest token."""
        start, end, size, predicted_ms = 0, self.request.prompt, 1, 0.0
        if self.tokens:
            start, end = self.context, self.context + 1
        else:
            size = self._around.planning.step_positions(self, end)
            predicted_ms = self._around.planning.step_ms(self, min(end, size))
        machine = self.machine
        requests: list[StepRequest] = []
        while start < end:
            count = min(end - start, size)
            keep = int(start + count == end)
            part = Part(0, start, count, keep)
            number = machine.next_number()
            step = Step(machine.session, machine.epoch, number, (part,), None, 0, 0, _POSITION * count)
            requests.append(StepRequest(step, keep, predicted_ms))
            start += count
        self._requests = tuple(requests)
        self._sent_ms, self._sent_repairs = self._around.events.now, len(machine.recoveries)
        self.feed(Submit(self._requests))
