"""The caller's end of tunnels to unreachable peers: ZeroMQ connects to a loopback port of the tunnel."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from splitnet.errors import ProtocolError
from splitnet.nat.punch import Claim, PathKind, attempts_of, punch
from splitnet.nat.relay_messages import Call, Joined, Moved, StreamPurpose
from splitnet.nat.stream import (
    COPYING_TASK,
    STREAM_ERRORS,
    RefusedError,
    StreamLoop,
    begin_handshake,
    begin_stream,
    copy,
    dial,
    end,
    end_all,
    listening,
    receive,
    send,
)
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.endpoints import Endpoint, Relay, address_of, is_global

_LAST_BYTES_S = 1.0  # how long one direction may run on when the other has ended

Better = asyncio.Task[tuple[socket.socket, PathKind] | None]


async def join(inner: socket.socket, outer: socket.socket, better: Better, moved: Callable[[PathKind], None]) -> None:
    """Copies bytes in both directions until one side ends. Closes only the stream of the better way. Raises
    STREAM_ERRORS.

    inner: the stream to ZeroMQ. outer: the stream to the other side, through a relay. better: finds a better way or
    None, and is cancelled at the end. moved: called when bytes begin to use the better way.
    """
    stream = outer

    async def pick(sent: int) -> socket.socket:
        nonlocal stream
        if stream is outer and better.done() and not better.cancelled() and (found := better.result()):
            await send(found[0], Moved(sent))
            end(outer)
            stream = found[0]
            moved(found[1])
        return stream

    async def to_inner(_: int) -> socket.socket:
        return inner

    async def outward() -> None:
        await copy(inner, pick)
        end(stream)

    async def inward() -> None:
        got = await copy(outer, to_inner)
        found = await asyncio.shield(better)
        if found is not None:
            if (await receive(found[0], Moved)).sent != got:
                raise ProtocolError("bytes were lost between two ways")
            await copy(found[0], to_inner)
        end(inner)

    copying = [asyncio.ensure_future(outward()), asyncio.ensure_future(inward())]
    try:
        done, left = await asyncio.wait(copying, return_when=asyncio.FIRST_COMPLETED)
        if left and all(task.exception() is None for task in done):
            await asyncio.wait(left, timeout=_LAST_BYTES_S)
        for task in copying:
            if task.done():
                task.result()
    finally:
        await end_all(copying)
        give_up(better)


def give_up(better: Better | None) -> None:
    """Ends the search for a better way, and closes the stream of a better way that was found."""
    if better is None:
        return
    if not better.done():
        better.cancel()
    elif not better.cancelled() and better.exception() is None and (found := better.result()):
        found[0].close()


log = logging.getLogger(__name__)

DIAL_S = 3.0  # longest wait for a connection to a relay
STRAIGHT_S, STRAIGHT_AGAIN_S = 0.5, 60.0
"""How long the peer's own address is tried before relays are asked; how long it is not tried after a failure."""
CALL_S = 6.0  # longest wait until a relay has joined caller and peer
KNOWN_RELAYS = 8  # largest number of known relays of one peer; the latest are kept
FIRST_PAUSE_S, MOST_PAUSE_S = 0.2, 5.0  # between two rounds of calls if no connection lasted for `WORKED_S`
WORKED_S = 1.0
END_S = 1.0  # how long the last connection of a closed tunnel may run on


class Tunnels:
    """All tunnels of a process. Thread-safe, and no call waits for the network. Tunnels run in `loop`, and end with it.
    behind: maps the host and port of a connection that a tunnel has made to this machine to a name of its far end."""

    def __init__(self, identity: Identity) -> None:
        self.loop = StreamLoop()
        self.behind: dict[tuple[str, int], str] = {}
        self._identity = identity
        self._tunnels: dict[Endpoint, _Tunnel] = {}
        self._lock = threading.Lock()

    def open_tunnel(self, endpoint: Endpoint) -> str:
        """Opens a tunnel to an unreachable peer. Returns its loopback address, `tcp://IP:port`, which is valid until
        `close`. Raises OSError: no loopback port is free."""
        with self._lock:
            tunnel = self._tunnels.get(endpoint)
            if tunnel is None:
                tunnel = self._tunnels[endpoint] = _Tunnel(self._identity, endpoint)
                self.loop.run(tunnel.serve_connections())
            return tunnel.address

    def learn(self, endpoint: Endpoint) -> None:
        """Adds relays of the endpoint to its tunnel."""
        tunnel = self._tunnels.get(endpoint)
        if tunnel is not None:
            tunnel.learn(endpoint.relays)

    def close_tunnel(self, endpoint: Endpoint) -> None:
        """Ends a tunnel, and after `END_S` its connection if ZeroMQ has not ended it."""
        with self._lock:
            tunnel = self._tunnels.pop(endpoint, None)
        if tunnel is not None:
            self.loop.run(tunnel.end_tunnel())

    def path_kind(self, endpoint: Endpoint) -> PathKind:
        """The way by which a peer is reached, or would be reached."""
        tunnel = self._tunnels.get(endpoint)
        if tunnel is not None:
            return tunnel.path_kind
        return PathKind.RELAYED if endpoint.hidden else PathKind.DIRECT


