"""Attacks of a stranger with a socket on a peer of the tests, each for `seconds`.

Each function takes the endpoint of the peer, and runs in a separate process (`in_background`), so that the cost of the
attack is not counted as the peer's.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import zmq

from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Chunk, Message, Open, Opened, Ping, Pong, Step, decode, encode

FRAME_BYTES = 1 << 20
ANSWER_S = 20.0
_HANDSHAKE_S = 9.0
"""A little less than the time that a peer waits for a handshake, in seconds."""


class Client:
    """A client with an authorized key that can send any frames.

    context: stays open; None: a context of this client alone. libzmq aborts the process if a new context cannot open
    its files.
    """

    def __init__(
        self,
        peer: Endpoint,
        identity: Identity | None = None,
        *,
        queue: int = 1000,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.identity = identity or Identity.generate()
        self._context: zmq.Context[zmq.Socket[bytes]] = context or zmq.Context()
        self._owns_context = context is None
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.curve_publickey = self.identity.curve_public
        self.socket.curve_secretkey = self.identity.curve_secret
        self.socket.curve_serverkey = peer.key.curve
        self.socket.linger = 0
        self.socket.sndhwm, self.socket.rcvhwm = 0, queue
        self.socket.connect(peer.address)
        self._nonce = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close(linger=0)
        if self._owns_context:
            self._context.destroy(linger=0)

    def say(self, *messages: Message) -> None:
        """Sends messages. Raises TimeoutError if the peer has refused the key."""
        for message in messages:
            try:
                # This call blocks only if the connection is gone, and would then wait forever.
                self.socket.send_multipart([bytes(frame) for frame in encode(message)], zmq.NOBLOCK)
            except zmq.Again:
                raise TimeoutError("the peer accepts no connection of this key") from None

    def hear(self, kind: type[Message] | None = None, timeout_s: float = ANSWER_S) -> Any:
        """The next message (of `kind`, if given). Raises TimeoutError if there is none in time."""
        deadline = time.monotonic() + timeout_s
        while self.socket.poll(max(0, round(1000 * (deadline - time.monotonic())))):
            message = decode(self.socket.recv_multipart())
            if kind is None or isinstance(message, kind):
                return message
        raise TimeoutError("the peer does not answer")

    def ping(self, timeout_s: float = ANSWER_S) -> float:
        """Seconds until a ping is answered. Raises TimeoutError if there is no answer in time."""
        self._nonce += 1
        began = time.monotonic()
        self.say(Ping(self._nonce))
        while self.hear(Pong, timeout_s).nonce != self._nonce:
            pass
        return time.monotonic() - began


def endless_message(peer: Endpoint, *, seconds: float, frames: int = 1500) -> None:
    """Sends messages of many frames, each frame within the size limit of a frame."""
    frame = bytes(FRAME_BYTES)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with Client(peer) as client:
            client.ping()
            client.socket.send_multipart([frame] * frames, copy=False)
            while time.monotonic() < deadline:
                try:
                    client.ping(1.0)
                    break
                except TimeoutError:
                    pass


def silent_connections(peer: Endpoint, *, seconds: float, connections: int = 600) -> None:
    """Opens TCP connections that send nothing, as many as the peer allows, and replaces the connections that the peer
    ends."""
    host, _, port = peer.address.removeprefix("tcp://").rpartition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with ExitStack() as stack:
            for _ in range(connections):
                try:
                    stack.enter_context(socket.create_connection((host.strip("[]"), int(port)), 1.0))
                except OSError:
                    break
            time.sleep(min(_HANDSHAKE_S, max(0.0, deadline - time.monotonic())))


def connections_of_one_key(peer: Endpoint, *, seconds: float, connections: int = 300) -> None:
    """Opens many connections of one key, half of which send a message from time to time."""
    identity = Identity.generate()
    deadline = time.monotonic() + seconds
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.max_sockets = connections + 8
    handles: list[zmq.Socket[bytes]] = []
    try:
        for _ in range(connections):
            handle = context.socket(zmq.DEALER)
            handle.curve_publickey, handle.curve_secretkey = identity.curve_public, identity.curve_secret
            handle.curve_serverkey = peer.key.curve
            handle.linger = 0
            handle.reconnect_ivl = 1000
            handle.connect(peer.address)
            handles.append(handle)
        while time.monotonic() < deadline:
            for handle in handles[::2]:
                handle.send_multipart(encode(Ping(1)))
            time.sleep(0.5)
    finally:
        context.destroy(linger=0)


def unread_answers(
    peer: Endpoint, *, seconds: float, model: str, blocks: int, hidden: int, connections: int = 4
) -> None:
    """Sends steps that request the outputs of all positions, from clients that do not read the outputs."""
    positions = (60 << 10) // (4 * hidden)
    payload = bytes(4 * hidden * positions)
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(peer, queue=1)) for _ in range(connections)]
        for number, client in enumerate(clients):
            client.say(Open(bytes([number]) * 16, 1, model, 0, blocks, positions, 0, b"", b"", ""))
        step = 0
        while time.monotonic() < deadline:
            step += 1
            for number, client in enumerate(clients):
                part = Chunk(1, 0, positions, positions)
                client.say(Step(bytes([number]) * 16, 1, step, (part,), None, 0, 0, payload))
            time.sleep(0.01)


def hosts_by_name(peer: Endpoint, *, seconds: float, model: str, blocks: int) -> Sequence[Message]:
    """Opens sessions whose next hops are host names, which an attacker's name server would resolve; returns the
    answers."""
    deadline = time.monotonic() + seconds
    answers: list[Message] = []
    key = Identity.generate().public.raw
    with Client(peer) as client:
        number = 0
        while not number or time.monotonic() < deadline:
            number += 1
            address = f"tcp://slow{number}.example.com:80"
            client.say(Open(number.to_bytes(16, "big"), 1, model, 0, blocks, 64, 0, b"", key, address))
            answers.append(client.hear())
    return answers


def scan(peer: Endpoint, targets: Sequence[str], *, model: str, blocks: int) -> Sequence[tuple[bool, float]]:
    """Makes a peer connect to addresses. Returns for each address whether the peer reports it as reachable, and after
    how many seconds."""
    found: list[tuple[bool, float]] = []
    key = Identity.generate().public.raw
    with Client(peer) as client:
        client.ping()
        for number, address in enumerate(targets):
            began = time.monotonic()
            client.say(Open(b"scan" * 3 + number.to_bytes(4, "big"), 1, model, 0, blocks, 64, 0, b"", key, address))
            found.append((client.hear(Opened).next_reachable, time.monotonic() - began))
    return found


@contextmanager
def in_background(attack: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[multiprocessing.Process]:
    """Runs an attack in a separate process, which ends with the block."""
    process = multiprocessing.get_context("spawn").Process(target=attack, args=arguments, kwargs=options, daemon=True)
    process.start()
    try:
        yield process  # pyright: ignore[reportReturnType]
    finally:
        process.kill()
        process.join()
