"""The link of a session to its next hop, and the answer to an `Open` when the outcome is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from peers.peer_links import NextHops, Outbox
from peers.sessions import HopSession
from splitnet.limits import keep_latest
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import Opened

if TYPE_CHECKING:
    pass

REMEMBERED_HOPS = 4096  # maximum number of remembered endpoints whose keys were proven
FAR_TIMES = 3.0  # a time limit may grow to this many times the usual limit: the client waits for the answer to `Open`


class _PendingOpen(NamedTuple):
    """An `Open` that waits for its next hop."""

    deadline: float
    new_link: bool  # the session has never used the link
    wants_pong: bool  # the link may lose messages although its state is up: only a pong proves that it works


class HopConnector:
    """Connects sessions to their next hops, and answers each `Open` when the outcome is known. A part of the service:
    callers hold its lock.

    reach_s: seconds in which a next hop must accept the link; else the client relays. held: see `Rows.held_positions`.
    """

    def __init__(
        self, outbox: Outbox, links: NextHops, reach_s: float, held: Callable[[HopSession], tuple[int, bool, bool]]
    ) -> None:
        self._outbox = outbox
        self._links = links
        self._reach_s = reach_s
        self._held = held
        self._pending: dict[HopSession, _PendingOpen] = {}
        self._proven: dict[Endpoint, None] = {}  # next hops that have proven their keys, the latest last

    def connect_next(self, session: HopSession, following: Endpoint | None, now: float, *, again: bool) -> None:
        """Connects a session to its next hop, and answers its `Open`, at once or later.

        again: a newer epoch of an open session.
        """
        pending = self._pending.pop(session, None)
        if following != session.next:
            pending = None
        new_link = following != session.next or (pending is not None and pending.new_link)
        if not self._set_next(session, following):
            self._send_opened(session, next_reachable=False)
            return
        state = LinkState.UP if following is None else self._outbox.link_state(following)
        # A route is opened again after a fault, and TCP detects a cut link late.
        wants_pong = again and not new_link and following is not None and state is LinkState.UP
        if wants_pong and following is not None:
            self._outbox.probe(following)
        proven = following in self._proven
        # A lost link comes back soon if the next hop only restarted; a new link gets the full time.
        limit_s = self._reach_s / 3 if (proven and state is LinkState.DOWN) or wants_pong else self._reach_s
        if following is not None:  # for an unproven next hop this peer's own network delay counts
            far_s = self._outbox.answer_limit_s(following, connects=not wants_pong)
            limit_s = max(limit_s, min(far_s, FAR_TIMES * self._reach_s))
        deadline = now + limit_s if pending is None else min(pending.deadline, now + limit_s)
        self._pending[session] = _PendingOpen(deadline, new_link, wants_pong)
        if _is_known(state, proven) and state is not LinkState.DOWN and not wants_pong:
            self._answer_open(session, reachable=state is LinkState.UP)

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state is LinkState.UP:
            keep_latest(self._proven, endpoint, None, REMEMBERED_HOPS)
        if _is_known(state, endpoint in self._proven):
            for session in [session for session in self._pending if session.next == endpoint]:
                self._answer_open(session, reachable=state is LinkState.UP)

    def opening_answered(self, endpoint: Endpoint) -> None:
        for session in [session for session, pending in self._pending.items() if pending.wants_pong]:
            if session.next == endpoint:
                self._answer_open(session, reachable=True)

    def tick(self, now: float) -> None:
        for session in [session for session, pending in self._pending.items() if now >= pending.deadline]:
            self._answer_open(session, reachable=False)
        self._links.tick(now)

    def end_opening(self, session: HopSession) -> None:
        self._pending.pop(session, None)
        self._set_next(session, None)

    def looked_up(self, session: HopSession) -> None:
        """The look-up of stored pages has ended."""
        route = session.route_state
        route.lookup_until = None
        if route.next_reachable is not None:
            self._send_opened(session, next_reachable=route.next_reachable)

    def _set_next(self, session: HopSession, following: Endpoint | None) -> bool:
        """Makes an endpoint, or none, the next hop of a session; False: this peer has too many links."""
        if following == session.next:
            return True
        before, session.next = session.next, None
        if following is not None and self._links.acquire(following):
            session.next = following
        if before is not None:
            self._links.release(before)
        return session.next == following

    def _answer_open(self, session: HopSession, *, reachable: bool) -> None:
        pending = self._pending.pop(session)
        if not reachable and pending.new_link:
            # The client relays, so the transport must stop trying to connect to this address.
            self._set_next(session, None)
        self._send_opened(session, next_reachable=reachable)

    def _send_opened(self, session: HopSession, *, next_reachable: bool) -> None:
        route = session.route_state
        route.next_reachable = next_reachable
        if route.lookup_until is None:
            cached, found, leaves_pages = self._held(session)
            facts = cached, route.weights, route.taps is not None, found, leaves_pages
            self._outbox.send(session.reply_to, Opened(session.id, session.epoch, next_reachable, *facts))


def _is_known(state: LinkState, proven: bool) -> bool:
    """Whether the state of a link says something about the next hop itself, not about another machine at its
    address."""
    return state in (LinkState.UP, LinkState.REFUSED) or (proven and state is not LinkState.CONNECTING)
