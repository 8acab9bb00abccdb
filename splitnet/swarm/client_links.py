"""A client's links to peers: they send the messages of sessions, and deliver messages of peers to sessions."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from splitnet.errors import NotAuthorized, PeerLost, ProtocolError, ProtocolVersionError, SplitnetError, WrongKey
from splitnet.logs import RateLimitedWarnings
from splitnet.nat.tunnel import Tunnels
from splitnet.security.identity import Identity
from splitnet.transport.flow import LinkTraffic
from splitnet.transport.pool import KEEP_S, LinkPool
from splitnet.transport.prober import PROBE_BYTES, Prober
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Destination, Endpoint, LinkState
from splitnet.wire.messages import (
    Announced,
    Close,
    CompressionState,
    Failure,
    Found,
    Message,
    Open,
    Payload,
    Pong,
    WeightsPart,
    decode,
    encode,
)

log = logging.getLogger(__name__)

MAX_LINKS = 160  # largest number of links; each takes four file descriptors, and a process often has 1,024
KEEP_UNREACHED_S = 15.0  # how long after its last use a lost or unconnected link is tried again
QUEUES_S = 0.05  # validity of the queues of links, because many sessions ask at the same time
BUSY_BYTES = 2 * PROBE_BYTES  # unsent bytes of a busy link: more than a measurement of the link sends


class Subscriber(Protocol):
    """Receives the messages and errors of a session, in the transport's thread."""

    id: bytes

    def deliver(self, source: Endpoint, message: Message) -> None: ...

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None: ...

    def close(self) -> None: ...


