"""The TCP connections of a transport: their owners, the received bytes that they hold, and when they must end.

ZeroMQ bounds the size of a frame and the number of whole messages that wait, but keeps any number of frames of one
message. So this module counts from outside: the bytes that the kernel has passed on from a connection, minus the bytes
of messages that ZeroMQ has handed over, are the bytes that ZeroMQ holds (on Linux; other systems count nothing). A
connection is ended by a shutdown of its descriptor.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, TypeVar, cast

import zmq

from scheduler.liveness import STALLED_S
from splitnet.limits import Budget, most_connections
from splitnet.security.identity import AuthorizedKeys
from splitnet.transport import flow
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

log = logging.getLogger(__name__)

MAX_RECEIVED_BYTES = 1 << 30  # bytes of incomplete and unread messages, over all connections

MAX_MESSAGE_BYTES = MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES + 4096

MOST_OF_KEY = 64  # largest number of incoming connections of one key

_LOOK_S, _CLOSE_LOOK_S = 0.1, 0.02  # between two measurements; `_CLOSE_LOOK_S` while a connection holds many bytes
_WORTH_A_CLOSE_LOOK = 4 << 20  # a connection that holds more bytes is measured more often
_KEYS_S = 1.0  # between two checks of the authorized keys
_MOVED_S = 1.0  # between two checks of this machine's own addresses
_HANDSHAKE_BYTES = 2048  # more than a handshake takes; ZeroMQ reads these bytes and never hands them over
_ARRIVALS = 256  # largest number of hosts that are remembered after their incoming connections close
_SPARED = 16
"""Largest number of connections in a handshake that one search for a silent connection skips: this bounds its time."""
_HEARTBEAT_BYTES_PER_S = 64.0  # more than the heartbeats of both sides take; ZeroMQ never hands them over


Name = TypeVar("Name", str, bytes)


@dataclass(slots=True, eq=False)
class TcpConnection:
    """One connection, incoming or outgoing."""

    descriptor: int
    cookie: bytes
    host: str
    opened_at: float
    owner: Connection | Endpoint | None  # None: the key is not known before the first message
    delivered: int = 0  # bytes on the wire of messages that were handed over; only the transport's thread writes it
    ended: str = ""  # why this side has ended the connection; empty: this side has not ended it
    inside: int = 0  # bytes that ZeroMQ holds, as last measured
    active_at: float = 0.0  # when a message was last handed over
    delivered_before: int = 0  # `delivered` at the last measurement
    acked: int = 0  # sent bytes that the other side has confirmed, as last measured
    acked_at: float = 0.0  # when the other side last confirmed bytes, or nothing waited for confirmation
    too_long_since: int | None = None  # count of `drained` when the connection first held more than a whole message
    own_host: str = ""
    # this connection was once skipped as the oldest connection without a key, because its handshake had begun
    was_spared: bool = False

    @property
    def account(self) -> tuple[Hashable, Hashable]:
        owner = self.owner
        return (owner.curve if isinstance(owner, Connection) else owner or self.host, self)


@dataclass(eq=False)
class Connections:
    """All TCP connections of a transport. Thread-safe. `thread` measures them ten times per second, and more often
    while a connection holds many bytes.

    Args:
        received: accounts for bytes that were received and not handed over, by key (by host until the key is known)
            and by connection.
        drained: returns how often all sockets have been read until they were empty.
        drain: asks the transport to read all sockets soon.
        authorized: keys whose connections may stay; None: all keys.
        tunnel_hosts: maps the host and port of a connection that a tunnel has made to the name that counts as the host
            of the connection.

    Attributes:
        ended: how many connections this side has ended, by reason.
    """

    received: Budget
    _: KW_ONLY
    drained: Callable[[], int]
    drain: Callable[[], None]
    authorized: AuthorizedKeys | None = None
    tunnel_hosts: Mapping[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])

    def __post_init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self._keys_at = self._moved_at = 0.0
        self._missed: set[str] = set()  # local addresses of connections that this machine lacked at the last check
        self._looked_at = time.monotonic()
        self._by_descriptor: dict[int, TcpConnection] = {}
        self._nameless: dict[str, dict[TcpConnection, None]] = {}
        """Incoming connections without a key, by host: the oldest first, then the spared ones."""
        self._of_keys: dict[bytes, dict[TcpConnection, None]] = {}
        self._incoming = 0
        self._arrived: deque[tuple[float, str]] = deque(maxlen=_ARRIVALS)
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self.thread = threading.Thread(target=self._check_repeatedly, name="splitnet-connections", daemon=True)

    def close(self) -> None:
        """Stops the thread. The connections stay open."""
        self._closing.set()
        if self.thread.ident is not None:
            self.thread.join()

    def connection_made(self, descriptor: int, owner: Endpoint | None = None) -> TcpConnection | None:
        """Adds a new connection to `owner`, or a new incoming connection if `owner` is None. Returns None if the
        connection has ended already."""
        try:
            cookie, (own, other) = flow.cookie(descriptor), flow.addresses_of(descriptor)
        except OSError:
            return None
        host: str = other[0].removeprefix("::ffff:")
        host = self.tunnel_hosts.get((host, other[1])) or host
        now = time.monotonic()
        made = TcpConnection(descriptor, cookie, host, now, owner, active_at=now, acked_at=now, own_host=own[0])
        with self._lock:
            self.closed(descriptor)
            self._by_descriptor[descriptor] = made
            if owner is None:
                self._arrived.append((now, host))
                self._incoming += 1
                others = self._nameless.setdefault(host, {})
                others[made] = None
                most = most_connections()
                if len(others) > most // 2:
                    self.end_connection(_first_silent(others), "handshakes")
                if self._incoming > most:
                    self._end_one()
        return made

    def hosts(self, since: float) -> set[str]:
        """Hosts of incoming connections that are open, or that were opened since `since` (`time.monotonic()`). Only
        the hosts of the last `_ARRIVALS` connections are known after they close."""
        with self._lock:
            present = [known for known in self._by_descriptor.values() if not isinstance(known.owner, Endpoint)]
            return {known.host for known in present} | {host for at, host in self._arrived if at >= since}

    def closed(self, descriptor: int, expected: TcpConnection | None = None) -> TcpConnection | None:
        """Removes and returns a connection that has ended. expected: the connection to remove, because its
        descriptor may already belong to another connection; None: any connection."""
        with self._lock:
            if expected is not None and self._by_descriptor.get(descriptor) is not expected:
                return None
            gone = self._by_descriptor.pop(descriptor, None)
            if gone is not None:
                self._stop_counting(gone)
            return gone

    def named(self, descriptor: int, owner: Connection) -> TcpConnection | None:
        """Sets the owner of an incoming connection, at its first message. Returns None if the connection has ended."""
        with self._lock:
            known = self._by_descriptor.get(descriptor)
            if known is None or isinstance(known.owner, Endpoint):
                return None
            self._stop_counting(known)
            known.owner, known.active_at = owner, time.monotonic()
            if not known.ended:
                of_key = self._of_keys.setdefault(owner.curve, {})
                of_key[known] = None
                self._incoming += 1
                if self.authorized is not None and not self.authorized.allows(owner.curve):
                    self.end_connection(known, "revoked")
                elif len(of_key) > MOST_OF_KEY:
                    self.end_connection(min(of_key, key=lambda other: other.active_at), "too_many_of_key")
            return known

    def end_connection(self, connection: TcpConnection, reason: str) -> None:
        """Ends a connection. The transport gets the same event as if the other side had ended it."""
        with self._lock:
            if connection.ended:
                return
            self._stop_counting(connection)
            connection.ended = reason
            self.ended[reason] += 1
            log.info("a connection from or to %s was ended: %s", connection.host, reason)
            flow.shut_down(connection.descriptor, connection.cookie)

    def check_connections(self, now: float) -> bool:
        """Measures all connections and ends the ones that break a bound. Returns whether a connection holds so many
        bytes that the next look must come soon."""
        with self._lock:
            present = [known for known in self._by_descriptor.values() if not known.ended]
        if now - self._looked_at > STALLED_S / 2:  # this process was suspended, so the other sides are not to blame
            for known in present:
                known.acked_at = now
        self._looked_at = now
        self._end_unauthorized(now)
        self._end_moved(present, now)
        close = False
        for known in present:
            close |= self._measure(known, now)
        while self.received.used > self.received.limit:
            left = [known for known in present if known.inside and not known.ended]
            if not left:
                break
            who = max((known.account[0] for known in left), key=self.received.held_bytes)
            its = [known for known in left if known.account[0] == who]
            self.end_connection(max(its, key=lambda known: known.inside), "memory")
        return close

    def _measure(self, known: TcpConnection, now: float) -> bool:
        try:
            passed = flow.traffic(known.descriptor)
            if passed is None or flow.cookie(known.descriptor) != known.cookie:
                return False
        except OSError:
            return False
        drained, delivered = self.drained(), known.delivered
        if delivered != known.delivered_before:
            known.active_at = now
        if passed.acked != known.acked or not passed.unsent:
            known.acked, known.acked_at = passed.acked, now
        elif now - known.acked_at > STALLED_S:
            self.end_connection(known, "stalled")
            return False
        others = _HANDSHAKE_BYTES + _HEARTBEAT_BYTES_PER_S * (now - known.opened_at)
        inside = max(0, round(passed.read - delivered - others))
        with self._lock:
            if known.ended or self._by_descriptor.get(known.descriptor) is not known:
                return False
            known.inside = inside
            self.received.set_held(inside, *known.account)
        # A connection that holds more bytes than a message may have holds a whole message, which is handed over when
        # all sockets are read until they are empty. The transport's iteration during this measurement may have missed
        # the message, but the next one cannot.
        if inside <= MAX_MESSAGE_BYTES or delivered != known.delivered_before:
            known.too_long_since = None
        elif known.too_long_since is None:
            known.too_long_since = drained
        elif drained > known.too_long_since + 1:
            self.end_connection(known, "endless_message")
        known.delivered_before = delivered
        if inside > MAX_MESSAGE_BYTES:
            self.drain()
        return inside > _WORTH_A_CLOSE_LOOK

    def _end_unauthorized(self, now: float) -> None:
        if self.authorized is None or now < self._keys_at:
            return
        self._keys_at = now + _KEYS_S
        with self._lock:
            gone = [key for key in self._of_keys if not self.authorized.allows(key)]
            for known in [known for key in gone for known in self._of_keys[key]]:
                self.end_connection(known, "revoked")

    def _end_moved(self, present: Sequence[TcpConnection], now: float) -> None:
        """Ends connections from addresses that this machine has lost, when two checks in a row have missed the address.
        Without these checks, the connections would end only after half a minute."""
        if now < self._moved_at:
            return
        self._moved_at = now + _MOVED_S
        missed = {host for host in {known.own_host for known in present} if not flow.is_own_address(host)}
        for known in present:
            if known.own_host in missed & self._missed:
                self.end_connection(known, "moved")
        self._missed = missed

    def _end_one(self) -> None:
        """Makes room for a new connection by ending one connection of the key or host with the most connections."""
        nameless = max(self._nameless.values(), key=len, default=dict[TcpConnection, None]())
        most_of_key = max(map(len, self._of_keys.values()), default=0)
        if len(nameless) > max(1, most_of_key):
            self.end_connection(_first_silent(nameless), "too_many")
        elif self._of_keys:
            hosts = Counter(known.host for of_key in self._of_keys.values() for known in of_key)
            choice = [known for of_key in self._of_keys.values() if len(of_key) == most_of_key for known in of_key]
            self.end_connection(min(choice, key=lambda known: (-hosts[known.host], known.active_at)), "too_many")

    def _stop_counting(self, connection: TcpConnection) -> None:
        """Stops counting a connection. The caller holds the lock."""
        self.received.set_held(0, *connection.account)
        connection.inside = 0
        owner = connection.owner
        if isinstance(owner, Connection):
            self._leave_group(self._of_keys, owner.curve, connection)
        elif owner is None:
            self._leave_group(self._nameless, connection.host, connection)

    def _leave_group(
        self, groups: dict[Name, dict[TcpConnection, None]], name: Name, connection: TcpConnection
    ) -> None:
        group = groups.get(name, {})
        if connection in group:
            del group[connection]
            self._incoming -= 1
            if not group:
                del groups[name]

    def _check_repeatedly(self) -> None:
        pause_s = _LOOK_S
        while not self._closing.wait(pause_s):
            try:
                pause_s = _CLOSE_LOOK_S if self.check_connections(time.monotonic()) else _LOOK_S
            except Exception:
                log.exception("an error occurred in the check of connections")


def _first_silent(nameless: dict[TcpConnection, None]) -> TcpConnection:
    """The connection of a host to end first: the oldest connection that has sent nothing or was spared before."""
    for _ in range(min(_SPARED, len(nameless))):
        oldest = next(iter(nameless))
        if oldest.was_spared or not _has_spoken(oldest):
            return oldest
        oldest.was_spared = True
        del nameless[oldest]
        nameless[oldest] = None
    return next(iter(nameless))


def _has_spoken(connection: TcpConnection) -> bool:
    try:
        passed = flow.traffic(connection.descriptor)
    except OSError:
        return False
    return passed is not None and passed.received > 0


_AT_ONCE = 64  # largest number of requests that are answered in one call


class Gatekeeper:
    """The ZAP handler of a ZeroMQ context, which accepts or refuses the keys of new connections.

    `socket` belongs to the thread that polls it and calls `answer_requests`. authorized: the keys that are accepted;
    None: all.
    refused: how many connections were refused.
    """

    DOMAIN: ClassVar[bytes] = b"splitnet"

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: AuthorizedKeys | None) -> None:
        self._authorized = authorized
        self.refused = 0
        self.socket = context.socket(zmq.REP)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer_requests(self) -> None:
        """Answers up to `_AT_ONCE` requests, so that new connections do not wait for messages of other connections."""
        for _ in range(_AT_ONCE):
            try:
                self._answer_request(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return

    def _answer_request(self, request: list[bytes]) -> None:
        version, request_id = request[0], request[1] if len(request) > 1 else b""
        curve = request[6] if len(request) == 7 and request[5] == b"CURVE" else b""
        if len(curve) == 32 and (self._authorized is None or self._authorized.allows(curve)):
            reply = [version, request_id, b"200", b"OK", curve.hex().encode(), b""]
        else:
            self.refused += 1
            key = curve.hex()
            log.info("connection refused: key %s is not authorised", key, extra={"curve_key": key})
            reply = [version, request_id, b"400", b"not authorised", b"", b""]
        self.socket.send_multipart(reply)


def proven_key(frame: zmq.Frame) -> bytes:
    """The CURVE key, 32 bytes, that a gatekeeper has accepted for the connection of a received frame."""
    return bytes.fromhex(cast(str, frame.get("User-Id")))
