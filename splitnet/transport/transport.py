"""All ZeroMQ sockets of a process, owned by one thread.

A peer listens with one ROUTER socket. Every process has one DEALER socket for each endpoint that it connects to. Every
link is CurveZMQ: both sides prove their keys (ZAP, RFC 27). Messages are handed over as raw frames.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitnet.errors import explain_listen_errors
from splitnet.limits import Budget
from splitnet.logs import RateLimitedWarnings
from splitnet.nat.tunnel import Tunnels
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.transport import flow
from splitnet.transport.connections import (
    MAX_MESSAGE_BYTES,
    MAX_RECEIVED_BYTES,
    Connections,
    Gatekeeper,
    TcpConnection,
    proven_key,
)
from splitnet.transport.flow import LARGE_BYTES, MAX_BACKLOG_BYTES, Backlog, Wake
from splitnet.wire.endpoints import Connection, Destination, Endpoint, LinkState, is_address
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Payload

log = logging.getLogger(__name__)

_TICK_MS = 200  # between two calls of `on_tick`
_CLOSE_LINGER_MS = 500  # how long a closed socket still sends queued messages
_RECEIVE_BURST = 64  # messages received from one socket before other sockets are served
_QUEUED_MESSAGES = 1000  # complete messages that ZeroMQ keeps per connection before it stops reading
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 10_000, 10_000
_HANDSHAKE_MS = 10_000  # ZeroMQ ends a longer handshake
_REFUSES_S = _HANDSHAKE_MS / 2000
"""A peer with another key ends a handshake within this time. A frozen process never ends it."""
_CURVE_BYTES = 64  # more than encryption adds to a frame (RFC 26: 33 bytes)
_HELD_BYTES = 128  # bytes that ZeroMQ allocates for a waiting frame in addition to its content
_SHORT_FRAME, _SHORT_EXTRA, _LONG_EXTRA = 222, 35, 42
"""Longest short frame, and the bytes that encryption and framing add to a short and to a longer frame."""
_TOO_SLOW = "its receiver is too slow"
_NOBLOCK, _MORE, _POLLIN, _EVENTS = (
    int(flag) for flag in (zmq.NOBLOCK, zmq.NOBLOCK | zmq.SNDMORE, zmq.POLLIN, zmq.EVENTS)
)
"""Plain integers, because operations on members of enums take longer than to send a frame."""
_SERVE_THREAD, _CONNECT_THREAD = 1, 2  # two I/O threads of ZeroMQ, so that incoming floods do not delay outgoing links

_ARRIVALS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED
_STATE_OF_EVENT: dict[zmq.Event, LinkState] = {
    zmq.Event.HANDSHAKE_SUCCEEDED: LinkState.UP,
    zmq.Event.DISCONNECTED: LinkState.DOWN,
    zmq.Event.CLOSED: LinkState.DOWN,
    zmq.Event.CONNECT_RETRIED: LinkState.DOWN,
    zmq.Event.HANDSHAKE_FAILED_AUTH: LinkState.REFUSED,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: LinkState.WRONG_KEY,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: LinkState.WRONG_KEY,
}


@dataclass(slots=True)
class _TransportLink:
    endpoint: Endpoint
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    state: LinkState = LinkState.CONNECTING
    tcp: TcpConnection | None = None
    connected_at: float = 0.0


_Item = tuple[Destination, Sequence[Payload] | None]


@dataclass(slots=True)
class _SendQueue:
    """Messages for the transport's thread to send; `Transport._wake` is set once per batch."""

    items: deque[_Item] = field(default_factory=deque[_Item])
    lock: threading.Lock = field(default_factory=threading.Lock)
    awake: bool = False  # the transport's thread was woken, or is sending a batch
    held: int = 0  # number of threads that are inside `Transport.together`


