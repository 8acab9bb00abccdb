"""What clients and peers say to each other beside steps. It takes the latency of the link, and is never lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from simulator.clients import CONNECT_TRIPS
from simulator.events import Events
from simulator.node import Held, Node
from simulator.session import RUNNING, Session
from simulator.traffic import Traffic
from simulator.world import World
from splitnet.errors import PeerLost
from splitnet.session.events import Alive, AskAlive, Event, LinkFailed, Received
from splitnet.swarm.peers import LOOK_S
from splitnet.transport.pool import KEEP_S
from splitnet.wire.messages import Close, FailureCode, Open, Opened, Replay

Call = Open | Close | Replay | AskAlive


class Calls:
    """Carries calls and their answers. Times in ms.

    Attributes:
        under_way: how many have not arrived.
    """

    def __init__(self, world: World, events: Events, traffic: Traffic) -> None:
        self.under_way = 0
        self._users: dict[tuple[int, ...], list[Session]] = {}
        """Of connections, by who keeps them: a client, or a peer and the next."""
        self._up_ms: dict[tuple[int, int], float] = {}
        """Since when a peer is connected to the next."""
        self._geography = world.geography
        self._events = events
        self._traffic = traffic

    def send(self, session: Session, node: Node, call: Call) -> None:
        """Sends a call to a peer; the first may have to connect to it.

        A client that was in use lately has measured its links to likely peers, and so is connected to them.
        """
        one_way_ms, now = self._one_way_ms(session, node), self._events.now
        if node not in session.contacts:
            up_ms = now + 2 * CONNECT_TRIPS * one_way_ms
            for user in (*self._others((session.client.number,), session), session):
                looked = now - user.arrived_ms > LOOK_S * 1000
                up_ms = min(up_ms, user.contacts.get(node, now if looked else up_ms))
            session.contacts[node] = up_ms
        waits_ms = max(0.0, session.contacts[node] - now)
        self._later(waits_ms + one_way_ms, self._arrived, (session, node, call))

    def _others(self, key: tuple[int, ...], session: Session) -> list[Session]:
        """Other sessions that use such connections, or did so before they were closed; from now on this one does."""
        now = self._events.now
        others = [
            each
            for each in self._users.get(key, ())
            if each is not session and (each.state == RUNNING or now - each.ended_ms < KEEP_S * 1000)
        ]
        self._users[key] = [*others, session]
        return others

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
                progress = (held.waiting or held.sending, held.done, held.last) if held else (0, 0, 0)
                alive = Alive(session.endpoint(node), float(node.running), held is not None, *progress)
                self._answer(session, node, alive)

    def _opens(self, session: Session, node: Node, call: Open) -> None:
        refusal = node.open(session, call.epoch, (call.start, call.end), call.budget)
        if refusal is not None:
            self._answer(session, node, session.failure(node, call.epoch, 0, refusal))
            return
        opened = Opened(call.session, call.epoch, True, node.sessions[session].cached)
        answer = Received(session.endpoint(node), opened)
        self._later(self._reaches_ms(session, node) + self._one_way_ms(session, node), session.feed, answer)

    def _reaches_ms(self, session: Session, node: Node) -> float:
        """How long a peer takes to reach the hop after it, before it says that it is open."""
        following = next((after for (hop, _, _), (after, _, _) in pairwise(session.hops) if hop is node), None)
        if following is None or self._traffic.through_client:
            return 0.0
        pair, now = (node.number, following.number), self._events.now
        if not self._others(pair, session):
            self._up_ms[pair] = now + 2 * CONNECT_TRIPS * self._geography.one_way_ms(*pair)
        return max(0.0, self._up_ms[pair] - now)

    def _replays(self, session: Session, node: Node, call: Replay) -> None:
        held, route = node.sessions.get(session), session.route
        if held is None:
            failure = session.failure(node, call.epoch, call.number, FailureCode.UNKNOWN_SESSION)
            self._answer(session, node, failure)
        elif route is not None and held.epoch == route.epoch == call.epoch:
            first = 1 + next(index for index, hop in enumerate(route.hops) if hop[0] is node)
            last = next(index for index, hop in enumerate(route.hops) if hop[2] == call.until)
            self._traffic.replay(route, first, last, held.cached, call.number)
