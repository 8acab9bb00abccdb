"""TCP streams of relays and tunnels, which carry messages first and copied bytes afterwards, and their event loop.

Streams are plain non-blocking sockets, so that a port can be bound twice (for hole punching), a stream can be closed in
one direction, and a copy needs one buffer of known size.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from splitnet.errors import KeyFileError, NotAuthorized, ProtocolError, SplitnetError
from splitnet.nat.relay_messages import (
    LENGTH_BYTES,
    MAX_MESSAGE_BYTES,
    NONCE_BYTES,
    VERSION,
    Hello,
    Message,
    Proof,
    Refused,
    StreamPurpose,
    Welcome,
    pack,
    unpack,
)
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.endpoints import host_and_port

_DIALER, _LISTENER = b"d", b"l"


class Dialing:
    """The handshake of the side that connects. expected: the key that the other side must prove. token: the token of
    the call to which the stream belongs; empty: none."""

    def __init__(self, identity: Identity, expected: PublicKey, purpose: StreamPurpose, token: bytes = b"") -> None:
        self._identity = identity
        self._expected = expected
        self._token = token
        self.hello = Hello(VERSION, purpose, identity.public.raw, secrets.token_bytes(NONCE_BYTES))

    def prove(self, welcome: Welcome) -> Proof:
        """The answer to the other side's `Welcome`. Raises NotAuthorized: the other side does not prove the expected
        key."""
        if welcome.key != self._expected.raw:
            raise NotAuthorized("another key than expected answers at the other end of a stream")
        if not self._expected.verify(_signed(_LISTENER, self.hello, welcome, self._token), welcome.signature):
            raise NotAuthorized("the other end of a stream does not have the key that it shows")
        return Proof(self._identity.sign(_signed(_DIALER, self.hello, welcome, self._token)))


class AcceptedStream:
    """The handshake of the side that was connected to, from `hello` on. key, purpose: those of the other side; they are
    proven after `check_proof`. Raises ProtocolError: `hello` has another version, or is malformed."""

    def __init__(self, identity: Identity, hello: Hello, token: bytes = b"") -> None:
        if hello.version != VERSION:
            raise ProtocolError(f"streams of version {hello.version} are not supported, only {VERSION}")
        try:
            self.key, self.purpose = PublicKey(hello.key), StreamPurpose(hello.purpose)
        except (KeyFileError, ValueError) as error:
            raise ProtocolError(f"the first message of a stream is not valid: {error}") from None
        self._hello = hello
        self._token = token
        unsigned = Welcome(identity.public.raw, secrets.token_bytes(NONCE_BYTES), b"")
        signature = identity.sign(_signed(_LISTENER, hello, unsigned, token))
        self.welcome = Welcome(unsigned.key, unsigned.nonce, signature)

    def check_proof(self, proof: Proof) -> None:
        """Raises NotAuthorized: the other side does not have the key that it shows."""
        if not self.key.verify(_signed(_DIALER, self._hello, self.welcome, self._token), proof.signature):
            raise NotAuthorized("the other end of a stream does not have the key that it shows")


def _signed(side: bytes, hello: Hello, welcome: Welcome, token: bytes) -> bytes:
    parts = (side, hello.key, welcome.key, hello.nonce, welcome.nonce, token)
    return b"".join((b"splitnet way\0", bytes((hello.version, hello.purpose)), *parts))


T = TypeVar("T")

BACKLOG = 128  # connections that wait to be accepted
LEAST_BUFFER, MOST_BUFFER = 16 << 10, 128 << 10
"""Smallest and largest size in bytes of the buffer for one direction of a copy. It grows while reads fill it."""

STREAM_ERRORS = (OSError, EOFError, TimeoutError, SplitnetError)
"""Errors of a stream that the network or the other side causes."""


class RefusedError(SplitnetError):
    """The other side of a stream has refused a request."""


def bind_socket(name: tuple[str, int], *, again: bool = True) -> socket.socket:
    """A socket that is bound to an IP and a port. again: other sockets of this process may bind the same port."""
    sock = socket.socket(socket.AF_INET6 if ":" in name[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if again or sys.platform != "win32":  # on Unix, a port otherwise stays in use for a minute after its last use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if again and hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(name)
    except BaseException:
        sock.close()
        raise
    return sock


def listening(address: str, *, again: bool = False) -> socket.socket:
    """A socket that listens at `tcp://IP:port`. Raises OSError."""
    sock = bind_socket(host_and_port(address), again=again)
    sock.listen(BACKLOG)
    return sock


async def dial(address: str, timeout_s: float, *, source: tuple[str, int] | None = None) -> socket.socket:
    """Connects to `tcp://IP:port`. source: host and port to connect from; None: any. Raises OSError: no listener;
    TimeoutError: no listener and no error reply."""
    name = host_and_port(address)
    sock = bind_socket(source or ("::" if ":" in name[0] else "0.0.0.0", 0))
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, name)
    except BaseException:
        sock.close()
        raise
    return sock


async def send(sock: socket.socket, *messages: Message) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, b"".join(map(pack, messages)))


async def receive(sock: socket.socket, *kinds: type[T]) -> T:
    """Reads the next message, which must be of one of `kinds`, and no byte after it. Raises EOFError: the stream has
    ended; RefusedError: the other side refuses; ProtocolError: the message is of another kind, or malformed."""
    size = int.from_bytes(await _exactly(sock, LENGTH_BYTES), "big")
    if not 0 < size <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of a stream has at most {MAX_MESSAGE_BYTES} bytes, not {size}")
    message = unpack(await _exactly(sock, size))
    await asyncio.sleep(0)  # reads of received bytes do not yield, so a flood would block the event loop
    if isinstance(message, kinds):
        return message
    if isinstance(message, Refused):
        raise RefusedError(message.text)
    raise ProtocolError(f"expected {kinds[0].__name__}, not {type(message).__name__}")


async def _exactly(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(sock, size - len(data))
        if not more:
            raise EOFError("a stream has ended")
        data += more
    return data


async def begin_handshake(
    sock: socket.socket, identity: Identity, expected: PublicKey, purpose: StreamPurpose, token: bytes = b""
) -> Proof:
    """The handshake of the side that connects. Returns its last message, which the caller must send. Raises
    STREAM_ERRORS."""
    dialing = Dialing(identity, expected, purpose, token)
    await send(sock, dialing.hello)
    return dialing.prove(await receive(sock, Welcome))


async def begin_stream(
    sock: socket.socket, identity: Identity, key: PublicKey, purpose: StreamPurpose, *after: Message, token: bytes = b""
) -> None:
    """The whole handshake of the side that connects to `key`, then the messages `after`. Raises STREAM_ERRORS."""
    await send(sock, await begin_handshake(sock, identity, key, purpose, token), *after)


async def answer_handshake(
    sock: socket.socket, identity: Identity, token: bytes = b"", only: bytes | None = None
) -> AcceptedStream:
    """The handshake of the side that was connected to. Raises STREAM_ERRORS. only: the key that the other side must
    have; None: any."""
    answering = AcceptedStream(identity, await receive(sock, Hello), token)
    if only is not None and answering.key.raw != only:
        raise NotAuthorized("another key than expected answers at the other end of a stream")
    await send(sock, answering.welcome)
    answering.check_proof(await receive(sock, Proof))
    return answering


async def copy(
    source: socket.socket,
    pick: Callable[[int], Awaitable[socket.socket]],
    passed: Callable[[int], float] = lambda _: 0.0,
) -> int:
    """Copies bytes until `source` ends; returns how many.

    pick: takes the number of bytes copied so far, and returns the socket for the next bytes. passed: takes the number
    of bytes just copied, and returns how many seconds to wait.
    """
    loop = asyncio.get_running_loop()
    buffer, done = memoryview(bytearray(LEAST_BUFFER)), 0
    while size := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(await pick(done), buffer[:size])
        done += size
        if size == len(buffer) < MOST_BUFFER:
            buffer = memoryview(bytearray(2 * size))
        await asyncio.sleep(passed(size))  # also for 0 s, so that a fast sender does not block the event loop
    return done


def end(sock: socket.socket) -> None:
    """Ends this side's direction of a stream."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


