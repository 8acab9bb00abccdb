"""Hole punching: a direct stream between two machines that a relay has joined.

Both sides connect from the port of their stream to the relay, and listen at this port: their routers have let packets
out from it, and pass packets back to it. If one side has no router, the other side can connect to it (a reversal). If
both have one, the SYN of each side opens a hole for the SYN of the other (Ford, Srisuresh and Kegel, 2005).

A symmetric router, which assigns another port to every connection, usually keeps a socket's port for its first
connection. So if the relay sees a side's port unchanged, this side also connects from the next two ports, and the other
side tries these ports.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

from splitnet.limits import Places
from splitnet.nat.relay_messages import Joined
from splitnet.nat.stream import STREAM_ERRORS, dial, end_all, listening
from splitnet.wire.endpoints import address_of, host_and_port, is_loopback

PUNCH_S = 3.0  # how long both sides try
GUESS_S = 0.5  # time after which guessed ports are tried, too; most routers need no guess
AT_ONCE, AT_ONCE_OF_HOST = 16, 8
"""Largest number of attempts of this process at the same time: to all hosts, and to one host. Relays name the
addresses, and a malicious relay must not direct a flood at a third party."""
_TRY_S, _PAUSE_S = 1.0, 0.1  # longest connection attempt; pause between two attempts
_ACCEPTED_AT_ONCE = 4  # largest number of handshakes of accepted connections at the same time
_places, _lock = Places(AT_ONCE, host=AT_ONCE_OF_HOST), threading.Lock()  # shared by all event loops of the process


class PathKind(StrEnum):
    """How a peer is reached."""

    DIRECT = "direct"
    RELAYED = "relayed"  # a relay passes bytes on
    REVERSED = "reversed"  # the peer has connected to the caller
    PUNCHED = "punched"  # through holes in routers


Claim = Callable[[], bool]  # True for the first caller: its stream is the one to use

Check = Callable[[socket.socket, Claim], Awaitable[None]]
"""Makes the handshake on a stream, and claims the stream before the last message. Raises STREAM_ERRORS."""


class ConnectAttempt(NamedTuple):
    """Two ends between which connections are attempted until one succeeds. The first attempt is `after_s` seconds after
    the start."""

    source: tuple[str, int]
    address: str
    after_s: float = 0.0


def attempts_of(own: str, joined: Joined) -> list[ConnectAttempt]:
    """The attempts to connect to the other side: to its address as the relay sees it, and if both sides are behind the
    same router, also to its address as the other side sees it. own: this side's end of the stream to the relay, as
    this side sees it."""
    host, port = host_and_port(own)
    found = [joined.seen]
    if joined.you and joined.seen and host_and_port(joined.you)[0] == host_and_port(joined.seen)[0]:
        found.insert(0, joined.here)
    found = [each for each in dict.fromkeys(found) if each and each != own and is_loopback(each) <= is_loopback(own)]
    tried = [ConnectAttempt((host, port), each) for each in found]
    if joined.seen not in found or joined.you == own or joined.seen == joined.here:  # one side has no router
        return tried
    other, seen = host_and_port(joined.seen)
    keeps, other_keeps = _keeps(joined.you, port), _keeps(joined.here, seen)
    if other_keeps:
        tried.append(ConnectAttempt((host, port), address_of((other, seen + 1)), GUESS_S))
    if keeps:
        tried.append(ConnectAttempt((host, port + 1), joined.seen, GUESS_S))
    if keeps and other_keeps:
        # This attempt uses a separate port on each side, because a router keeps only the port of a socket's first
        # connection.
        tried.append(ConnectAttempt((host, port + 2), address_of((other, seen + 2)), GUESS_S))
    return tried


def _keeps(address: str, port: int) -> bool:
    """Whether a router has left a port unchanged, and two higher ports exist."""
    return bool(address) and host_and_port(address)[1] == port <= 65533


async def punch(
    own: tuple[str, int], tried: Sequence[ConnectAttempt], check: Check
) -> tuple[socket.socket, PathKind] | None:
    """Returns the first stream that passes the check, or None if no stream passes in time. Raises no network errors.
    own: host and port of this side's end of the stream to the relay."""
    found: asyncio.Future[tuple[socket.socket, PathKind]] = asyncio.get_running_loop().create_future()
    taken = False

    def claim() -> bool:
        nonlocal taken
        free, taken = not taken, True
        return free

    async def meet(sock: socket.socket, path_kind: PathKind) -> None:
        try:
            async with asyncio.timeout(_TRY_S):
                await check(sock, claim)
            found.set_result((sock, path_kind))
        except BaseException as error:
            sock.close()
            if not isinstance(error, STREAM_ERRORS):
                raise

    async def connect(line: ConnectAttempt) -> None:
        await asyncio.sleep(line.after_s)
        while True:
            with suppress(OSError, TimeoutError):
                await meet(await dial(line.address, _TRY_S, source=line.source), PathKind.PUNCHED)
            await asyncio.sleep(_PAUSE_S)

    async def accept() -> None:
        loop, hosts = asyncio.get_running_loop(), {host_and_port(line.address)[0] for line in tried}
        running: set[asyncio.Task[None]] = set()
        try:
            with listening(address_of(own), again=True) as listener:
                while True:
                    await asyncio.sleep(0)  # so that a flood of connections does not block the event loop
                    sock, name = await loop.sock_accept(listener)
                    if host_and_port(address_of(name))[0] not in hosts or len(running) >= _ACCEPTED_AT_ONCE:
                        sock.close()
                        continue
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    task = loop.create_task(meet(sock, PathKind.REVERSED))
                    running.add(task)
                    task.add_done_callback(running.discard)
        except OSError:  # this process cannot listen at the port
            return
        finally:
            await end_all(running)

    if PUNCH_S <= 0 or not tried:
        return None
    host = host_and_port(tried[0].address)[0]
    with _lock:
        if not _places.take_place(host=host):
            return None
    tasks = [asyncio.ensure_future(accept()), *(asyncio.ensure_future(connect(line)) for line in tried)]
    result: tuple[socket.socket, PathKind] | None = None
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(PUNCH_S):
                result = await asyncio.shield(found)
    finally:
        with _lock:
            _places.leave_place(host=host)
        await end_all(tasks)
        if result is None and found.done():
            found.result()[0].close()
    return result