class Links:
    """The links of a client. Thread-safe. Must be closed.

    A session uses a link from its `Open` until its `Close`, or until the session is unregistered; other links are
    closed a minute after their last message.

    most: largest number of links. keep_unused_s: how long a link without a session is kept after its last message, see
    `LinkPool`. on_answer: handles answers that belong to no session, see `splitnet.directory.ask`.
    """

    def __init__(self, identity: Identity, *, most: int = MAX_LINKS, keep_unused_s: float = KEEP_S) -> None:
        self._sessions: dict[bytes, Subscriber] = {}
        self._used: dict[bytes, set[Endpoint]] = {}  # by registered session
        self._lock = threading.Lock()
        self._ended: queue.SimpleQueue[Subscriber] = queue.SimpleQueue()
        self._most = most
        self._complaints = RateLimitedWarnings(log)
        self.on_answer: Callable[[Endpoint, Message], None] | None = None
        self._queues: tuple[float, dict[Endpoint, LinkTraffic]] = -math.inf, {}
        self.tunnels = Tunnels(identity)
        self._transport = Transport(
            identity,
            on_message=self._receive_message,
            on_link=self._link_changed,
            on_dropped=self._dropped,
            on_tick=self._tick_links,
            max_backlog=None,
            tunnels=self.tunnels,
        )
        self.pool = LinkPool(self._transport, most=most, keep_unreached_s=KEEP_UNREACHED_S, keep_unused_s=keep_unused_s)
        self.prober = Prober(self.send, self._transport.is_taken)
        self._transport.start()

    def __len__(self) -> int:
        return len(self.pool)

    @property
    def has_sessions(self) -> bool:
        """Whether a session is registered."""
        return bool(self._sessions)

    def close(self) -> None:
        """Closes all sessions and links."""
        self.close_sessions()
        self._transport.close()

    def close_sessions(self) -> None:
        for session in list(self._sessions.values()):
            session.close()

    def register(self, session: Subscriber) -> None:
        """Delivers the messages of a session from now on."""
        with self._lock:
            self._sessions[session.id] = session
            self._used[session.id] = set()

    def unregister(self, session: Subscriber) -> None:
        """Stops delivering messages to a session, and releases its links."""
        with self._lock:
            self._sessions.pop(session.id, None)
            used = self._used.pop(session.id, set())
        for endpoint in used:
            self.pool.release(endpoint)

    def close_later(self, session: Subscriber) -> None:
        """Closes a session within a second, in another thread. The garbage collector may call this at any moment."""
        # SimpleQueue.put is reentrant; all other calls may wait for a lock that the same thread holds.
        self._ended.put(session)
        self._transport.tick_soon()

    def send(self, endpoint: Endpoint, message: Message) -> int:
        """Sends a message and returns its size in bytes; 0: there are too many links.

        In this case `Subscriber.link_failed` of the message's session is called.
        """
        if not self._keep_open(endpoint, message):
            many = f"this client has {self._most} links in use: close sessions, or share the work among processes"
            self._tell_session(getattr(message, "session", b""), endpoint, PeerLost(f"no link to a peer: {many}"))
            return 0
        frames = encode(message)
        self._transport.send(endpoint, frames)
        return sum(map(len, frames))

    def link_state(self, endpoint: Endpoint) -> LinkState:
        """State of the link to a peer; for a minute after the end of a failed link, the kind of its failure."""
        return self.pool.link_state(endpoint)

    def is_connecting(self, endpoint: Endpoint) -> bool:
        """Whether the connection was accepted and the handshake is under way."""
        return self.link_state(endpoint) is LinkState.CONNECTING and self._transport.is_taken(endpoint)

    def traffic(self, endpoint: Endpoint) -> LinkTraffic | None:
        """The traffic of a link since its start; None: the link is not up, or the system does not report traffic."""
        return self._transport.traffic(endpoint)

    def queues(self) -> dict[Endpoint, LinkTraffic]:
        """The links with unconfirmed bytes, at most `QUEUES_S` old; empty if the system does not report them."""
        now = time.monotonic()
        if now - self._queues[0] > QUEUES_S:
            self._queues = now, self._transport.queues()
        return self._queues[1]

    def is_busy(self, endpoint: Endpoint) -> bool:
        """Whether a ping to a peer may wait after other bytes on its link, or on other links of the same uplink."""
        passed = self.traffic(endpoint)
        if passed is None or not passed.unsent:
            return False
        return passed.unsent > BUSY_BYTES or bool(self.queues().keys() - {endpoint})

    def _keep_open(self, endpoint: Endpoint, message: Message) -> bool:
        """Keeps the link of a message open; False: there are too many other links."""
        used = self._used.get(getattr(message, "session", b""), set())
        if isinstance(message, Open | Close):
            with self._lock:
                if isinstance(message, Close) and endpoint in used:
                    used.remove(endpoint)
                    self.pool.release(endpoint)
                elif isinstance(message, Open) and message.session in self._used and endpoint not in used:
                    if not self.pool.acquire(endpoint):
                        return False
                    used.add(endpoint)
        return endpoint in used or self.pool.touch(endpoint)

    def _tick_links(self) -> None:
        while True:
            try:
                session = self._ended.get_nowait()
            except queue.Empty:
                break
            try:
                session.close()
            except Exception:
                log.exception("a session could not be closed")
        self.pool.tick(time.monotonic())

    def _receive_message(self, source: Destination, frames: Sequence[Payload]) -> None:
        if not isinstance(source, Endpoint):
            return
        try:
            message = decode(frames)
        except ProtocolError as error:
            self._complaints.say("%s sent an invalid message: %s", source.address, error)
            if isinstance(error, ProtocolVersionError):
                self._tell_all(source, error)
            return
        if isinstance(message, Pong):
            self.prober.pong(source, message)
        elif isinstance(message, Found | Announced | WeightsPart | CompressionState) or (
            isinstance(message, Failure) and not message.session and message.number
        ):
            if self.on_answer is not None:
                self.on_answer(source, message)
        elif isinstance(message, Failure) and not message.session:
            self._complaints.say("%s answered: %s", source.address, message.text)
        else:
            session = self._sessions.get(getattr(message, "session", b""))
            if session is not None:
                session.deliver(source, message)

    def _link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state is LinkState.UP:
            self.pool.restart_idle_time(endpoint)
        elif state.is_final:
            self._tell_all(endpoint, refusal(endpoint, state))
        elif state is LinkState.DOWN:
            self._tell_all(endpoint, PeerLost(f"the peer at {endpoint.address} is gone"))

    def _dropped(self, destination: Destination, frames: Sequence[Payload], reason: str) -> None:
        if isinstance(destination, Endpoint):
            session = getattr(decode(frames), "session", b"")
            self._tell_session(session, destination, PeerLost(f"a message to {destination.address} is lost: {reason}"))

    def _tell_all(self, endpoint: Endpoint, error: SplitnetError) -> None:
        for session in list(self._sessions.values()):
            session.link_failed(endpoint, error)

    def _tell_session(self, session_id: bytes, endpoint: Endpoint, error: SplitnetError) -> None:
        session = self._sessions.get(session_id)
        if session is not None:
            session.link_failed(endpoint, error)


def refusal(endpoint: Endpoint, state: LinkState) -> NotAuthorized:
    """The error of a link with a wrong or refused key."""
    if state is LinkState.WRONG_KEY:
        return WrongKey(
            f"the process at {endpoint.address} ends the handshake as if it had another key than the record of the "
            "peer there: if the peer was started anew, wait a minute until its record has expired; otherwise find out "
            "which process listens there"
        )
    return NotAuthorized(
        f"the peer at {endpoint.address} does not accept this client's key: ask its owner to add the output of "
        "`splitnet key` to the peer's --authorized-keys file"
    )
