"""What clients and peers say to each other beside steps. It takes the latency of the link, and is never lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from splitnet.client.session_events import Alive, AskAlive, Event, LinkFailed, Received
from splitnet.errors import PeerLost
from splitnet.net.messages import Close, FailureCode, Open, Opened, Replay
from splitnet.simulation.events import Events
from splitnet.simulation.node import Held, Node
from splitnet.simulation.session import Session
from splitnet.simulation.traffic import Traffic
from splitnet.simulation.world import World

Call = Open | Close | Replay | AskAlive


class Calls:
    """Carries calls and their answers. Times in ms.

    Attributes:
        under_way: how many have not arrived.
    """

    def __init__(self, world: World, events: Events, traffic: Traffic) -> None:
        self.under_way = 0
        self._geography = world.geography
        self._events = events
        self._traffic = traffic

    def send(self, session: Session, node: Node, call: Call) -> None:
        """Sends a call to a peer; the first connects to it, which takes a round trip more."""
        one_way_ms = self._one_way_ms(session, node)
        trips = 1
        if node not in session.contacts:
            session.contacts.add(node)
            trips = 3
        self._later(trips * one_way_ms, self._arrived, (session, node, call))

    def say_leaving(self, node: Node, held: Iterable[Held]) -> None:
        """A peer tells the clients of these sessions that it goes, or its machine ends the connections."""
        for each in held:
            if node.gone and node.device.crashes:
                endpoint = each.session.endpoint(node)
                error = PeerLost(f"the peer at {endpoint.address} is gone")
                self._answer(each.session, node, LinkFailed(endpoint, error))
            else:
                failure = each.session.failure(node, each.epoch, 0, FailureCode.LEAVING)
                self._answer(each.session, node, failure)

    def _one_way_ms(self, session: Session, node: Node) -> float:
        return self._geography.one_way_ms(session.client.number, node.number)

    def _later(self, ms: float, act: Callable[[Any], None], subject: Any) -> None:
        self.under_way += 1
        self._events.at(self._events.now + ms, self._happens, (act, subject))

    def _happens(self, item: tuple[Callable[[Any], None], Any]) -> None:
        self.under_way -= 1
        act, subject = item
        act(subject)

    def _answer(self, session: Session, node: Node, event: Event) -> None:
        self._later(self._one_way_ms(session, node), session.feed, event)

    def _arrived(self, item: tuple[Session, Node, Call]) -> None:
        session, node, call = item
        if node.gone:
            # A device that crashed is silent. At one that left nobody listens, which a client sees when it connects.
            if isinstance(call, Open) and not node.device.is_silent:
                endpoint = session.endpoint(node)
                error = PeerLost(f"nobody listens at {endpoint.address}: it may have ended")
                self._answer(session, node, LinkFailed(endpoint, error))
            return
        match call:
            case Open():
                self._opens(session, node, call)
            case Close():
                node.release(session)
            case Replay():
                self._replays(session, node, call)
            case AskAlive():
                held = node.sessions.get(session)
                progress = (held.waiting, held.done, held.last) if held else (0, 0, 0)
                alive = Alive(session.endpoint(node), float(node.running), held is not None, *progress)
                self._answer(session, node, alive)

    def _opens(self, session: Session, node: Node, call: Open) -> None:
        refusal = node.open(session, call.epoch, (call.start, call.end), call.budget)
        if refusal is not None:
            self._answer(session, node, session.failure(node, call.epoch, 0, refusal))
            return
        opened = Opened(call.session, call.epoch, True, node.sessions[session].cached)
        self._answer(session, node, Received(session.endpoint(node), opened))

    def _replays(self, session: Session, node: Node, call: Replay) -> None:
        held, route = node.sessions.get(session), session.route
        if held is None:
            failure = session.failure(node, call.epoch, call.number, FailureCode.UNKNOWN_SESSION)
            self._answer(session, node, failure)
        elif route is not None and held.epoch == route.epoch == call.epoch:
            first = 1 + next(index for index, hop in enumerate(route.hops) if hop[0] is node)
            last = next(index for index, hop in enumerate(route.hops) if hop[2] == call.until)
            self._traffic.replay(route, first, last, held.cached, call.number)