class _Tunnel:
    def __init__(self, identity: Identity, endpoint: Endpoint) -> None:
        self._identity = identity
        self._key: PublicKey = endpoint.key
        self._relays: dict[Relay, float] = {}  # time of the last failure; 0: it has not failed since it last worked
        self._listener = listening("tcp://127.0.0.1:0")
        self.address = address_of(self._listener.getsockname())
        self._ended = asyncio.Event()
        # The address may be a port of the peer's router, which machines behind the same router may not reach.
        self._straight = endpoint.address if is_global(endpoint.address) else None
        self._straight_at = 0.0
        self.path_kind = PathKind.RELAYED
        self.learn(endpoint.relays)

    def learn(self, relays: tuple[Relay, ...]) -> None:
        known = self._relays
        if any(relay not in known for relay in relays):
            # Replaced in one step, because the loop's thread reads it.
            merged = {relay: known.get(relay, 0.0) for relay in (*relays, *known)}
            self._relays = dict(list(merged.items())[:KNOWN_RELAYS])

    async def end_tunnel(self) -> None:
        self._ended.set()

    async def serve_connections(self) -> None:
        """Accepts ZeroMQ's connections one after the other and carries their bytes, until `end`."""
        loop = asyncio.get_running_loop()
        pause_s, over_at = 0.0, 0.0
        ended = loop.create_task(self._ended.wait())
        carrying: asyncio.Task[bool] | None = None
        with self._listener:
            while True:
                accepting = loop.create_task(loop.sock_accept(self._listener))
                await asyncio.wait([accepting, ended], return_when=asyncio.FIRST_COMPLETED)
                if ended.done() and not accepting.done():
                    accepting.cancel()
                    await asyncio.wait([accepting])  # the listener is watched until then
                    break
                inner, _ = accepting.result()
                with suppress(OSError):  # the connection has ended already
                    inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if carrying is not None:  # ZeroMQ uses one connection at a time, so the former one is given up
                    over_at = time.monotonic()
                    carrying.cancel()
                    (worked,) = await asyncio.gather(carrying, return_exceptions=True)
                    pause_s = 0.0 if worked is True else min(max(2 * pause_s, FIRST_PAUSE_S), MOST_PAUSE_S)
                carrying = loop.create_task(self._carry(inner, over_at + pause_s), name=COPYING_TASK)
        if carrying is not None:
            await asyncio.wait([carrying], timeout=END_S)
            carrying.cancel()

    async def _carry(self, inner: socket.socket, begin_at: float) -> bool:
        """Carries the bytes of one connection; returns whether it lasted for `WORKED_S`."""
        with inner:
            await asyncio.sleep(max(0.0, begin_at - time.monotonic()))
            if self._straight is not None and time.monotonic() >= self._straight_at:
                self._straight_at = time.monotonic() + STRAIGHT_AGAIN_S
                began = await self._carry_straight(inner, self._straight)
                if began is not None:
                    worked = time.monotonic() - began > WORKED_S
                    self._straight_at *= not worked
                    return worked
            # Relays that have not failed come first, in random order, then the others by the time of their failure.
            relays = list(self._relays)
            random.shuffle(relays)
            for relay in sorted(relays, key=lambda relay: self._relays.get(relay, 0.0)):
                try:
                    outer, better = await self._call_through(relay)
                except STREAM_ERRORS as error:
                    log.info("%s is not reached through %s: %s", self._key, relay.address, error or "no answer")
                    self._relays[relay] = time.monotonic()
                    continue
                self._relays[relay] = 0.0
                self.path_kind, began = PathKind.RELAYED, time.monotonic()
                with outer, suppress(*STREAM_ERRORS):
                    await join(inner, outer, better, self._moved)
                return time.monotonic() - began > WORKED_S
            return False

    async def _carry_straight(self, inner: socket.socket, address: str) -> float | None:
        """Carries the bytes by the peer's own address. Returns the time of the connection; None: it failed."""
        try:
            outer = await dial(address, STRAIGHT_S)
        except STREAM_ERRORS:
            return None
        began = time.monotonic()
        with outer, suppress(*STREAM_ERRORS):
            self.path_kind = PathKind.DIRECT
            await join(inner, outer, asyncio.ensure_future(asyncio.sleep(0.0, None)), self._moved)
        return began

    async def _call_through(self, relay: Relay) -> tuple[socket.socket, Better]:
        """A stream to the peer through a relay, and the search for a better way."""
        better: Better | None = None
        sock = await dial(relay.address, DIAL_S)
        try:
            async with asyncio.timeout(CALL_S):
                own = sock.getsockname()[:2]
                call = Call(self._key.raw, address_of(own))
                await begin_stream(sock, self._identity, PublicKey(relay.key), StreamPurpose.CALL, call)
                joined = await receive(sock, Joined)
                better = asyncio.ensure_future(
                    punch(own, attempts_of(address_of(own), joined), partial(self._check_stream, joined.token))
                )
                await begin_stream(sock, self._identity, self._key, StreamPurpose.TUNNEL, token=joined.token)
            return sock, better
        except BaseException:
            give_up(better)
            sock.close()
            raise

    async def _check_stream(self, token: bytes, sock: socket.socket, claim: Claim) -> None:
        proof = await begin_handshake(sock, self._identity, self._key, StreamPurpose.MOVE, token)
        if not claim():
            raise RefusedError("another stream was faster")
        await send(sock, proof)

    def _moved(self, path_kind: PathKind) -> None:
        self.path_kind = path_kind
        log.info("%s is reached without a relay: %s", self._key, path_kind.value)
