"""Attacks of strangers on a relay of the tests, each for `seconds`, and attacks of relays on unreachable peers.

Strangers connect from 127.0.0.2, so that members on this machine do not share the limits of the strangers' host.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import queue
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection

import psutil

from splitnet.nat.relay import RelayServer
from splitnet.nat.relay_messages import (
    LENGTH_BYTES,
    Beat,
    Call,
    Called,
    Join,
    Joined,
    Message,
    Reserve,
    Reserved,
    StreamPurpose,
    Welcome,
    pack,
    unpack,
)
from splitnet.nat.stream import Dialing, StreamLoop, send
from splitnet.nat.tunnel import Tunnels
from splitnet.nat.unreachable import STREAMS_OF_HOST, UnreachablePeer
from splitnet.security.identity import Identity, PublicKey
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Endpoint, Relay, host_and_port
from tests.attacks.transport import in_background

SOURCE = "127.0.0.2"
CROWD = 300
"""The number of concurrent connections of an attack."""
STREAMS = 40
"""A number of streams that is larger than what a relay joins for one key or one host."""
CHUNK = bytes(1 << 16)
WAIT_S = 2.0
ANSWER_S = 60.0
"""Seconds to wait for an answer while the unreachable peer looks for the only honest relay."""
_ANY_PORT = "tcp://127.0.0.1:0"


class Stream:
    """A blocking stream to a relay that can send any messages."""

    def __init__(self, relay: Relay, identity: Identity | None = None) -> None:
        self.identity = identity or Identity.generate()
        self.relay = relay
        self.sock = socket.create_connection(host_and_port(relay.address), WAIT_S, (SOURCE, 0))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, purpose: StreamPurpose, message: Message) -> Message:
        """Proves the key, sends a message, and returns the answer. Raises OSError or EOFError if the connection
        ends."""
        dialing = Dialing(self.identity, PublicKey(self.relay.key), purpose)
        self.sock.sendall(pack(dialing.hello))
        welcome = self.hear()
        assert isinstance(welcome, Welcome)
        self.sock.sendall(pack(dialing.prove(welcome)) + pack(message))
        return self.hear()

    def hear(self) -> Message:
        return unpack(self._exactly(int.from_bytes(self._exactly(LENGTH_BYTES), "big")))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def silence(relay: Relay, seconds: float) -> None:
    """Opens connections that send nothing or too little, and replaces connections that the relay ends."""
    until = time.monotonic() + seconds
    crowd: list[socket.socket] = []
    while time.monotonic() < until:
        with suppress(OSError):
            crowd.append(socket.create_connection(host_and_port(relay.address), WAIT_S, (SOURCE, 0)))
            crowd[-1].send(b"\0\x40\x00"[: len(crowd) % 4])
        if len(crowd) >= CROWD:
            crowd.pop(0).close()
    for sock in crowd:
        sock.close()


def strangers(relay: Relay, seconds: float) -> None:
    """Reserves with new keys, keeps reservations as long as the relay allows, and calls peers that do not exist."""
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        while time.monotonic() < until:
            for purpose, message in ((StreamPurpose.RESERVE, Reserve()), (StreamPurpose.CALL, Call(bytes(32), ""))):
                with suppress(OSError, EOFError):
                    stream = Stream(relay)
                    stream.ask(purpose, message)
                    stack.enter_context(stream)
            if time.monotonic() % 1 < 0.1:
                stack.close()


def beats(relay: Relay, seconds: float) -> None:
    """Sends `Beat` messages as fast as possible, over all reservations that one host may have."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError, EOFError), Stream(relay) as stream:
            stream.ask(StreamPurpose.RESERVE, Reserve())
            while time.monotonic() < until:
                stream.sock.sendall(pack(Beat()) * 1000)


def flood(relay: Relay, seconds: float) -> None:
    """Opens all streams that one key may have, to itself, and sends bytes over all of them as fast as possible."""
    until = time.monotonic() + seconds
    with _joined(relay, until) as ends:
        for sock in ends:
            sock.setblocking(False)
        while ends and time.monotonic() < until:
            readable, writable, _ = select.select(ends, ends, [], 0.1)
            for sock in readable:
                with suppress(OSError):
                    if not sock.recv(1 << 20):
                        ends.remove(sock)
            for sock in writable:
                with suppress(OSError):
                    sock.send(CHUNK)