@dataclass(eq=False)
class Transport:
    """Sends and receives frames on CurveZMQ links.

    Handlers run in the transport's own thread and must return quickly. Any thread may call `send`, `connect`,
    `disconnect` and `close`. Finalizers may call `tick_soon`.

    Args:
        on_message: called with the source and the frames of every message.
        on_link: called when the state of an outgoing link changes.
        on_lost: called when a message could not be sent because its incoming connection has ended.
        on_dropped: called with the destination, the frames and the reason when a message was dropped because its
            receiver is too slow or no link to the receiver can be opened.
        on_tick: called about five times per second.
        on_received: called after a batch of received messages was handed over.
        max_backlog: bytes that may wait to be sent, over all receivers; None: no bound, for a process that sends only
            data that it holds anyway.
        authorized: the keys whose connections are accepted; None: all keys.
        listen: `tcp://host:port` to bind (port 0: any free one); None for a process that only connects.
        tunnels: tunnels to unreachable peers, which the transport closes at its end; None: there are none, so
            connecting to an unreachable peer fails.

    Attributes:
        sending, receiving: account for the bytes that ZeroMQ holds, by key (see `Backlog` and `Connections`).
        connections: the TCP connections.

    Raises:
        AddressInUse: another listener has the port of `listen`.
        SplitnetError: `listen` is not an address of this machine.
    """

    identity: Identity
    _: KW_ONLY
    on_message: Callable[[Destination, Sequence[Payload]], None]
    on_link: Callable[[Endpoint, LinkState], None] = lambda endpoint, state: None
    on_lost: Callable[[Connection], None] = lambda connection: None
    on_dropped: Callable[[Destination, Sequence[Payload], str], None] = lambda destination, frames, reason: None
    on_tick: Callable[[], None] = lambda: None
    on_received: Callable[[], None] | None = None
    max_backlog: int | None = MAX_BACKLOG_BYTES
    authorized: AuthorizedKeys | None = None
    listen: str | None = None
    tunnels: Tunnels | None = None

    def __post_init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._bounded = self.max_backlog is not None
        self.sending = Budget(sys.maxsize if self.max_backlog is None else self.max_backlog)
        self.receiving = Budget(MAX_RECEIVED_BYTES)
        self._backlog = Backlog(self.sending)
        self._drained = 0
        self.connections = Connections(
            self.receiving,
            drained=lambda: self._drained,
            drain=self._wake_thread,
            authorized=self.authorized,
            tunnel_hosts={} if self.tunnels is None else self.tunnels.behind,
        )
        self._incoming: dict[bytes, tuple[Connection, TcpConnection]] = {}  # by routing id
        self._links: dict[Endpoint, _TransportLink] = {}
        self._outbox = _SendQueue()
        self._wake = Wake()
        self._closing = self._dispatching = False
        self._tick_now = False
        self._dropping = RateLimitedWarnings(log)
        self._poller = zmq.Poller()
        self._poller.register(self._wake.fileno(), zmq.POLLIN)
        self._gate = Gatekeeper(self._context, self.authorized) if self.listen is not None else None
        self._router: zmq.Socket[bytes] | None = None
        self._arrivals: zmq.Socket[bytes] | None = None
        self.port = 0
        if self.listen is not None:
            try:
                self._listen(self.listen)
            except BaseException:
                self._release_backlog()
                raise
        self._thread = threading.Thread(target=self._run_thread, name="splitnet-transport", daemon=True)

    def start(self) -> None:
        """Starts the threads, which call the handlers."""
        self._thread.start()
        self.connections.thread.start()

    def send(self, destination: Destination, frames: Sequence[Payload] | None) -> None:
        """Queues the frames of a message, which must not be changed afterwards, and connects an endpoint that is not
        connected. Empty frames: see `connect`; None: see `disconnect`. `on_dropped` is not called for a message that is
        lost with its link."""
        outbox = self._outbox
        with outbox.lock:
            if self._closing:
                return
            here = threading.get_ident() == self._thread.ident
            at_once = here and bool(frames) and not outbox.items and not self._dispatching
            if not at_once:
                outbox.items.append((destination, frames))
                if not outbox.awake and not outbox.held:
                    outbox.awake = True
                    if not here:
                        self._wake.set()
        if at_once:  # a handler sends: the receiver need not wait until the handler returns
            self._dispatch(destination, frames)

    @contextmanager
    def together(self) -> Generator[None]:
        """Delays messages that are sent in this context until its end, so that a receiver of several
        messages wakes only once."""
        outbox = self._outbox
        with outbox.lock:
            outbox.held += 1
        try:
            yield
        finally:
            with outbox.lock:
                outbox.held -= 1
                if outbox.items and not outbox.held and not outbox.awake and not self._closing:
                    outbox.awake = True
                    self._wake.set()

    def connect(self, endpoint: Endpoint) -> None:
        """Opens a link if it is not open. `on_link` is called when the state of the link changes."""
        self.send(endpoint, ())

    def disconnect(self, endpoint: Endpoint) -> None:
        """Closes a link and forgets it. If the link is not up, messages that wait for it are dropped."""
        self.send(endpoint, None)

    def tick_soon(self) -> None:
        """Makes the transport's thread call `on_tick` at once. Never waits for a lock: if the lock is taken,
        `on_tick` is called at the next wake-up."""
        self._tick_now = True
        self._wake_thread()

    def _wake_thread(self) -> None:
        """Wakes the transport's thread, so that it reads all sockets, unless the lock is taken."""
        if self._outbox.lock.acquire(blocking=False):
            try:
                if not self._closing and self._thread.ident is not None:
                    self._wake.set()
            finally:
                self._outbox.lock.release()

    def link_state(self, endpoint: Endpoint) -> LinkState:
        """State of the link to `endpoint`; `CONNECTING` if it was never opened."""
        link = self._links.get(endpoint)
        return link.state if link else LinkState.CONNECTING

    def is_taken(self, endpoint: Endpoint) -> bool:
        """Whether the other side has accepted the TCP connection; the handshake may still be under way. False for
        unreachable peers, because the tunnel in this process accepts their connections."""
        link = self._links.get(endpoint)
        return link is not None and link.tcp is not None and not endpoint.hidden

    def traffic(self, endpoint: Endpoint) -> flow.LinkTraffic | None:
        """Byte counts of a link so far; None: the link has no connection, or the system does not count."""
        link = self._links.get(endpoint)
        connection = link.tcp if link is not None else None
        try:
            if connection is None or flow.cookie(connection.descriptor) != connection.cookie:
                return None
            return flow.traffic(connection.descriptor)
        except OSError:
            return None

    def queues(self) -> dict[Endpoint, flow.LinkTraffic]:
        """The links with a queue of unconfirmed bytes; empty where the system does not count."""
        passed = {endpoint: self.traffic(endpoint) for endpoint in list(self._links)}
        return {
            endpoint: each for endpoint, each in passed.items() if each is not None and each.unsent >= flow.QUEUE_BYTES
        }

    def unsent(self, endpoint: Endpoint) -> int:
        """Bytes of tracked messages that wait for a link; 0 if the link is not up, or if `max_backlog` is None."""
        return self._backlog.held_bytes(endpoint) if self.link_state(endpoint) is LinkState.UP else 0

    @property
    def refused_connections(self) -> int:
        """How many incoming connections were refused because their keys are not authorized."""
        return self._gate.refused if self._gate is not None else 0

    def close(self) -> None:
        """Sends queued messages over links that are up (for at most 0.5 s), and ends the sockets and the threads."""
        with self._outbox.lock:
            if self._closing:
                return
            self._closing = True
            if self._thread.ident is not None:
                self._wake.set()
        if self._thread.ident is None:
            self._release_backlog()
        else:
            self._thread.join()

    def _listen(self, address: str) -> None:
        assert self._gate is not None
        self._poller.register(self._gate.socket, zmq.POLLIN)
        self._router = self._context.socket(zmq.ROUTER)
        self._secure(self._router)
        self._router.affinity = _SERVE_THREAD
        self._router.curve_server = True
        self._router.zap_domain = Gatekeeper.DOMAIN
        self._router.router_mandatory = True
        self._arrivals = self._router.get_monitor_socket(_ARRIVALS)
        with explain_listen_errors(address, "port with --listen", "use --listen tcp://HOST:PORT"):
            try:
                self._router.bind(address)
            except zmq.ZMQError as error:
                raise OSError(error.errno, error.strerror) from None
        bound = cast(bytes, self._router.getsockopt(zmq.LAST_ENDPOINT))
        self.port = int(bound.rpartition(b":")[2].rstrip(b"\0"))
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._arrivals, zmq.POLLIN)

    def _secure(self, handle: zmq.Socket[bytes]) -> None:
        handle.curve_publickey = self.identity.curve_public
        handle.curve_secretkey = self.identity.curve_secret
        handle.linger = _CLOSE_LINGER_MS
        handle.copy_threshold = 0  # pyzmq would copy small messages, and could not track them
        handle.maxmsgsize = MAX_PAYLOAD_BYTES + _CURVE_BYTES
        handle.rcvhwm = _QUEUED_MESSAGES
        handle.sndhwm = 0  # `Backlog` bounds bytes; a bound on the number would drop small messages of a busy key
        handle.heartbeat_ivl = _HEARTBEAT_MS
        handle.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS
        handle.handshake_ivl = _HANDSHAKE_MS
        handle.ipv6 = True

    def _link(self, endpoint: Endpoint) -> _TransportLink:
        link = self._links.get(endpoint)
        if link is None:
            if not is_address(endpoint.address):  # all links would wait while ZeroMQ resolves a host name
                raise zmq.ZMQError(zmq.EINVAL, f"{endpoint.address} has no IP address")
            dealer = self._context.socket(zmq.DEALER)
            monitor: zmq.Socket[bytes] | None = None
            try:
                self._secure(dealer)
                dealer.affinity = _CONNECT_THREAD
                dealer.curve_serverkey = endpoint.key.curve
                dealer.reconnect_ivl_max = 5_000
                monitor = dealer.get_monitor_socket(sum(_STATE_OF_EVENT) + zmq.Event.CONNECTED)
                dealer.connect(self._address(endpoint))
            except (zmq.ZMQError, OSError) as error:
                _close_watched(dealer, monitor)
                self._close_tunnel(endpoint)
                raise error if isinstance(error, zmq.ZMQError) else zmq.ZMQError(error.errno) from error
            link = self._links[endpoint] = _TransportLink(endpoint, dealer, monitor)
            self._poller.register(dealer, zmq.POLLIN)
            self._poller.register(monitor, zmq.POLLIN)
        elif endpoint.relays != link.endpoint.relays and self.tunnels is not None:
            self.tunnels.learn(endpoint)
        return link

    def _address(self, endpoint: Endpoint) -> str:
        if not endpoint.hidden:
            return endpoint.address
        if self.tunnels is None:
            raise zmq.ZMQError(zmq.EINVAL, f"{endpoint.address} is unreachable, and this process has no tunnels")
        return self.tunnels.open_tunnel(endpoint)

    def _close_tunnel(self, endpoint: Endpoint) -> None:
        if self.tunnels is not None:
            self.tunnels.close_tunnel(endpoint)

    def _unlink(self, endpoint: Endpoint, *, at_end: bool = False) -> None:
        link = self._links.pop(endpoint, None)
        if link is not None:
            self._backlog.forget_receiver(endpoint)
            if link.tcp is not None:
                self.connections.closed(link.tcp.descriptor, link.tcp)
            self._poller.unregister(link.socket)
            self._poller.unregister(link.monitor)
            if link.state is not LinkState.UP and not (at_end and link.state is LinkState.CONNECTING):
                link.socket.linger = 0  # a socket that waits to send queued messages keeps its descriptors
            _close_watched(link.socket, link.monitor)
            self._close_tunnel(endpoint)

    def _run_thread(self) -> None:
        wake = self._wake.fileno()
        next_tick = 0.0
        try:
            while not self._closing:
                ready = dict(self._poller.poll(_TICK_MS))
                if wake in ready:
                    self._wake.clear()
                self._flush()
                if self._gate is not None and self._gate.socket in ready:
                    self._gate.answer_requests()
                drained, received = True, False
                if self._arrivals is not None and self._arrivals in ready:
                    self._follow_arrivals(self._arrivals)
                if self._router is not None and self._router in ready:
                    drained, received = self._receive_burst(self._router, None), True
                for link in list(self._links.values()):
                    if link.monitor in ready:
                        self._follow(link)
                    if link.socket in ready:
                        drained, received = drained & self._receive_burst(link.socket, link), True
                self._drained += drained
                if received and self.on_received is not None:
                    self._guard(self.on_received)
                if self._tick_now or time.monotonic() >= next_tick:
                    self._tick_now = False
                    next_tick = time.monotonic() + _TICK_MS / 1000
                    self._guard(self.on_tick)
                # Handlers do not wake this thread, so their messages must be sent before it polls again.
                self._flush()
            self._flush()
        finally:
            self._release_backlog()

    def _flush(self) -> None:
        outbox = self._outbox
        while True:
            with outbox.lock:
                if not outbox.items:
                    outbox.awake = False
                    return
                items = list(outbox.items)
                outbox.items.clear()
            for destination, frames in items:
                self._dispatch(destination, frames)

    def _dispatch(self, destination: Destination, frames: Sequence[Payload] | None) -> None:
        self._dispatching = True  # messages that handlers send meanwhile are queued
        try:
            if isinstance(destination, Endpoint):
                if frames is None:
                    self._unlink(destination)
                elif frames:
                    self._transmit(self._link(destination).socket, destination, frames)
                else:
                    self._link(destination)
            elif self._router is not None and frames:
                if self._is_over(destination):
                    raise zmq.ZMQError(zmq.EHOSTUNREACH)
                self._transmit(self._router, destination, [destination.routing_id, *frames])
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH and isinstance(destination, Connection):
                log.debug("message dropped: its connection has ended")
                self._backlog.forget_receiver(destination)
                self._guard(self.on_lost, destination)
            else:
                self._drop_message(destination, frames or (), _TOO_SLOW if error.errno == zmq.EAGAIN else str(error))
        finally:
            self._dispatching = False

    def _is_over(self, connection: Connection) -> bool:
        """Whether this side has ended a connection, or its routing id belongs to another connection."""
        known, tcp = self._incoming.get(connection.routing_id, (connection, None))
        return (known is not connection and known != connection) or (tcp is not None and bool(tcp.ended))

    def _transmit(self, handle: zmq.Socket[bytes], destination: Destination, frames: Sequence[Payload]) -> None:
        if not self._bounded:
            _send(handle, frames, copy=len(frames[-1]) <= LARGE_BYTES)
            return
        size = sum(map(len, frames)) + _HELD_BYTES * len(frames)
        if self._backlog.untracked(destination, size):
            _send(handle, frames)
            return
        size = self._backlog.reserve_room(destination, size)
        if not size:
            raise zmq.Again
        tracker: zmq.MessageTracker | None = None
        try:
            tracker = _send(handle, frames, copy=False, track=True)
        finally:
            self._backlog.add_message(destination, size, tracker)

    def _drop_message(self, destination: Destination, frames: Sequence[Payload], reason: str) -> None:
        if not frames:
            log.warning("no link could be opened: %s", reason)
            return
        size = sum(map(len, frames))
        self._dropping.say("a message of %d bytes was dropped: %s", size, reason, extra={"nbytes": size})
        self._guard(self.on_dropped, destination, frames, reason)

    def _receive_burst(self, handle: zmq.Socket[bytes], link: _TransportLink | None) -> bool:
        """Hands over at most `_RECEIVE_BURST` messages; returns whether the socket is empty."""
        for _ in range(_RECEIVE_BURST):
            try:
                received = _receive_frames(handle)
            except zmq.Again:
                return True
            source: Destination
            if link is None:
                source, tcp = self._sender(received[0].bytes, received[-1])
                received = received[1:]
            else:
                source, tcp = link.endpoint, link.tcp
            size, frames = 0, list[Payload]()
            for frame in received:
                length = len(frame)
                size += length + (_SHORT_EXTRA if length <= _SHORT_FRAME else _LONG_EXTRA)
                frames.append(frame.bytes if length < 4096 else frame.buffer)
            if tcp is not None:
                tcp.delivered += size
                if not tcp.ended and size > MAX_MESSAGE_BYTES:
                    self.connections.end_connection(tcp, "endless_message")
                if tcp.ended:
                    continue
            self._guard(self.on_message, source, frames)
            if not cast(int, handle.get(_EVENTS)) & _POLLIN:  # faster than an attempt that raises `zmq.Again`
                return True
        return False

    def _sender(self, routing_id: bytes, frame: zmq.Frame) -> tuple[Connection, TcpConnection | None]:
        known = self._incoming.get(routing_id)
        if known is not None:
            return known
        connection = Connection(routing_id, proven_key(frame))
        descriptor = int(cast(str, frame.get("__fd")))
        tcp = self.connections.named(descriptor, connection)
        if tcp is None and self._arrivals is not None:  # the event of a new connection may not have been read
            self._follow_arrivals(self._arrivals)
            tcp = self.connections.named(descriptor, connection)
        if tcp is not None:
            self._incoming[routing_id] = connection, tcp
        return connection, tcp

    def _follow_arrivals(self, monitor: zmq.Socket[bytes]) -> None:
        while True:
            try:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if event["event"] == zmq.Event.ACCEPTED:
                self.connections.connection_made(event["value"])
                continue
            gone = self.connections.closed(event["value"])
            if gone is not None and isinstance(gone.owner, Connection):
                self._incoming.pop(gone.owner.routing_id, None)
                self._backlog.forget_receiver(gone.owner)
                if gone.ended:
                    self._guard(self.on_lost, gone.owner)

    def _follow(self, link: _TransportLink) -> None:
        while True:
            try:
                message = parse_monitor_message(link.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            event = message["event"]
            if event == zmq.Event.CONNECTED:
                link.tcp = self.connections.connection_made(message["value"], link.endpoint)
                link.connected_at = time.monotonic()
            elif event == zmq.Event.DISCONNECTED and link.tcp is not None:
                self.connections.closed(link.tcp.descriptor, link.tcp)
                link.tcp = None
            state = _STATE_OF_EVENT.get(zmq.Event(event), link.state)
            # ZeroMQ reports a timeout of the handshake with the same event as its end by the other side. A tunnel whose
            # far side cannot be reached also gives this event.
            took_s = time.monotonic() - link.connected_at
            if event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL and (link.endpoint.hidden or took_s > _REFUSES_S):
                state = LinkState.DOWN
            # A disconnection follows a refused handshake; the link keeps the cause until it is up.
            if state is LinkState.DOWN and link.state.is_final:
                continue
            if state is not link.state:
                link.state = state
                self._guard(self.on_link, link.endpoint, state)

    def _guard(self, handler: Callable[..., None], *arguments: Any) -> None:
        """Logs a handler's error, which must not end the transport's thread."""
        try:
            handler(*arguments)
        except Exception:
            log.exception("error in a transport handler")

    def _release_backlog(self) -> None:
        with self._outbox.lock:
            self._closing = True
        self.connections.close()
        for endpoint in list(self._links):
            self._unlink(endpoint, at_end=True)
        if self._gate is not None:
            self._gate.socket.close()
        if self._router is not None:
            _close_watched(self._router, self._arrivals)
        self._context.term()
        if self.tunnels is not None:
            self.tunnels.loop.close()
        self._wake.close()


def _send(
    handle: zmq.Socket[bytes], frames: Sequence[Payload], *, copy: bool = True, track: bool = False
) -> zmq.MessageTracker | None:
    """Sends a message, or raises zmq.Again. `send_multipart` does the same and takes twice as long."""
    for frame in frames[:-1]:
        handle.send(frame, _MORE, copy, track)
    return handle.send(frames[-1], _NOBLOCK, copy, track)


def _receive_frames(handle: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """Receives a message, or raises zmq.Again. `recv_multipart` does the same and takes twice as long."""
    frames = [handle.recv(_NOBLOCK, copy=False)]
    while frames[-1].more:
        frames.append(handle.recv(_NOBLOCK, copy=False))
    return frames


def _close_watched(handle: zmq.Socket[bytes], monitor: zmq.Socket[bytes] | None) -> None:
    """Closes a socket and its monitor."""
    handle.disable_monitor()
    if monitor is not None:
        monitor.close(0)
    handle.close()
