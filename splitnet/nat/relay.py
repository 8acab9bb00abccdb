"""A relay: unreachable peers keep a stream to the relay, which passes on calls over this stream.

The relay joins the streams of the caller and of the peer, and copies their bytes, which are encrypted. All resources
that other machines use are bounded: places by key, by host and in all, one buffer for each direction of a stream, and
bytes per second.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace

from splitnet.errors import NotAuthorized, ProtocolError, explain_listen_errors
from splitnet.limits import Places, SharedRate, most_connections
from splitnet.nat.relay_messages import (
    TOKEN_BYTES,
    Beat,
    Call,
    Called,
    Join,
    Joined,
    Message,
    Refused,
    Reserve,
    Reserved,
    StreamPurpose,
    Tried,
    Try,
)
from splitnet.nat.stream import (
    STREAM_ERRORS,
    StreamLoop,
    answer_handshake,
    copy,
    dial,
    end,
    end_all,
    listening,
    receive,
    send,
)
from splitnet.security.identity import AuthorizedKeys, Identity, PublicKey
from splitnet.wire.endpoints import Relay, address_of, host_and_port

log = logging.getLogger(__name__)

BEAT_S = 10.0  # between two `Beat` messages of a peer with a reservation
KEYS_S = 1.0  # between two checks whether the keys of all reservations and streams are still authorized


@dataclass(frozen=True, kw_only=True)
class RelayBounds:
    """Bounds on the resources of a relay that other machines use."""

    reservations: int = 128
    reservations_of_host: int = 8
    streams: int = 256
    streams_of_key: int = 16  # streams of one caller's key
    streams_of_host: int = 32  # streams of one caller's host
    streams_to_key: int = 64  # streams to one unreachable peer
    handshakes: int = 64  # at this bound and the next, a new handshake ends the oldest one
    handshakes_of_host: int = 16
    handshake_s: float = 5.0
    join_s: float = 4.0  # how long an unreachable peer may take to join
    tries: int = 16  # connections to answer `Try`, at the same time
    tries_of_host: int = 4
    try_s: float = 2.0
    silent_s: float = 3 * BEAT_S  # time after which the reservation of a silent peer ends
    idle_s: float = 60.0  # time after which a stream without bytes ends; ZeroMQ sends heartbeats every few seconds
    half_open_s: float = 10.0  # time after which such a stream ends if one direction has ended
    bytes_per_s: float = 32 << 20  # over all streams; unreachable peers share them evenly
    beats: int = 5  # `Beat` messages that a peer may send in addition to one per second

    def scaled_to(self, descriptors: int) -> RelayBounds:
        """These bounds, or proportionally lower ones with which the relay opens at most `descriptors` descriptors."""
        wanted = 2 * self.streams + self.reservations + self.handshakes + 2 * self.tries
        if wanted <= descriptors:
            return self
        names = ("streams", "reservations", "handshakes", "tries")
        return replace(self, **{name: max(1, getattr(self, name) * descriptors // wanted) for name in names})


@dataclass(slots=True, eq=False)
class _Reservation:
    sock: socket.socket
    key: PublicKey
    task: asyncio.Task[None]
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True, eq=False)
class _WaitingCaller:
    """A caller that waits for the called peer, or is joined to it."""

    caller: PublicKey
    task: asyncio.Task[None]
    target: PublicKey
    joined: asyncio.Future[tuple[socket.socket, str, str]]  # the peer's stream, and its `Joined.seen` and `Joined.here`
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class RelayServer:
    """The relay of a process. It listens at `listen` (`tcp://IP:port`) from its construction on, and serves from
    `start` on. Close it before its loop. Raises AddressInUse, SplitnetError: it cannot listen at `listen`.

    authorized: the keys that may reserve and call; None: all keys. port: the port, also if `listen` asks for any (0).
    streams: places of callers, which wait for a peer or are joined to one. passed_bytes: bytes copied so far. events:
    counts of `reserved`, `joined`, `refused`, `failed` and `revoked`.
    """

    loop: StreamLoop
    identity: Identity
    listen: str
    _: KW_ONLY
    authorized: AuthorizedKeys | None = None
    bounds: RelayBounds = RelayBounds()

    def __post_init__(self) -> None:
        # Half of the descriptors: the other half is for streams to this peer, which may be unreachable itself.
        self.bounds = bounds = self.bounds.scaled_to(most_connections() // 2)
        self._reservations: dict[bytes, _Reservation] = {}
        self._waiting: dict[bytes, _WaitingCaller] = {}
        self._handshakes: dict[str, list[asyncio.Task[None]]] = {}
        """Streams whose key is not proven yet, by host, the oldest first."""
        self._served: set[asyncio.Task[None]] = set()
        self._reserving = Places(bounds.reservations, host=bounds.reservations_of_host)
        self.streams = Places(
            bounds.streams, key=bounds.streams_of_key, host=bounds.streams_of_host, target=bounds.streams_to_key
        )
        self._trying = Places(bounds.tries, host=bounds.tries_of_host)
        self._rate = SharedRate(bounds.bytes_per_s)
        self.passed_bytes = 0
        self.events: Counter[str] = Counter()
        with explain_listen_errors(self.listen, "port for streams", "give an address of this machine"):
            self._listener = listening(self.listen)
        self.port: int = self._listener.getsockname()[1]
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts to accept streams."""
        self._task = self.loop.start_task(self._accept())

    def close(self) -> None:
        """Ends all streams, and stops listening."""
        if self._task is not None:
            self.loop.cancel_task(self._task)
        self._listener.close()

    def relay_at(self, host: str) -> Relay:
        """The address and key of this relay for machines that reach this machine at `host`."""
        return Relay(address_of((host, self.port)), self.identity.public.raw)

    @property
    def reservations(self) -> int:
        """How many unreachable peers can be called through this relay."""
        return len(self._reservations)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        if self.authorized is not None:
            self._served.add(loop.create_task(self._end_unauthorized(self.authorized)))
        try:
            while True:
                try:
                    sock, name = await loop.sock_accept(self._listener)
                except OSError as error:  # usually too many open files
                    log.warning("no stream can be accepted: %s", error)
                    await asyncio.sleep(1.0)
                    continue
                self._begin_handshake(sock, address_of(name))
                await asyncio.sleep(0)  # so that a flood of connections does not block the event loop
        finally:
            await end_all([*self._served])

    def _begin_handshake(self, sock: socket.socket, seen: str) -> None:
        with suppress(OSError):  # the connection has ended already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host = host_and_port(seen)[0]
        self._make_room(host)
        task = asyncio.get_running_loop().create_task(self._serve(sock, host, seen))
        self._handshakes.setdefault(host, []).append(task)
        self._served.add(task)

        def over(_: object) -> None:
            self._served.discard(task)
            self._has_greeted(host, task)
            sock.close()

        task.add_done_callback(over)

    def _make_room(self, host: str) -> None:
        """Ends the oldest handshake of a host if there is no room for a handshake from `host`."""
        greeted = self._handshakes
        crowd = greeted.get(host, [])
        if len(crowd) < self.bounds.handshakes_of_host:
            if sum(map(len, greeted.values())) < self.bounds.handshakes:
                return
            crowd = max(greeted.values(), key=len)
        self.events["refused"] += 1
        crowd.pop(0).cancel()

    def _has_greeted(self, host: str, task: asyncio.Task[None] | None) -> None:
        crowd = self._handshakes.get(host, [])
        if task in crowd:
            crowd.remove(task)
        if not crowd:
            self._handshakes.pop(host, None)

    async def _serve(self, sock: socket.socket, host: str, seen: str) -> None:
        try:
            try:
                async with asyncio.timeout(self.bounds.handshake_s):
                    answering = await answer_handshake(sock, self.identity)
                    key = answering.key
                    try:
                        self._check_key(key)
                    except NotAuthorized:
                        await send(sock, Refused("this relay does not accept your key"))
                        raise
                    if answering.purpose not in _REQUESTS:
                        raise ProtocolError("a relay only accepts streams to reserve, call, join or try")
                    request = await receive(sock, _REQUESTS[answering.purpose])
            finally:
                self._has_greeted(host, asyncio.current_task())
            if isinstance(request, Reserve):
                await self._reserve(sock, host, key)
            elif isinstance(request, Try):
                await self._try(sock, host, request.address)
            elif isinstance(request, Call):
                await self._call_peer(sock, host, seen, key, request)
            else:
                await self._join(sock, seen, key, request)
        except STREAM_ERRORS as error:
            self.events["failed"] += 1
            log.debug("a stream from %s has ended: %s", host, error or type(error).__name__)

    def _check_key(self, key: PublicKey) -> None:
        if self.authorized is not None and not self.authorized.allows(key.curve_raw):
            raise NotAuthorized(f"the key {key} is not authorised")

    async def _end_unauthorized(self, authorized: AuthorizedKeys) -> None:
        """Ends reservations and streams of keys that were removed from the list."""
        while True:
            await asyncio.sleep(KEYS_S)
            held = [(each.task, [each.key]) for each in self._reservations.values()]
            held += [(each.task, [each.caller, each.target]) for each in self._waiting.values()]
            for task, keys in held:
                if not all(authorized.allows(key.curve_raw) for key in keys):
                    self.events["revoked"] += 1
                    task.cancel()

    async def _try(self, sock: socket.socket, host: str, address: str) -> None:
        """Connects to a port of the asking host, and to no other host, so that no peer can use the relay to send
        connections to other machines or to learn their open ports."""
        asked = ipaddress.ip_address(host_and_port(address)[0]) if address else None
        own = ipaddress.ip_address(host)
        if asked is None or asked.version != own.version:
            await self._refuse_caller(sock, f"this relay sees your host as {host}, and connects to no other host")
        elif asked != own:
            await send(sock, Tried(False))
        elif not self._trying.take_place(host=host):
            await self._refuse_caller(sock, "this relay has too many attempts under way")
        else:
            try:
                await self._connect_back(sock, address)
            finally:
                self._trying.leave_place(host=host)

    async def _connect_back(self, sock: socket.socket, address: str) -> None:
        try:
            with await dial(address, self.bounds.try_s), suppress(*STREAM_ERRORS):
                await send(sock, Tried(True))
                async with asyncio.timeout(self.bounds.try_s):
                    await receive(sock)  # keeps the connection open until the peer has noticed it and ends the stream
        except STREAM_ERRORS:
            await send(sock, Tried(False))

    async def _reserve(self, sock: socket.socket, host: str, key: PublicKey) -> None:
        """Keeps the reservation of an unreachable peer until the peer is silent."""
        before = self._reservations.pop(key.raw, None)
        if before is not None:
            before.task.cancel()
            await asyncio.wait([before.task])
        if not self._reserving.take_place(host=host):
            await self._refuse_caller(sock, "there is no room for another reservation")
            return
        task = asyncio.current_task()
        assert task is not None
        reservation = self._reservations[key.raw] = _Reservation(sock, key, task)
        try:
            self.events["reserved"] += 1
            await self._send_to_peer(reservation, Reserved())
            began, beats = time.monotonic(), 0
            while True:
                async with asyncio.timeout(self.bounds.silent_s):
                    await receive(sock, Beat)
                beats += 1
                if beats > self.bounds.beats + time.monotonic() - began:
                    raise ProtocolError("messages of the kind Beat come too fast")
                self._check_key(key)
                await self._send_to_peer(reservation, Beat())
        finally:
            self._reserving.leave_place(host=host)
            if self._reservations.get(key.raw) is reservation:
                del self._reservations[key.raw]

    async def _send_to_peer(self, reservation: _Reservation, message: Message) -> None:
        """Sends a message to an unreachable peer, and ends the reservation if the peer does not read it in time."""
        try:
            async with asyncio.timeout(self.bounds.join_s), reservation.writing:
                await send(reservation.sock, message)
        except TimeoutError:
            reservation.task.cancel()
            raise

    async def _call_peer(self, sock: socket.socket, host: str, seen: str, key: PublicKey, call: Call) -> None:
        reservation = self._reservations.get(call.key)
        if reservation is None:
            await self._refuse_caller(sock, "that peer has no reservation here")
            return
        names = {"key": key.raw, "host": host, "target": call.key}
        if not self.streams.take_place(**names):
            await self._refuse_caller(sock, "there is no room for another stream")
            return
        token, task = secrets.token_bytes(TOKEN_BYTES), asyncio.current_task()
        assert task is not None
        joined: asyncio.Future[tuple[socket.socket, str, str]] = asyncio.get_running_loop().create_future()
        waiting = self._waiting[token] = _WaitingCaller(key, task, reservation.key, joined)
        try:
            await self._send_to_peer(reservation, Called(token, key.raw, seen))
            try:
                async with asyncio.timeout(self.bounds.join_s):
                    other, other_seen, other_here = await waiting.joined
            except TimeoutError:
                await self._refuse_caller(sock, "that peer does not answer calls")
                return
            self.events["joined"] += 1
            await send(sock, Joined(token, seen, other_seen, other_here))
            await send(other, Joined(token, other_seen, seen, call.here))
            await self._splice(sock, other, call.key)
        finally:
            del self._waiting[token]
            waiting.over.set()
            self.streams.leave_place(**names)

    async def _join(self, sock: socket.socket, seen: str, key: PublicKey, join: Join) -> None:
        waiting = self._waiting.get(join.token)
        if waiting is None or waiting.target != key or waiting.joined.done():
            await self._refuse_caller(sock, "no caller waits for this answer")
            return
        waiting.joined.set_result((sock, seen, join.here))
        await waiting.over.wait()

    async def _splice(self, one: socket.socket, other: socket.socket, target: bytes) -> None:
        """Copies bytes in both directions until both have ended."""
        at = time.monotonic()

        def passed(size: int) -> float:
            nonlocal at
            self.passed_bytes += size
            at = time.monotonic()
            return self._rate.delay_s(target, size, at)

        async def one_way(source: socket.socket, drain: socket.socket) -> None:
            async def pick(_: int) -> socket.socket:
                return drain

            await copy(source, pick, passed)
            end(drain)

        copying = {asyncio.ensure_future(one_way(one, other)), asyncio.ensure_future(one_way(other, one))}
        left = set(copying)
        try:
            while left:
                limit_s = self.bounds.idle_s if len(left) == 2 else self.bounds.half_open_s
                idle_s = time.monotonic() - at
                if idle_s > limit_s:
                    raise TimeoutError("no bytes were received for too long")
                done, left = await asyncio.wait(
                    left, timeout=limit_s - idle_s + 0.01, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
        finally:
            await end_all(copying)

    async def _refuse_caller(self, sock: socket.socket, text: str) -> None:
        self.events["refused"] += 1
        with suppress(*STREAM_ERRORS):
            async with asyncio.timeout(1.0):
                await send(sock, Refused(text))


_REQUESTS: dict[StreamPurpose, type[Reserve | Call | Join | Try]] = {
    StreamPurpose.RESERVE: Reserve,
    StreamPurpose.CALL: Call,
    StreamPurpose.JOIN: Join,
    StreamPurpose.TRY: Try,
}