def unread(relay: Relay, seconds: float) -> None:
    """Opens all streams that one key may have, without reading from them, and ends one direction of every second
    one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with _joined(relay, until) as ends:
            for number, sock in enumerate(ends):
                sock.setblocking(False)
                with suppress(OSError):
                    if number % 2:
                        sock.shutdown(socket.SHUT_WR)
            at = time.monotonic()
            while ends and time.monotonic() < min(until, at + 12.0):
                _, writable, _ = select.select([], ends[::2], [], 0.1)
                for sock in writable:
                    with suppress(OSError):
                        sock.send(CHUNK)
                time.sleep(0.01)


@contextmanager
def _joined(relay: Relay, until: float) -> Iterator[list[socket.socket]]:
    """Yields both ends of as many streams as the relay joins."""
    hidden = Identity.generate()
    with ExitStack() as stack:
        ends: list[socket.socket] = []
        try:
            reserved = stack.enter_context(Stream(relay, hidden))
            reserved.ask(StreamPurpose.RESERVE, Reserve())
            for _ in range(STREAMS):
                caller = stack.enter_context(Stream(relay))
                dialing = Dialing(caller.identity, PublicKey(relay.key), StreamPurpose.CALL)
                caller.sock.sendall(pack(dialing.hello))
                welcome = caller.hear()
                assert isinstance(welcome, Welcome)
                caller.sock.sendall(pack(dialing.prove(welcome)) + pack(Call(hidden.public.raw, "")))
                called = reserved.hear()
                assert isinstance(called, Called)
                answering = stack.enter_context(Stream(relay, hidden))
                if not isinstance(answering.ask(StreamPurpose.JOIN, Join(called.token, "")), Joined):
                    break
                caller.hear()
                ends += [caller.sock, answering.sock]
        except (OSError, EOFError, AssertionError):  # the relay joins no more streams
            pass
        yield ends


class TakesNoCalls(RelayServer):
    """A relay that accepts every reservation, answers `Beat` messages, and passes on no calls."""

    async def _call_peer(self, sock: socket.socket, host: str, seen: str, key: PublicKey, call: Call) -> None:
        await self._refuse_caller(sock, "busy")


class Floods(RelayServer):
    """A relay that reports calls without end, as fast as the peer reads them, and keeps callers waiting."""

    said = b"".join(pack(Called(bytes([index]) * 16, bytes([index]) * 32, "")) for index in range(200))

    async def _reserve(self, sock: socket.socket, host: str, key: PublicKey) -> None:
        await send(sock, Reserved())
        while True:
            await asyncio.get_running_loop().sock_sendall(sock, self.said)
            await asyncio.sleep(0)

    async def _call_peer(self, sock: socket.socket, host: str, seen: str, key: PublicKey, call: Call) -> None:
        await asyncio.Event().wait()


class Drops(RelayServer):
    """A relay that ends every reservation."""

    async def _reserve(self, sock: socket.socket, host: str, key: PublicKey) -> None:
        self.events["reserved"] += 1
        await send(sock, Reserved())


HOSTILE = {kind.__name__: kind for kind in (TakesNoCalls, Floods, Drops)}
HELPERS = 8
MOST_MIB, MOST_DESCRIPTORS = 64, STREAMS_OF_HOST + 64
"""Growth allowed for an unreachable peer, its caller and an honest relay, in one process. Calls that relays invent name
no host, so the peer answers as many of them at once as calls of one host, with one connection each."""


def hostile_helpers(kind: str, seconds: float) -> int:
    """Runs an unreachable peer that finds hostile relays and one honest relay. Returns how often the peer has answered
    a caller."""
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    here, there = multiprocessing.get_context("spawn").Pipe()
    with in_background(_be_hostile, there, kind), ExitStack() as stack:
        found: list[Relay] = here.recv()
        identity, own = Identity.generate(), Identity.generate()
        ways, own_ways = Tunnels(identity), Tunnels(own)
        peer = Transport(
            identity, on_message=lambda source, frames: peer.send(source, frames), listen=_ANY_PORT, tunnels=ways
        )
        caller = Transport(own, on_message=lambda _, frames: heard.put(bytes(frames[0])), tunnels=own_ways)
        for transport in (peer, caller):
            stack.callback(transport.close)
            transport.start()
        helper = RelayServer(own_ways.loop, Identity.generate(), _ANY_PORT)
        stack.callback(helper.close)
        helper.start()
        found.append(helper.relay_at("127.0.0.1"))
        inside = f"tcp://127.0.0.1:{peer.port}"
        hidden = UnreachablePeer(ways.loop, identity, inside, ways.behind, lambda: found, lambda: None)
        stack.callback(hidden.stop_relaying)
        process = psutil.Process()
        before = process.memory_info().rss, process.num_fds()
        hidden.start()
        endpoint = Endpoint("tcp://127.0.0.1:9", identity.public, (found[-1],))
        until, answered = math.inf, 0
        while answered < 10 or time.monotonic() < until:
            caller.send(endpoint, [b"%d" % answered])
            assert heard.get(timeout=ANSWER_S) == b"%d" % answered
            answered += 1
            until = min(until, time.monotonic() + seconds)
            grown = process.memory_info().rss - before[0], process.num_fds() - before[1]
            assert grown[0] < MOST_MIB << 20 and grown[1] < MOST_DESCRIPTORS, grown
            time.sleep(0.02)
        return answered


def _be_hostile(pipe: Connection, kind: str) -> None:
    loop = StreamLoop()
    helpers = [HOSTILE[kind](loop, Identity.generate(), _ANY_PORT) for _ in range(HELPERS)]
    for helper in helpers:
        helper.start()
    pipe.send([helper.relay_at("127.0.0.1") for helper in helpers])
    with suppress(EOFError):
        pipe.recv()


ATTACKS = {attack.__name__: attack for attack in (silence, strangers, beats, flood, unread)}
