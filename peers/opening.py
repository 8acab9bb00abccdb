"""Links from sessions to their next hops: an `Open` is answered when it is known whether the next hop is reached.

Clients name the addresses, and an answer must not tell them what listens where this peer reaches and they do not. So a
link that fails is told at once only if the next hop itself refuses, or has shown its key to this peer before; otherwise
when the time is up, whether nothing listens there, or something silent, or something else.
"""

from __future__ import annotations

from dataclasses import dataclass

from peers.next_hops import NextHops
from peers.outbox import Outbox
from peers.session import Session
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.messages import Opened

REMEMBERED_HOPS = 4096
FAR_TIMES = 3.0
"""Where round trips are long a next hop gets so many times as long at most: clients wait for what answers `Open`."""


@dataclass(frozen=True, slots=True)
class _PendingOpen:
    """An `Open` that waits until its next hop answers or the time is up."""

    deadline: float
    new_link: bool
    """The session has never pushed over this link."""
    wants_pong: bool
    """Messages over this link may have got lost, so that it is up counts for nothing: the next hop has to answer."""


class NextHopOpening:
    """Connects sessions to their next hops. A part of the service: it is called under the service's lock.

    Args:
        outbox: where messages go.
        links: to next hops.
        reach_s: how long a next hop may take to accept the link before the client is told to carry.
    """

    def __init__(self, outbox: Outbox, links: NextHops, reach_s: float) -> None:
        self._outbox = outbox
        self._links = links
        self._reach_s = reach_s
        self._pending: dict[Session, _PendingOpen] = {}
        self._proven: dict[Endpoint, None] = {}
        """Next hops that have shown their keys, the latest last."""

    def reach(self, session: Session, following: Endpoint | None, now: float, *, again: bool) -> None:
        """Connects a session to its next hop; the answer to its `Open` goes out when it is known whether that works.

        again: a newer epoch of a session that was open.
        """
        pending = self._pending.pop(session, None)
        if following != session.next:
            pending = None
        new_link = following != session.next or (pending is not None and pending.new_link)
        if not self._set_next(session, following):
            self._say_opened(session, next_reachable=False)
            return
        state = LinkState.UP if following is None else self._outbox.state(following)
        # A route is opened again after trouble, and TCP finds out late that a link is cut.
        wants_pong = again and not new_link and following is not None and state is LinkState.UP
        if wants_pong and following is not None:
            self._outbox.probe(following)
        proven = following in self._proven
        # A link that was lost may come back, if the next hop only restarted; a new one gets the full time.
        patience_s = self._reach_s / 3 if (proven and state is LinkState.DOWN) or wants_pong else self._reach_s
        if following is not None:  # of one that has not shown its key only this peer's own way is known
            far_s = self._outbox.patience_s(following, connects=not wants_pong)
            patience_s = max(patience_s, min(far_s, FAR_TIMES * self._reach_s))
        deadline = now + patience_s if pending is None else min(pending.deadline, now + patience_s)
        self._pending[session] = _PendingOpen(deadline, new_link, wants_pong)
        if _is_known(state, proven) and state is not LinkState.DOWN and not wants_pong:
            self._answer(session, reachable=state is LinkState.UP)

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        """A link to a next hop came up, was refused or was lost."""
        if state is LinkState.UP:
            self._proven.pop(endpoint, None)
            self._proven[endpoint] = None
            if len(self._proven) > REMEMBERED_HOPS:
                del self._proven[next(iter(self._proven))]
        if _is_known(state, endpoint in self._proven):
            for session in [session for session in self._pending if session.next == endpoint]:
                self._answer(session, reachable=state is LinkState.UP)

    def answered(self, endpoint: Endpoint) -> None:
        """Another peer has answered a ping, so it is reached."""
        for session in [session for session, pending in self._pending.items() if pending.wants_pong]:
            if session.next == endpoint:
                self._answer(session, reachable=True)

    def tick(self, now: float) -> None:
        """Gives up on next hops whose time is over, and closes links that nobody uses."""
        for session in [session for session, pending in self._pending.items() if now >= pending.deadline]:
            self._answer(session, reachable=False)
        self._links.tick(now)

    def end(self, session: Session) -> None:
        """Lets go of the link of a session that has ended."""
        self._pending.pop(session, None)
        self._set_next(session, None)

    def _set_next(self, session: Session, following: Endpoint | None) -> bool:
        """Makes a session push to another hop, or to none; False if this peer has too many links already."""
        if following == session.next:
            return True
        before, session.next = session.next, None
        if following is not None and self._links.acquire(following):
            session.next = following
        if before is not None:
            self._links.release(before)
        return session.next == following

    def _answer(self, session: Session, *, reachable: bool) -> None:
        pending = self._pending.pop(session)
        if not reachable and pending.new_link:
            # The client will carry. Nothing goes on trying to connect to an address that never answered.
            self._set_next(session, None)
        self._say_opened(session, next_reachable=reachable)

    def _say_opened(self, session: Session, *, next_reachable: bool) -> None:
        cached = sum(row.length for row in list(session.rows.values()))
        self._outbox.send(session.reply_to, Opened(session.id, session.epoch, next_reachable, cached, session.weights))


def _is_known(state: LinkState, proven: bool) -> bool:
    """Whether the state of a link may be told: it is the next hop itself that refuses, not whatever is in its place."""
    return state in (LinkState.UP, LinkState.REFUSED) or (proven and state is not LinkState.CONNECTING)