async def end_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks, and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


COPYING_TASK = "carrying"  # name of tasks that copy bytes until one side ends
LINGER_S = 0.5  # how long tasks named `COPYING_TASK` may run on when the loop closes
END_S = 5.0  # longest wait for a cancelled task


class StreamLoop:
    """The event loop of all streams of a process, in its own thread, which starts with the first coroutine and ends
    with `close`. Thread-safe."""

    def __init__(self) -> None:
        self._loop: asyncio.SelectorEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine. If the loop is closed, the future is cancelled."""
        with self._lock:
            if self._closed:
                coroutine.close()
                cancelled: Future[T] = Future()
                cancelled.cancel()
                return cancelled
            if self._loop is None:
                self._loop = asyncio.SelectorEventLoop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="splitnet-ways", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
        """Runs a coroutine as a task, to be ended by `end`. None: the loop is closed."""
        with suppress(CancelledError):
            return self.run(_begun(coroutine)).result()
        coroutine.close()
        return None

    def cancel_task(self, task: asyncio.Task[Any]) -> None:
        """Cancels a task, and waits at most `END_S` until it has ended."""
        with suppress(CancelledError, TimeoutError):  # the loop has ended, and its tasks with it
            self.run(_ended(task)).result(END_S)

    def close(self) -> None:
        """Cancels all tasks (tasks that copy bytes after `LINGER_S`), and ends the thread. May be called twice."""
        with self._lock:
            already, self._closed = self._closed, True
        if self._loop is not None and self._thread is not None and not already:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


async def _begun(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.get_running_loop().create_task(coroutine)


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _run(loop: asyncio.SelectorEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        carrying = [task for task in asyncio.all_tasks(loop) if task.get_name() == COPYING_TASK]
        if carrying:
            loop.run_until_complete(asyncio.wait(carrying, timeout=LINGER_S))
        loop.run_until_complete(end_all(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
